"""Conversations as batches: which rows, in which order, with which tokens to be predicted.

The order follows from (seed, epoch) alone and the position in the data is one integer, so a run can
go on where it stopped. Several processes share every batch by rows, so they see together what one
process would see.

Legend: B batch rows, T positions, M conversations of a row, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

POOL_BATCHES = 64  # rows of similar length are looked for among this many batches
Rows: TypeAlias = "list[list[int]]"  # the conversations of each row of a batch
MIN_TOKENS = 3  # step 0 learns x[t + 2]: shorter rows teach nothing


@dataclass(frozen=True)
class Batch:
    """tokens_BT, padded on the right behind lengths_B; loss_mask_BT: x[t] is to be predicted.

    rows_BM: which conversations a row holds, on the CPU, filled up with -1 (held-out ones are
    counted behind the others). starts_BT: where in its row the conversation of each position
    begins, if rows hold several; padding is one of its own.
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    loss_mask_BT: Tensor
    rows_BM: Tensor | None = None
    starts_BT: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda values: values.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Where a GPU can fetch it beside its other work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tokens_BT, lengths_B = change(self.tokens_BT), change(self.lengths_B)
        starts_BT = None if self.starts_BT is None else change(self.starts_BT)
        return Batch(tokens_BT, lengths_B, change(self.loss_mask_BT), self.rows_BM, starts_BT)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def part(self, index: int, count: int) -> Batch:
        """The rows of one of `count` processes.

        A process without a row gets one that teaches nothing: it has to take part in every
        exchange between the processes all the same.
        """
        rows, columns = self.share(index, count)
        rows_BM = None if self.rows_BM is None else self.rows_BM[rows]
        starts_BT = None if self.starts_BT is None else self.starts_BT[rows, columns]
        lengths_B, mask_BT = self.lengths_B[rows], self.loss_mask_BT[rows, columns]
        if index >= len(self.lengths_B):
            lengths_B, mask_BT = lengths_B.clamp(max=MIN_TOKENS), torch.zeros_like(mask_BT)
        return Batch(self.tokens_BT[rows, columns], lengths_B, mask_BT, rows_BM, starts_BT)

    def share(self, index: int, count: int) -> tuple[slice, slice]:
        """Which rows and columns the `part` of a process is."""
        if index >= len(self.lengths_B):
            return slice(0, 1), slice(0, MIN_TOKENS)
        return slice(index, None, count), slice(None)


def padded_length(length: int, longest: int) -> int:
    """Columns of a batch whose longest row has `length` tokens; `longest`: that of all the data.

    Rounded up by at most an eighth, so that few shapes occur: matrix libraries and allocators keep
    memory for every new one (on a CPU, gigabytes in an hour).
    """
    step = 1 << max(0, length.bit_length() - 4)
    return min(-(-length // step) * step, longest)


class Corpus:
    """All conversations in memory, one behind the other: 5 bytes per token.

    first: the number of the first one, where several corpora are counted through.
    """

    def __init__(
        self, rows: Iterable[tuple[Sequence[int], Sequence[tuple[int, int]]]], first: int = 0
    ):
        self.first = first
        tokens: list[Tensor] = []
        masks: list[Tensor] = []
        for row, spans in rows:
            mask_T = torch.zeros(len(row), dtype=torch.bool)
            for start, end in spans:
                mask_T[start:end] = True
            tokens.append(torch.tensor(row, dtype=torch.int32))
            masks.append(mask_T)
        empty = torch.zeros(0, dtype=torch.int32)
        self.tokens = torch.cat([empty, *tokens])
        self.trained = torch.cat([empty.bool(), *masks])
        self.lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.longest = int(self.lengths.max()) if tokens else 0

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some conversations as one batch, each in a row of its own, on the CPU."""
        columns = padded_length(int(self.lengths[list(rows)].max()), self.longest)
        return replace(self.packed([[row] for row in rows], columns), starts_BT=None)

    def packed(self, rows: Sequence[Sequence[int]], columns: int) -> Batch:
        """As `batch`, with rows of several conversations, one behind the other."""
        shape = (len(rows), columns)
        tokens_BT = torch.zeros(shape, dtype=torch.int64)
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        starts_BT = torch.zeros(shape, dtype=torch.int64)
        rows_BM = torch.full((len(rows), max(map(len, rows))), -1)
        lengths_B = torch.zeros(len(rows), dtype=torch.int64)
        for place, together in enumerate(rows):
            at = 0
            for number, row in enumerate(together):
                start, length = int(self.starts[row]), int(self.lengths[row])
                tokens_BT[place, at : at + length] = self.tokens[start : start + length]
                mask_BT[place, at : at + length] = self.trained[start : start + length]
                starts_BT[place, at:] = at
                rows_BM[place, number] = self.first + row
                at += length
            starts_BT[place, at:] = at
            lengths_B[place] = at
        return Batch(tokens_BT, lengths_B, mask_BT, rows_BM, starts_BT)

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token is to be predicted (V)."""
        return torch.bincount(self.tokens[self.trained].long(), minlength=vocab_size)


def frequent_tokens(counts_V: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens, ascending ids; among equals the smaller id."""
    if size > len(counts_V):
        raise ValueError(
            f"head.draft_vocab is {size}, more than the {len(counts_V)} tokens of the target's "
            "vocabulary. Lower it, or leave it out for the whole vocabulary."
        )
    return counts_V.sort(descending=True, stable=True).indices[:size].sort().values


class Batches:
    """Conversations grouped by length under a token budget, in an order that (seed, epoch) decides.

    A batch never holds more than `batch_tokens` tokens, padding included. pack: instead of being
    grouped, they share rows as long as the longest one.
    """

    def __init__(self, lengths: Tensor, batch_tokens: int, seed: int, *, pack: bool = False):
        self.longest = int(lengths.max())
        assert self.longest <= batch_tokens
        self.lengths = lengths
        self.batch_tokens, self.seed, self.pack = batch_tokens, seed, pack
        self._plans: dict[int, list[Rows]] = {}
        self._sizes: list[int] = []  # batches per epoch

    def count(self, epochs: int) -> int:
        """Batches in the first epochs."""
        while len(self._sizes) < epochs:
            self._sizes.append(len(self._plan(len(self._sizes))))
        return sum(self._sizes[:epochs])

    def at(self, position: int) -> list[int]:
        """The conversations of a batch. Positions run on through the epochs."""
        return [one for row in self._rows(position) for one in row]

    def batch(self, corpus: Corpus, position: int) -> Batch:
        """Made of the corpus whose lengths these are, on the CPU."""
        if not self.pack:
            return corpus.batch(self.at(position))
        return corpus.packed(self._rows(position), self.longest)

    def _rows(self, position: int) -> Rows:
        epoch = 0
        while position >= self.count(epoch + 1):
            epoch += 1
        return self._plan(epoch)[position - self.count(epoch)]

    def _plan(self, epoch: int) -> list[Rows]:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._planned(epoch)
            self._plans = {epoch: plan}  # one epoch at a time is in memory
        return plan

    def _planned(self, epoch: int) -> list[Rows]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        mean = float(self.lengths.float().mean())
        pool_rows = max(1, int(POOL_BATCHES * self.batch_tokens / mean))
        batches: list[Rows] = []
        for pool in order.split(pool_rows):
            by_length = pool[self.lengths[pool].sort(stable=True).indices].tolist()
            batches += self._packed(by_length, generator) if self.pack else self._grouped(by_length)
        return _shuffled(batches, generator)

    def _grouped(self, by_length: list[int]) -> list[Rows]:
        """One conversation a row, as many rows per batch as fit."""
        batches: list[Rows] = [[]]
        for row in by_length:
            columns = padded_length(int(self.lengths[row]), self.longest)
            if (len(batches[-1]) + 1) * columns > self.batch_tokens:
                batches.append([])
            batches[-1].append([row])
        return [batch for batch in batches if batch]

    def _packed(self, by_length: list[int], generator: torch.Generator) -> list[Rows]:
        """Longest first, each into the fullest row that has room for it (best fit decreasing)."""
        rows: Rows = []
        room: list[tuple[int, int]] = []  # of each row, least first
        for one in reversed(by_length):
            length = int(self.lengths[one])
            place = bisect_left(room, (length, 0))
            if place < len(room):
                left, row = room.pop(place)
            else:
                left, row = self.longest, len(rows)
                rows.append([])
            rows[row].append(one)
            insort(room, (left - length, row))
        rows, size = _shuffled(rows, generator), self.batch_tokens // self.longest
        return [rows[at : at + size] for at in range(0, len(rows), size)]


def _shuffled(values: list[Any], generator: torch.Generator) -> list[Any]:
    return [values[place] for place in torch.randperm(len(values), generator=generator).tolist()]
