"""Which positions each new one may attend to, by kind of attention.

Legend: B sequences, N new positions, M pending cache slots, S cache slots, T positions of whole
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PretrainedConfig

from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.tree import Tree

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LINEAR = "linear_attention"  # a recurrent layer
SPARSE = ("indexed_attention", "deepseek_sparse_attention")  # transformers 5.24's name, and 5.17's
TIE_STEP = 1e-30  # too small to change any attention score

AdditiveMask = Tensor | dict[str, Tensor]  # B 1 N S, by kind of attention where there are several


@dataclass(frozen=True)
class AttentionWindows:
    """How far each kind of layer looks back.

    kinds: the kinds of attention that occur.
    sliding: a position sees itself and the sliding - 1 positions before it (0: no such layer).
    chunked: a position sees only its own chunk of that many positions (0: no such layer).
    sparse: an indexer chooses among what the mask shows (target/sparse_attention.py).
    """

    kinds: tuple[str, ...]
    sliding: int = 0
    chunked: int = 0
    sparse: bool = False

    @staticmethod
    def of(config: PretrainedConfig) -> AttentionWindows:
        """Read a configuration as transformers' `create_masks_for_generate` does."""
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

    @property
    def full_only(self) -> bool:
        """Whether every layer sees the whole sequence."""
        return self.kinds == (FULL,)

    def whole_sequence_mask(self, ids_BT: Tensor, dtype: torch.dtype) -> AdditiveMask | None:
        """Build the mask of whole sequences where the model's own would not do, else None.

        With sparse attention it also breaks ties between slots that scored 0. On the meta device
        it needs no values, of which there are none.
        """
        if not self.sparse and not ids_BT.is_meta:
            return None
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self.additive(_causal(positions_BT), positions_BT, positions_BT, dtype)

    def additive(
        self, visible_BNS: Tensor, query_BN: Tensor, key_BS: Tensor, dtype: torch.dtype
    ) -> AdditiveMask:
        """Build the additive masks of all kinds of attention.

        visible_BNS: True where a full-attention layer sees a slot.
        query_BN, key_BS: positions in the sequence of the new tokens and of the slots.
        """
        masks = {
            kind: self.one_additive(visible_BNS & self._within(kind, query_BN, key_BS), dtype)
            for kind in self.kinds
        }
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def one_additive(self, visible_BNS: Tensor, dtype: torch.dtype) -> Tensor:
        """Build one additive mask, B x 1 x N x S, in which ties are broken if that matters."""
        mask_B1NS = additive_mask(visible_BNS, dtype)
        return tie_break_earliest(mask_B1NS) if self.sparse else mask_B1NS

    def _within(self, kind: str, query_BN: Tensor, key_BS: Tensor) -> Tensor:
        """True where a key's position lies in the window of a query's, B x N x S."""
        query_BN1, key_B1S = query_BN[:, :, None], key_BS[:, None, :]
        if kind == SLIDING:
            return query_BN1 - key_B1S < self.sliding
        if kind == CHUNKED:
            return query_BN1 // self.chunked == key_B1S // self.chunked
        return torch.ones((), dtype=torch.bool, device=query_BN.device)


@dataclass(frozen=True)
class Visibility:
    """What the new positions of one forward pass behind a cache may attend to.

    Made after `cache.reserve`, and valid until the cache changes.

    depths_BN: distance of each new position from the first uncommitted one.
    tree: whose nodes see their ancestors; None for plain tokens, which see those before them.
    """

    depths_BN: Tensor
    tree: Tree | None
    cache: KVCache
    windows: AttentionWindows

    @cached_property
    def pending_BNM(self) -> Tensor:
        """True where a new position sees a pending slot, as if no layer had a window."""
        return _causal(self.depths_BN) if self.tree is None else self.tree.ancestors_BNN

    @property
    def windowed(self) -> bool:
        """Whether some layers see only a part of the committed slots."""
        return not self.windows.full_only

    @property
    def all_visible(self) -> bool:
        """Whether each new position sees all slots in every layer: one more token, no windows."""
        one_more = self.cache.equal_lengths and self.depths_BN.shape[1] == 1
        return one_more and self.windows.full_only

    @property
    def is_causal(self) -> bool:
        """Whether the mask that a model makes for itself, given no other, is the right one: for one
        more token, or for whole sequences. Sparse attention always needs ours."""
        if self.tree is not None or self.windows.sparse or not self.cache.equal_lengths:
            return False
        return self.depths_BN.shape[1] == 1 or self.cache.max_length == 0

    def additive(self, dtype: torch.dtype) -> AdditiveMask:
        """Build the additive mask, B x 1 x N x S: one for each kind of attention if there are
        several."""
        visible_BNS = self.cache.visible(self.pending_BNM)
        if self.windows.full_only:
            return self.windows.one_additive(visible_BNS, dtype)
        positions_BN = self.depths_BN + self.cache.lengths_B[:, None]
        slots_BS = self.cache.positions(self.depths_BN)
        return self.windows.additive(visible_BNS, positions_BN, slots_BS, dtype)


def additive_mask(visible_BNS: Tensor, dtype: torch.dtype) -> Tensor:
    """Build a mask B x 1 x N x S that is 0 where visible, else the type's lowest number, which
    suits eager and fused attention alike."""
    mask_BNS = torch.zeros(visible_BNS.shape, dtype=dtype, device=visible_BNS.device)
    return mask_BNS.masked_fill_(~visible_BNS, torch.finfo(dtype).min)[:, None]


def tie_break_earliest(mask_B1NS: Tensor) -> Tensor:
    """Change an additive mask so that the earlier of two slots that scored 0 is chosen.

    In 32 bits only: in 16 it tells few slots apart, and rounding decides between close scores
    anyway.
    """
    slots_S = torch.arange(mask_B1NS.shape[-1], device=mask_B1NS.device)
    return mask_B1NS - (slots_S * TIE_STEP).to(mask_B1NS.dtype)


def _causal(depths_BN: Tensor) -> Tensor:
    """B x N x N: True where a position sees itself and those before it."""
    return depths_BN[:, :, None] >= depths_BN[:, None, :]
