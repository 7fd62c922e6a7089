"""`headstart fuse`: a target and its draft head in one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import show


def fuse(
    target: Annotated[str, typer.Argument(help="Hub id, folder or .gguf file.")],
    head: Annotated[Path, typer.Argument(help="A head trained on it: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    link: Annotated[
        bool, typer.Option(help="Hard-link the target's weights: saves space, but both are one.")
    ] = False,
    index: Annotated[
        bool, typer.Option(help="List an mtp head in the index, for transformers' use_mtp.")
    ] = False,
    native: Annotated[
        bool,
        typer.Option(help="Write an mtp head over the layer that the target carries, for engines."),
    ] = False,
) -> None:
    """Write one folder: the target's files unchanged, the head in draft_heads/, a card."""
    from headstart.model.checkpoint.fuse import fuse as write

    write(target, head, out, link=link, index=index, native=native)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    show(f"{out} ({size / 1e6:,.0f} MB)")
