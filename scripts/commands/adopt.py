"""`headstart adopt`: a head from the multi-token prediction layer that came with a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import show


def adopt(
    model: Annotated[str, typer.Argument(help="Folder or Hub id, with such a layer.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the head into.")],
) -> None:
    """Write the multi-token prediction layer that a model carries as a head of kind mtp."""
    from headstart.model.checkpoint.adopt import adopt as write

    head = write(model, out)
    millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    show(f"{out}: an mtp head of {millions:,.1f} M parameters, for {model}")
