"""`headstart export`: the head of a fused checkpoint in a form that a production engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .ui import show


def export(
    folder: Annotated[Path, typer.Argument(help="Fused checkpoint: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[Literal["vllm", "sglang"], typer.Option(help="The engine that will draft.")],
    format_: Annotated[
        Literal["native", "speculators"],
        typer.Option("--format", help="native: for both engines. speculators: vLLM's own."),
    ] = "native",
    verifier: Annotated[
        str | None,
        typer.Option(help="What the engine serves, if not FOLDER: a copy of the target."),
    ] = None,
) -> None:
    """Write the head alone, and print the line that starts the engine with it."""
    from headstart.model.export import export as write

    show(write(folder, out, to, format_, verifier))
