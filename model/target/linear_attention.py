"""How a target with recurrent layers reads behind a text: chains, no trees, and one text at a time.

Legend: N new rows, T rows of a read in all, S cache columns, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headstart.model.backends.visibility import additive_mask
from headstart.model.cache.kv_cache import KVCache

if TYPE_CHECKING:
    from headstart.model.tree.tree import Tree

# (ids 1 x T, positions 1 x T, mask 1 x 1 x T x S or None) -> last hidden 1 x T x D, those of layers
Run = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, dict[int, Tensor]]]


class RecurrentTargetReader:
    """mixers: what is recurrent in the decoder layers, by their place. name: of the target."""

    def __init__(self, mixers: Mapping[int, nn.Module], name: str):
        self.mixers, self.name = mixers, name

    def refuse_integers(self, quantize: str | None) -> None:
        """ValueError where recurrent layers would be quantised."""
        if self.mixers and quantize is not None:
            raise ValueError(
                f"{self.name} has recurrent layers, which are not computed in integers. Leave out "
                f"quantize ({quantize})."
            )

    def new_cache(self, rows: int, layers: int, device: torch.device) -> KVCache:
        """An empty cache, of any target. ValueError for several rows where there are states."""
        if self.mixers and rows != 1:
            raise ValueError(
                f"{self.name} has recurrent layers, whose rows cannot go on from different "
                f"lengths. Give one text at a time, not {rows}."
            )
        return KVCache(rows, layers, device, recurrent=tuple(self.mixers))

    def read(
        self, ids_1N: Tensor, tree: Tree | None, cache: KVCache, dtype: torch.dtype, run: Run
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Read a text, or a tree that is a chain, behind the cache; of the new rows only."""
        assert cache.states is not None
        if tree is not None:
            self._refuse_branches(tree)
        new = ids_1N.shape[1]
        ids_T = cache.states.begin(ids_1N[0], new if tree is None else 1)
        again = len(ids_T) - new
        cache.reserve(new, again=again)
        places_T = torch.arange(cache.width - again, cache.columns, device=ids_T.device)
        mask: Tensor | None = None  # the model's own
        if cache.width and len(ids_T) > 1:
            columns_S = torch.arange(cache.columns, device=ids_T.device)
            mask = additive_mask((columns_S <= places_T[:, None])[None], dtype)
        with cache.states.snapshot_at_root(self.mixers):
            last_1TD, hidden = run(ids_T[None], places_T[None], mask)
        return last_1TD[:, again:], {layer: states[:, again:] for layer, states in hidden.items()}

    def _refuse_branches(self, tree: Tree) -> None:
        if tree.parents_BN.tolist() != [list(range(-1, tree.nodes - 1))]:
            raise ValueError(
                f"{self.name} has recurrent layers, whose state cannot branch, so it reads no tree "
                "with branches. Use a chain: TreeShape.chain(4), or --budget 5/4/1."
            )
