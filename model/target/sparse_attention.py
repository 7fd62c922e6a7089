"""Sparse attention: a position attends to the `index_topk` cache slots that an indexer scores
highest, as in DeepSeek-V3.2 and GLM-5.

The indexer is a small attention beside the layer's own, whose keys the cache holds too; layers
without one reuse the selection of the layer before. It selects behind the mask: for a node of a
tree among the prefix and the node's ancestors. Where fewer slots are visible than it may select, it
selects hidden ones too, and the mask hides them again.

Scores are clipped at 0, so many slots can tie. Which of them torch selects depends on the others,
and a tree has more slots than a chain. `tie_break_earliest` (backends/visibility.py) decides.

Legend: B sequences, N new positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("deepseek_v32", "glm_moe_dsa")  # others select in ways that were not tried
PROBE_TOPK = 3  # slots that are selected in a probe
PARTS = {"wq_b", "wk", "k_norm", "weights_proj"}  # of an indexer


def indexers(module: nn.Module) -> list[nn.Module]:
    """The indexers inside a module that are known: others select blocks, or mix keys."""
    return [one for one in module.modules() if _is_indexer(one)]


def _is_indexer(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    own = next(module.parameters(recurse=False), None)
    return parts == PARTS and own is None and isinstance(getattr(module, "index_topk", None), int)


class UnusedIndexer(nn.Module):
    """Replaces the indexer in a head's layer, which attends to all that is visible.

    The weights are kept in buffers, which no optimizer sees.
    """

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
    """Let a decoder layer attend to all that is visible. Returns whether it had an indexer."""
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
    """Within it, the indexers inside a module select `count` slots."""
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
    """Within it, even the short sequence of a probe has slots that are not selected.

    Not in 16 bits, where rounding decides between close scores and a probe could fail for nothing.
    """
    wide = dtype in (torch.float32, torch.float64)
    return override_topk(PROBE_TOPK, layers) if wide else nullcontext()
