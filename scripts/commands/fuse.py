"""`headstart fuse`: write a target and its draft head to one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import show


def fuse(
    target: Annotated[str, typer.Argument(help="Target: Hub id, folder or .gguf file.")],
    head: Annotated[Path, typer.Argument(help="Head trained on it: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    link: Annotated[
        bool, typer.Option(help="Hard-link the target's weights instead of copying them.")
    ] = False,
    index: Annotated[
        bool, typer.Option(help="Add an mtp head to the weight index, for transformers' use_mtp.")
    ] = False,
    native: Annotated[
        bool,
        typer.Option(
            help="Replace the target's own MTP layer by an mtp head, for vLLM and SGLang."
        ),
    ] = False,
) -> None:
    """Write one folder: the target's files unchanged, the head in draft_heads/, a model card."""
    from headstart.model.checkpoint.fuse import fuse as write

    write(target, head, out, link=link, index=index, native=native)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    show(f"{out} ({size / 1e6:,.0f} MB)")
