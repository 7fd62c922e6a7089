"""`headstart push`: publish a fused checkpoint or a head on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import show


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a fused checkpoint or of a head.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to, created if missing (default: main).")
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Commit message (default: a generated one).")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Hub id of the target, if the head was trained on a local folder."),
    ] = None,
    replace: Annotated[
        bool, typer.Option(help="Overwrite a repository with another model or an edited card.")
    ] = False,
) -> None:
    """Publish in one commit, with a model card; an interrupted upload resumes."""
    from headstart.model.hub.upload import publish

    done = publish(
        folder,
        repo,
        private=private,
        revision=revision,
        message=message,
        base_model=base_model,
        replace=replace,
    )
    for note in done.notes:
        show(note)
    show(f"{done.url} (commit {done.commit[:7]})")
