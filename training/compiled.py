"""The head's layers by torch.compile. Attention and what spreads a head over processes stay as they
are, so names of weights, checkpoints and engines do not know of it.

Graphs hold for every number of rows and columns, with one of their own for a single row. Where
torch would need many more of them, the run ends instead of going on uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from headstart.model.heads.common.base import DraftHead

BACKEND = "inductor"
MOST_GRAPHS = 16  # of one function: rows one or more, gradient or none, packed or not


def compile_blocks(head: DraftHead) -> None:
    """From now on. The weights keep their names."""
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for block in blocks(head):
        block.compile(dynamic=True, backend=BACKEND)


def blocks(head: nn.Module) -> Iterator[nn.Module]:
    """The modules of a head that are made of modules themselves: its decoder layer, say."""
    for child in head.children():
        if isinstance(child, nn.ModuleList):
            yield from blocks(child)
        elif any(child.children()):
            yield child


def check_compiler(engine: str, device: torch.device) -> None:
    """ValueError where layers cannot be compiled. Compiles a line to know it."""
    if engine == "zero3":
        raise ValueError(
            "train.compile does not go with parallel.engine=zero3, which puts weights together in "
            "the middle of a layer. Use fsdp2, or leave train.compile out."
        )
    try:
        torch.compile(lambda values: values.sin() + 1, backend=BACKEND)(torch.ones(8).to(device))
    except Exception as error:  # as many kinds as there are compilers
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"train.compile is set, but nothing can be compiled here: {reason[0]} It needs a C++ "
            "compiler and Python's headers on a CPU, and Triton on a GPU. Install them, or leave "
            "train.compile out."
        ) from error
