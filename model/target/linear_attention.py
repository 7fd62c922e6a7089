"""The decoder of a target with recurrent layers: chains instead of trees, one sequence at a time.

Legend: N new positions, T positions of a forward pass with the replayed ones, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headstart.model.backends.visibility import (
    FULL,
    LINEAR,
    AdditiveMask,
    Visibility,
    additive_mask,
)
from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.tree import Tree

from .decoder import DecoderOutput, ModuleDecoder


class RecurrentDecoder(ModuleDecoder):
    """As `ModuleDecoder`. Tokens that were accepted behind the last snapshot of the states are
    replayed in front of the new ones (model/cache/recurrent_state.py).

    mixers: the recurrent part of each recurrent layer, by the layer's index.
    name: of the target, for messages.
    """

    recurrent = True

    def __init__(
        self,
        module: nn.Module,
        layers: nn.ModuleList,
        config: PretrainedConfig,
        dtype: torch.dtype,
        mixers: Mapping[int, nn.Module],
        name: str,
    ):
        super().__init__(module, layers, config, dtype)
        self.mixers, self.name = mixers, name

    def new_cache(self, batch_size: int, device: torch.device) -> KVCache:
        """An empty cache. ValueError for several sequences."""
        if batch_size != 1:
            raise ValueError(
                f"{self.name} has recurrent layers, whose sequences cannot resume from different "
                f"lengths. Decode one sequence at a time, not {batch_size}."
            )
        return KVCache(1, len(self.layers), device, recurrent=tuple(self.mixers))

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache | None,
        visibility: Visibility | None,
        taps: Sequence[int] = (),
    ) -> DecoderOutput:
        """As `ModuleDecoder.forward`. ValueError for a tree with branches."""
        if cache is None or visibility is None:
            return super().forward(ids_BN, positions_BN, cache, visibility, taps)
        assert cache.states is not None, "the cache is of another target"
        tree = visibility.tree
        if tree is not None:
            self._check_is_chain(tree)
        new = ids_BN.shape[1]
        ids_T = cache.states.begin(ids_BN[0], certain=new if tree is None else 1)
        replayed = len(ids_T) - new
        cache.reserve(new, rewrite=replayed)
        positions_T = torch.arange(cache.max_length - replayed, cache.slots, device=ids_T.device)
        mask: Tensor | None = None  # None: the model makes its own causal mask
        if cache.max_length and len(ids_T) > 1:
            slots_S = torch.arange(cache.slots, device=ids_T.device)
            mask = additive_mask((slots_S <= positions_T[:, None])[None], self.dtype)
        with cache.states.snapshot_at_root(self.mixers):
            lm_head_input_1TD, hidden_states = self.run(
                ids_T[None], positions_T[None], mask, cache, taps
            )
        new_states = {layer: states[:, replayed:] for layer, states in hidden_states.items()}
        return lm_head_input_1TD[:, replayed:], new_states

    def _mask_argument(self, mask: AdditiveMask | None) -> Any:
        """Recurrent layers take no mask."""
        return None if mask is None else {FULL: mask, LINEAR: None}

    def _check_is_chain(self, tree: Tree) -> None:
        if tree.parents_BN.tolist() != [list(range(-1, tree.nodes - 1))]:
            raise ValueError(
                f"{self.name} has recurrent layers, whose state cannot branch, so it cannot verify "
                "a tree with branches. Use a chain: TreeShape.chain(4), or --budget 5/4/1."
            )
