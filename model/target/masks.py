"""Which positions each new one may attend to, by kind of attention.

Legend: B sequences, N new positions, S cache slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.tree import Tree

from .sparse_attention import SPARSE, tie_break_earliest

if TYPE_CHECKING:
    pass

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR, MIXER = "linear_attention", "linear_attn"  # a recurrent layer, and what is recurrent in it
# What the code of a model with windows builds its masks with.
WINDOW_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)


@dataclass(frozen=True)
class AttentionWindows:
    """How far each kind of layer looks back.

    kinds: the kinds of attention that occur. sliding: a position sees itself and the sliding - 1
    before it. chunked: a position sees only its own chunk of that many positions. sparse: an
    indexer chooses among what the mask shows (sparse.py).
    """

    kinds: tuple[str, ...]
    sliding: int = 0
    chunked: int = 0
    sparse: bool = False

    @staticmethod
    def of(config: PretrainedConfig) -> AttentionWindows:
        """From a configuration; the same reading as transformers' `create_masks_for_generate`."""
        settings = config.to_dict()
        sliding = settings.get("sliding_window") or 0
        chunked = settings.get("attention_chunk_size") or 0
        kinds = settings.get("layer_types")
        if kinds and set(kinds) <= set(SPARSE):
            return AttentionWindows((FULL,), sparse=True)
        if kinds is not None:
            kinds = [kind for kind in kinds if kind != LINEAR]
        else:
            kinds = [SLIDING if sliding else CHUNKED if chunked else FULL]
        return AttentionWindows(tuple(sorted(set(kinds))), sliding, chunked)

    def mask(
        self, cache: KVCache, depths_BN: Tensor, tree: Tree | None, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        """Additive mask B x 1 x N x S of the cache's new rows, one per kind if there are more.

        tree: whose nodes see their ancestors; None for a text, whose rows see those before them.
        """
        seen_BNS = cache.visible(pending_visibility(depths_BN, tree))
        if self.kinds == (FULL,):
            return self._additive(seen_BNS, dtype)
        new_places_BN = depths_BN + cache.lengths_B[:, None]
        return self._of_kinds(seen_BNS, new_places_BN, cache.positions(depths_BN), dtype)

    def ranked(self, ids_BT: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor] | None:
        """The mask of whole texts where the model's own does not do: ours also says which of the
        columns scored 0 are chosen, and asks for no values, of which the meta device has none.
        None elsewhere."""
        if not self.sparse and not ids_BT.is_meta:
            return None
        places_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        seen_BTT = pending_visibility(places_BT, None)
        return self._of_kinds(seen_BTT, places_BT, places_BT, dtype)

    def _of_kinds(
        self, seen_BNS: Tensor, query_BN: Tensor, key_BS: Tensor, dtype: torch.dtype
    ) -> Tensor | dict[str, Tensor]:
        masks = {
            kind: self._additive(seen_BNS & self._near(kind, query_BN, key_BS), dtype)
            for kind in self.kinds
        }
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _additive(self, seen_BNS: Tensor, dtype: torch.dtype) -> Tensor:
        mask_B1NS = additive(seen_BNS, dtype)
        return tie_break_earliest(mask_B1NS) if self.sparse else mask_B1NS

    def _near(self, kind: str, query_BN: Tensor, key_BS: Tensor) -> Tensor:
        """True where a key's position lies in the window of a query's, B x N x S."""
        query_BN1, key_B1S = query_BN[:, :, None], key_BS[:, None, :]
        if kind == SLIDING:
            return query_BN1 - key_B1S < self.sliding
        if kind == CHUNKED:
            return query_BN1 // self.chunked == key_B1S // self.chunked
        return torch.ones((), dtype=torch.bool, device=query_BN.device)


def pending_visibility(depths_BN: Tensor, tree: Tree | None) -> Tensor:
    """B x N x N: True where a new row sees another one. Arguments as of `Windows.mask`."""
    if tree is None:
        return depths_BN[:, :, None] >= depths_BN[:, None, :]
    return tree.ancestors_BNN


def additive(seen_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, else the lowest number: right for eager and for fused attention."""
    mask_BNS = torch.zeros(seen_BNS.shape, dtype=dtype, device=seen_BNS.device)
    return mask_BNS.masked_fill_(~seen_BNS, torch.finfo(dtype).min)[:, None]
