"""Attention of draft layers over a cache of their own.

Legend: B sequences, N new positions, M pending cache slots, S cache slots, H query heads, G
key/value heads, C head dimension, E width of queries, keys and values joined.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.model.backends.ops import AttentionSpec, Ops
from headstart.model.backends.rotary import CosSin
from headstart.model.backends.visibility import additive_mask
from headstart.model.cache.kv_cache import KVCache


@dataclass(frozen=True)
class DraftVisibility:
    """What new positions of a draft layer may see. Made after `cache.reserve`.

    pending_BNM: True where a new position sees a pending slot.
    first_BN: the first slot that a new position sees, for heads with a window.
    """

    cache: KVCache
    pending_BNM: Tensor
    first_BN: Tensor | None = None

    @property
    def all_visible(self) -> bool:
        return False

    @property
    def windowed(self) -> bool:
        return self.first_BN is not None

    def additive(self, dtype: torch.dtype) -> Tensor:
        """Build the additive mask, B x 1 x N x S."""
        visible_BNS = self.cache.visible(self.pending_BNM)
        if self.first_BN is not None:
            slots_S = torch.arange(visible_BNS.shape[-1], device=visible_BNS.device)
            visible_BNS = visible_BNS & (slots_S >= self.first_BN[..., None])
        return additive_mask(visible_BNS, dtype)


class CachedAttention:
    """Attention that writes the new keys and values to the cache."""

    def __init__(self, ops: Ops, visibility: DraftVisibility):
        self.ops, self.visibility = ops, visibility

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attended values B x H x N x C of new queries, keys and values."""
        keys, values = self.visibility.cache.update(keys, values, 0)
        return self.ops.cached_attention(queries, keys, values, self.visibility)

    def fused(self, qkv_BNE: Tensor, spec: AttentionSpec, cos_sin: CosSin) -> Tensor:
        """Attended values B x N x (H C) of a joined product, which is rotated first."""
        shape = qkv_BNE.shape[0], qkv_BNE.shape[1]
        context = self.ops.begin(self.visibility, cos_sin, shape, qkv_BNE.dtype)
        kv_layer = self.visibility.cache.kv_layers[0]
        return self.ops.attend(qkv_BNE, spec, context, kv_layer)
