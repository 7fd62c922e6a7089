"""Heads that draft one depth at a time and feed their own output back (EAGLE-3, MTP).

A *pair* at position p joins the target's feature at p with the embedding of token x[p+1]; the head
turns it into a guess for x[p+2]. In later steps the feature is the head's own output instead.

Who sees whom is the *attention layout*, part of the checkpoint because a head trained in one layout
drafts garbage in another:

    append   step k at anchor p sees the pairs up to p and its own earlier steps 1..k (EAGLE-3; what
             vLLM, SGLang and llama.cpp serve)
    kvshare  step k at anchor p sees the pairs up to p only (GLM-5.2): drafted nodes leave no keys

Legend: B batch rows, T positions, P new positions, F frontier nodes, S cache columns, M drafted
columns, H query heads, G key/value heads, C head channels, D hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .head import DraftHead
from .layers import Attend, grouped_attention
from .seen import Seen
from .tree import Children, Frontier, Tree, TreeShape, grow

AttentionLayout = Literal["append", "kvshare"]
QUERY_CHUNK = 512  # rows of the explicit attention of later training steps held at once
GROW_COLUMNS = 256


class RecurrentHead(DraftHead):
    """Drafts by applying one cell again and again. A kind says what the cell is."""

    attention_layout: AttentionLayout

    @abstractmethod
    def feature(self, seen: Seen) -> Tensor:
        """B x T x D: what the cell reads of the target."""

    @abstractmethod
    def cell(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        """One application: B x T x D, not yet normed."""

    @abstractmethod
    def readout(self, output_BTD: Tensor) -> Tensor:
        """The input of the LM head."""

    @abstractmethod
    def recycle(self, output_BTD: Tensor) -> Tensor:
        """The feature of the next step."""

    def unroll(self, seen: Seen, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        attend = _Unrolled(self.attention_layout)
        feature_BTD = self.feature(seen)
        hidden: list[Tensor] = []
        for step in range(steps):
            shifted_BT = tokens_BT.roll(-1 - step, dims=1)
            embedded_BTD = self.target.embed(shifted_BT).to(feature_BTD.dtype)
            output_BTD = self.cell(embedded_BTD, feature_BTD, positions_BT + step, attend)
            hidden.append(self.readout(output_BTD))
            feature_BTD = self.recycle(output_BTD)
        return hidden

    def start(self, batch_size: int) -> PairCache:
        return PairCache.empty(batch_size, self.target.device)

    def keep(self, state: PairCache, rows: Tensor) -> PairCache:
        return state.keep(rows)

    @torch.no_grad()
    def advance(
        self, state: PairCache, seen: Seen, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> PairCache:
        feature_BPD = self.feature(seen)
        steps_P = torch.arange(next_tokens_BP.shape[1], device=next_tokens_BP.device)
        columns_BP = state.lengths_B[:, None] + steps_P
        embedded_BPD = self.target.embed(next_tokens_BP).to(feature_BPD.dtype)

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            state.write(columns_BP, keys, values)
            keys_BGSC, values_BGSC, columns_S = state.filled(int(columns_BP.max()) + 1)
            mask_BPS = columns_S <= columns_BP[..., None]
            return grouped_attention(queries, keys_BGSC, values_BGSC, mask_BPS[:, None])

        output_BPD = self.cell(embedded_BPD, feature_BPD, columns_BP, attend)
        last_B1 = (counts_B - 1)[:, None]
        return replace(
            state,
            lengths_B=state.lengths_B + counts_B,
            root_B=next_tokens_BP.gather(1, last_B1)[:, 0],
            output_B1D=output_BPD.gather(
                1, last_B1[..., None].expand(-1, -1, output_BPD.shape[-1])
            ),
        )

    @torch.no_grad()
    def draft(self, state: PairCache, shape: TreeShape) -> Tree:
        assert state.output_B1D is not None and state.root_B is not None
        nodes = _DraftedNodes(state, self.attention_layout)
        output_BFD = state.output_B1D

        def step(frontier: Frontier) -> Children:
            nonlocal output_BFD
            parents_BFD = frontier.parents_BF[..., None].expand(-1, -1, output_BFD.shape[-1])
            feature_BFD = self.recycle(output_BFD).gather(1, parents_BFD)
            embedded_BFD = self.target.embed(frontier.tokens_BF).to(feature_BFD.dtype)
            last_B1 = (state.lengths_B - 1)[:, None]
            positions_BF = (last_B1 + frontier.depth).expand_as(frontier.tokens_BF)
            attend = nodes.attend(frontier)
            output_BFD = self.cell(embedded_BFD, feature_BFD, positions_BF, attend)
            return self.guesses(self.readout(output_BFD), shape.width)

        first = self.guesses(self.readout(output_BFD), shape.width)
        return grow(state.root_B, first, step, shape)


class _Unrolled:
    """Training attention: causal in step 0, then causal over step 0 plus the own chain."""

    def __init__(self, layout: AttentionLayout):
        self.layout = layout
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if not self.keys:
            self.keys, self.values = [keys], [values]
            return grouped_attention(queries, keys, values, None, causal=True)
        if self.layout == "kvshare":
            return grouped_attention(queries, self.keys[0], self.values[0], None, causal=True)
        self.keys.append(keys)
        self.values.append(values)
        # Tuples: a chunk that is recomputed later must not see the steps that came after it.
        chain = (tuple(self.keys), tuple(self.values))
        positions = queries.shape[2]
        if positions <= QUERY_CHUNK:
            return _attend_chain(queries, 0, *chain)
        # Recomputed in the backward pass, so that no T x T matrix outlives its chunk.
        parts = [
            checkpoint(
                _attend_chain,
                queries[:, :, at : at + QUERY_CHUNK],
                at,
                *chain,
                use_reentrant=False,
            )
            for at in range(0, positions, QUERY_CHUNK)
        ]
        return torch.cat(parts, 2)


def _attend_chain(
    queries: Tensor, at: int, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
) -> Tensor:
    """Queries from position `at` on: step-0 keys up to themselves, later keys of their own."""
    batch, heads, rows, channels = queries.shape
    groups = keys[0].shape[1]
    until = at + rows
    queries = queries.reshape(batch, groups, heads // groups, rows, channels)
    queries = queries * channels**-0.5
    first_keys, first_values = keys[0][:, :, None, :until], values[0][:, :, None, :until]
    own_keys = [later[:, :, None, at:until] for later in keys[1:]]
    own_values = [later[:, :, None, at:until] for later in values[1:]]
    scores = queries @ first_keys.transpose(-1, -2)
    places = torch.arange(until, device=queries.device)
    scores = scores.masked_fill(places[None, :] > places[at:, None], float("-inf"))
    chain = torch.stack([(queries * later).sum(-1) for later in own_keys], -1)
    weights = torch.cat([scores, chain.to(scores.dtype)], -1).softmax(-1).to(first_values.dtype)
    attended = weights[..., :until] @ first_values
    for index, later in enumerate(own_values):
        attended = attended + weights[..., until + index, None] * later
    return attended.reshape(batch, heads, rows, channels)


@dataclass(frozen=True)
class PairCache:
    """Decoding state: keys and values of the committed pairs, and what the next tree starts from.

    Row b's pairs are the columns [0, lengths_B[b]); what lies behind is scratch. output_B1D: the
    cell's output at the last pair. root_B: the token after it.
    """

    keys_BGSC: Tensor | None
    values_BGSC: Tensor | None
    lengths_B: Tensor
    output_B1D: Tensor | None = None
    root_B: Tensor | None = None

    @staticmethod
    def empty(batch_size: int, device: torch.device) -> PairCache:
        return PairCache(None, None, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def write(self, columns_BP: Tensor, keys_BGPC: Tensor, values_BGPC: Tensor) -> None:
        """Put new pairs in their columns, growing by blocks."""
        needed = int(columns_BP.max()) + 1
        if self.keys_BGSC is None or self.keys_BGSC.shape[2] < needed:
            self._grow(needed, keys_BGPC, values_BGPC)
        assert self.keys_BGSC is not None and self.values_BGSC is not None
        rows_B1 = torch.arange(len(columns_BP), device=columns_BP.device)[:, None]
        self.keys_BGSC[rows_B1, :, columns_BP] = keys_BGPC.transpose(1, 2)
        self.values_BGSC[rows_B1, :, columns_BP] = values_BGPC.transpose(1, 2)

    def filled(self, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.keys_BGSC is not None and self.values_BGSC is not None
        columns_S = torch.arange(columns, device=self.lengths_B.device)
        return self.keys_BGSC[:, :, :columns], self.values_BGSC[:, :, :columns], columns_S

    def keep(self, rows: Tensor) -> PairCache:
        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return PairCache(
            pick(self.keys_BGSC),
            pick(self.values_BGSC),
            self.lengths_B[rows],
            pick(self.output_B1D),
            pick(self.root_B),
        )

    def _grow(self, needed: int, keys_BGPC: Tensor, values_BGPC: Tensor) -> None:
        columns = -(-needed // GROW_COLUMNS) * GROW_COLUMNS
        for name, new in (("keys_BGSC", keys_BGPC), ("values_BGSC", values_BGPC)):
            batch, groups, _, channels = new.shape
            grown = new.new_zeros(batch, groups, columns, channels)
            old = self.keys_BGSC if name == "keys_BGSC" else self.values_BGSC
            if old is not None:
                grown[:, :, : old.shape[2]] = old
            object.__setattr__(self, name, grown)  # the storage grows, the state stays the same


class _DraftedNodes:
    """Keys of drafted nodes, in scratch columns behind the committed pairs of every row."""

    def __init__(self, state: PairCache, layout: AttentionLayout):
        self.state, self.layout = state, layout
        self.begin = int(state.lengths_B.max())
        self.ancestors_BFM: Tensor | None = None

    def attend(self, frontier: Frontier) -> Attend:
        return self._shared if self.layout == "kvshare" else self._appended(frontier)

    def _shared(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys_BGSC, values_BGSC, columns_S = self.state.filled(self.begin)
        mask_BS = columns_S < self.state.lengths_B[:, None]
        return grouped_attention(queries, keys_BGSC, values_BGSC, mask_BS[:, None, None])

    def _appended(self, frontier: Frontier) -> Attend:
        batch, nodes = frontier.tokens_BF.shape
        device = frontier.tokens_BF.device
        own_BFF = torch.eye(nodes, dtype=torch.bool, device=device).expand(batch, -1, -1)
        if self.ancestors_BFM is None:
            self.ancestors_BFM = own_BFF
        else:
            drafted = self.ancestors_BFM.shape[-1]
            parents_BFM = frontier.parents_BF[..., None].expand(-1, -1, drafted)
            inherited_BFM = self.ancestors_BFM.gather(1, parents_BFM)
            self.ancestors_BFM = torch.cat([inherited_BFM, own_BFF], -1)
        ancestors_BFM = self.ancestors_BFM

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            end = self.begin + ancestors_BFM.shape[-1]
            new_F = torch.arange(end - nodes, end, device=device)
            self.state.write(new_F.expand(batch, -1), keys, values)
            keys_BGSC, values_BGSC, columns_S = self.state.filled(end)
            committed_BS = columns_S[: self.begin] < self.state.lengths_B[:, None]
            committed_BFS = committed_BS[:, None].expand(-1, nodes, -1)
            mask_BFS = torch.cat([committed_BFS, ancestors_BFM], -1)
            return grouped_attention(queries, keys_BGSC, values_BGSC, mask_BFS[:, None])

        return attend
