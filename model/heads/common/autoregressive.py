"""Heads that draft one depth at a time and feed their own output back (EAGLE-3, MTP).

A *pair* at position p joins the target's feature at p with the embedding of token x[p+1]; the head
drafts x[p+2] from it. In later steps the feature is the head's own output instead.

What a step attends to is the *attention layout*. It is part of the checkpoint, because a head that
was trained in one layout drafts garbage in another:

    append   step k at anchor p attends to the pairs up to p and to its own earlier steps 1..k
             (EAGLE-3; what vLLM, SGLang and llama.cpp serve)
    kvshare  step k at anchor p attends to the pairs up to p only (GLM-5.2): drafted nodes leave no
             keys

With a *window* of W, every step attends only to the last W pairs up to the anchor: a head for long
contexts, whose cost and drafts do not depend on what came before.

Legend: B sequences, T positions, P new positions, F frontier nodes, S cache slots, M drafted slots,
H query heads, G key/value heads, C head dimension, D hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headstart.model.backends.ops import Ops
from headstart.model.backends.torch_ops import grouped_attention
from headstart.model.cache.kv_cache import KVCache
from headstart.model.target.output import TargetOutput
from headstart.model.tree.grow import Children, Frontier, ShouldDeepen, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .base import DraftHead, HeadConfig
from .cached_attention import CachedAttention, DraftVisibility
from .layers import Attend, LayerConfig

AttentionLayout = Literal["append", "kvshare"]
QUERY_CHUNK = 512  # queries whose scores later training steps hold at once


class AutoregressiveConfig(HeadConfig):
    """Settings of the kinds that draft by applying one decoder layer again and again."""

    layer: LayerConfig = Field(description="Sizes of the head's decoder layer.")
    attention_layout: AttentionLayout = Field(
        default="append",
        description="What later draft steps attend to. append: the sequence and the draft "
        "tokens before them, as stock engines compute it; kvshare: the sequence alone, which suits "
        "trees.",
    )
    window: int | None = Field(
        default=None,
        ge=1,
        description="Number of last positions that the head's attention sees (default: all).",
    )


class AutoregressiveHead(DraftHead):
    """Drafts by applying one decoder layer again and again. A kind defines that step."""

    attention_layout: AttentionLayout
    window: int | None = None

    @abstractmethod
    def feature(self, seen: TargetOutput) -> Tensor:
        """What the first step uses of the target's output, B x T x D."""

    @abstractmethod
    def step(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        """One draft step. Returns its output B x T x D, not yet normed."""

    @abstractmethod
    def lm_head_input(self, output_BTD: Tensor) -> Tensor:
        """The input of the LM head."""

    @abstractmethod
    def next_feature(self, output_BTD: Tensor) -> Tensor:
        """The feature of the next step."""

    def unroll(self, seen: TargetOutput, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        attend = _Unrolled(self.attention_layout, self.window)
        feature_BTD = self.feature(seen)
        hidden: list[Tensor] = []
        for step in range(steps):
            shifted_BT = tokens_BT.roll(-1 - step, dims=1)
            embedded_BTD = self.target.embed(shifted_BT).to(feature_BTD.dtype)
            inputs = (embedded_BTD, feature_BTD, positions_BT + step, attend.at(step))
            if self.recompute and torch.is_grad_enabled():
                output_BTD = checkpoint(self.step, *inputs, use_reentrant=False)
            else:
                output_BTD = self.step(*inputs)
            hidden.append(self.lm_head_input(output_BTD))
            feature_BTD = self.next_feature(output_BTD)
        return hidden

    def start(self, batch_size: int) -> HeadState:
        return HeadState(KVCache(batch_size, 1, self.target.device))

    def select_rows(self, state: HeadState, rows: Tensor) -> HeadState:
        return state.select_rows(rows)

    @torch.no_grad()
    def advance(
        self, state: HeadState, seen: TargetOutput, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> HeadState:
        feature_BPD = self.feature(seen)
        batch, new = next_tokens_BP.shape
        steps_P = torch.arange(new, device=next_tokens_BP.device)
        positions_BP = state.cache.lengths_B[:, None] + steps_P
        state.cache.reserve(new)
        causal_BPP = (steps_P[:, None] >= steps_P).expand(batch, -1, -1)
        first_BP = _first(positions_BP, self.window)
        visibility = DraftVisibility(state.cache, causal_BPP, first_BP)
        output_BPD = self.step(
            self.target.embed(next_tokens_BP).to(feature_BPD.dtype),
            feature_BPD,
            positions_BP,
            CachedAttention(self.ops, visibility),
        )
        state.cache.commit(None, counts_B)
        last_B1 = (counts_B - 1)[:, None]
        index_B1D = last_B1[..., None].expand(-1, -1, output_BPD.shape[-1])
        return HeadState(
            state.cache, output_BPD.gather(1, index_B1D), next_tokens_BP.gather(1, last_B1)[:, 0]
        )

    @torch.no_grad()
    def draft(
        self, state: HeadState, shape: TreeShape, should_deepen: ShouldDeepen | None = None
    ) -> Tree:
        assert state.output_B1D is not None and state.root_B is not None
        last_B1 = state.cache.lengths_B[:, None] - 1
        first_B1 = _first(last_B1, self.window)
        nodes = _DraftedNodes(self.ops, state.cache, self.attention_layout, first_B1)
        output_BFD = state.output_B1D

        def step(frontier: Frontier) -> Children:
            nonlocal output_BFD
            parents_BFD = frontier.parents_BF[..., None].expand(-1, -1, output_BFD.shape[-1])
            feature_BFD = self.next_feature(output_BFD).gather(1, parents_BFD)
            embedded_BFD = self.target.embed(frontier.tokens_BF).to(feature_BFD.dtype)
            positions_BF = (last_B1 + frontier.depth).expand_as(frontier.tokens_BF)
            attend = nodes.attend(frontier)
            output_BFD = self.step(embedded_BFD, feature_BFD, positions_BF, attend)
            return self.candidates(self.lm_head_input(output_BFD), shape.width, frontier.depth)

        first = self.candidates(self.lm_head_input(output_BFD), shape.width, 0)
        return grow(state.root_B, first, step, shape, should_deepen, ops=self.ops)


class _Unrolled:
    """Training attention: causal in step 0, then causal over step 0 plus the own chain."""

    def __init__(self, layout: AttentionLayout, window: int | None):
        self.layout, self.window = layout, window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def at(self, step: int) -> Attend:
        """The attention of one step, also when the step is recomputed."""
        return partial(self._attend, step)

    def _attend(self, step: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if step and self.layout == "kvshare":
            return _causal(queries, self.keys[0], self.values[0], self.window)
        if len(self.keys) == step:
            self.keys.append(keys)
            self.values.append(values)
        if step == 0:
            return _causal(queries, keys, values, self.window)
        # A step that is recomputed later must not see the steps after it.
        chain = ((*self.keys[:step], keys), (*self.values[:step], values))
        positions = queries.shape[2]
        if positions <= QUERY_CHUNK:
            return _attend_chain(queries, 0, *chain, self.window)
        # Recomputed in the backward pass, so that no T x T matrix outlives its chunk.
        parts = [
            checkpoint(
                _attend_chain,
                queries[:, :, at : at + QUERY_CHUNK],
                at,
                *chain,
                self.window,
                use_reentrant=False,
            )
            for at in range(0, positions, QUERY_CHUNK)
        ]
        return torch.cat(parts, 2)


def _causal(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Every position sees itself and what came before, of that at most the last `window`."""
    positions = queries.shape[2]
    if window is None or positions <= window:
        return grouped_attention(queries, keys, values, None, causal=True)
    parts = []
    for at in range(0, positions, QUERY_CHUNK):
        until = min(at + QUERY_CHUNK, positions)
        hidden, first = _hidden(at, until, window, queries.device)
        seen = keys[:, :, first:until], values[:, :, first:until]
        parts.append(grouped_attention(queries[:, :, at:until], *seen, ~hidden[None, None]))
    return torch.cat(parts, 2)


def _hidden(at: int, until: int, window: int | None, device: torch.device) -> tuple[Tensor, int]:
    """True where a query in [at, until) does not see a position from `first` on, queries x
    positions; and `first`."""
    first = 0 if window is None else max(0, at - window + 1)
    anchors = torch.arange(at, until, device=device)[:, None]
    places = torch.arange(first, until, device=device)
    hidden = places > anchors
    if window is not None:
        hidden = hidden | (places <= anchors - window)
    return hidden, first


def _first(anchors_BN: Tensor, window: int | None) -> Tensor | None:
    """The first position that an anchor sees."""
    return None if window is None else anchors_BN - window + 1


def _attend_chain(
    queries: Tensor,
    at: int,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    window: int | None,
) -> Tensor:
    """Queries from position `at` on: step-0 keys up to themselves, later keys of their own."""
    batch, heads, new, head_dim = queries.shape
    kv_heads = keys[0].shape[1]
    until = at + new
    hidden, first = _hidden(at, until, window, queries.device)
    queries = queries.reshape(batch, kv_heads, heads // kv_heads, new, head_dim)
    queries = queries * head_dim**-0.5
    first_keys = keys[0][:, :, None, first:until]
    first_values = values[0][:, :, None, first:until]
    own_keys = [later[:, :, None, at:until] for later in keys[1:]]
    own_values = [later[:, :, None, at:until] for later in values[1:]]
    scores = queries @ first_keys.transpose(-1, -2)
    scores = scores.masked_fill(hidden, float("-inf"))
    chain = torch.stack([(queries * later).sum(-1) for later in own_keys], -1)
    weights = torch.cat([scores, chain.to(scores.dtype)], -1).softmax(-1).to(first_values.dtype)
    attended = weights[..., : until - first] @ first_values
    for index, later in enumerate(own_values):
        attended = attended + weights[..., until - first + index, None] * later
    return attended.reshape(batch, heads, new, -1)


@dataclass(frozen=True)
class HeadState:
    """Decoding state: keys and values of the committed pairs, and what the next tree starts from.

    output_B1D: the step's output at the last pair. root_B: the token after it.
    """

    cache: KVCache
    output_B1D: Tensor | None = None
    root_B: Tensor | None = None

    def select_rows(self, rows: Tensor) -> HeadState:
        self.cache.select_rows(rows)
        if self.output_B1D is None or self.root_B is None:
            return self
        return HeadState(self.cache, self.output_B1D[rows], self.root_B[rows])


class _DraftedNodes:
    """Keys of drafted nodes: pending in the cache, behind the committed pairs of every sequence."""

    def __init__(self, ops: Ops, cache: KVCache, layout: AttentionLayout, first_B1: Tensor | None):
        self.ops, self.cache, self.layout, self.first_B1 = ops, cache, layout, first_B1
        self.ancestors_BFM: Tensor | None = None

    def attend(self, frontier: Frontier) -> Attend:
        return self._shared if self.layout == "kvshare" else self._appended(frontier)

    def _shared(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.cache.reserve(0)
        nothing_BF0 = queries.new_zeros(len(queries), queries.shape[2], 0, dtype=torch.bool)
        keys_BGSC, values_BGSC = self.cache.update(keys[:, :, :0], values[:, :, :0], 0)
        visibility = DraftVisibility(self.cache, nothing_BF0, self.first_B1)
        return self.ops.cached_attention(queries, keys_BGSC, values_BGSC, visibility)

    def _appended(self, frontier: Frontier) -> Attend:
        drafted = 0 if self.ancestors_BFM is None else self.ancestors_BFM.shape[-1]
        self.ancestors_BFM = self.ops.inherit(self.ancestors_BFM, frontier.parents_BF)
        self.cache.reserve(frontier.tokens_BF.shape[1], pending_before=drafted)
        visibility = DraftVisibility(self.cache, self.ancestors_BFM, self.first_B1)
        return CachedAttention(self.ops, visibility)
