"""Sparse attention: a row attends to the `index_topk` columns that an indexer scores highest.

So it is in DeepSeek-V3.2 and GLM-5. The indexer is a small attention beside the layer's own, with
keys of its own that the cache holds; layers without one take over the choice of the layer before.
It chooses behind the mask: a tree's node among the text and its own ancestors. Where fewer are
visible than it may choose, it chooses hidden columns too, and the mask hides them again.

Scores are clipped at 0, so many columns can have that. Which of them torch then takes depends on
what else is there, and a tree has more columns than a chain. `tie_break_earliest` settles it.

Legend: B batch rows, N new rows, S columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("deepseek_v32", "glm_moe_dsa")  # others choose in ways that were not tried
FEW = 3  # columns that are chosen in a probe
PARTS = {"wq_b", "wk", "k_norm", "weights_proj"}  # of an indexer


def indexers(module: nn.Module) -> list[nn.Module]:
    """The indexers inside a module that are known: others choose blocks, or mix keys."""
    return [one for one in module.modules() if _is_indexer(one)]


def _is_indexer(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    own = next(module.parameters(recurse=False), None)
    return parts == PARTS and own is None and isinstance(getattr(module, "index_topk", None), int)


class UnusedIndexer(nn.Module):
    """What a head's layer has in the place of an indexer: nothing is chosen, so all that is visible
    is attended to. The weights are kept as they are, in buffers, which no optimizer sees."""

    def __init__(self, indexer: nn.Module):
        super().__init__()
        for name, child in indexer.named_children():
            held = nn.Module()
            for own, weight in child.named_parameters():
                held.register_buffer(own, weight.detach())
            self.add_module(name, held)

    def forward(self, hidden_BND: Tensor, *_: object, **__: object) -> Tensor:
        shape = (*hidden_BND.shape[:2], 0)
        return torch.empty(shape, dtype=torch.int32, device=hidden_BND.device)


def disable_indexer(layer: nn.Module) -> bool:
    """Let a decoder layer attend to all that is visible; whether it has an indexer."""
    found = [
        (owner, name)
        for owner in layer.modules()
        for name, one in owner.named_children()
        if _is_indexer(one)
    ]
    for owner, name in found:
        setattr(owner, name, UnusedIndexer(getattr(owner, name)))
    return bool(found)


@contextmanager
def override_topk(count: int, module: nn.Module) -> Iterator[None]:
    """Within it, the indexers inside a module choose so many columns."""
    found: list[Any] = indexers(module)
    before = [one.index_topk for one in found]
    try:
        for one in found:
            one.index_topk = count
        yield
    finally:
        for one, own in zip(found, before, strict=True):
            one.index_topk = own


def small_topk_for_probe(layers: nn.Module, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Within it, even a probe's short text has columns that are left out. Not in 16 bits, where
    rounding decides between close scores: such a probe would fail for nothing."""
    wide = dtype in (torch.float32, torch.float64)
    return override_topk(FEW, layers) if wide else nullcontext()
