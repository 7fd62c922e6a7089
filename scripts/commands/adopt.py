"""`headstart adopt`: turn a model's own multi-token prediction (MTP) layer into a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import show


def adopt(
    model: Annotated[str, typer.Argument(help="Model with an MTP layer: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the head to.")],
) -> None:
    """Write the multi-token prediction layer of a model as a head of kind mtp."""
    from headstart.model.checkpoint.adopt import adopt as write

    head = write(model, out)
    millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    show(f"{out}: mtp head, {millions:,.1f}M parameters, target {model}")
