"""Conversations as batches: which rows, in which order, with which tokens to be predicted.

The order follows from (seed, epoch) alone and the position in the data is one integer, so a run can
go on where it stopped. Several processes share every batch by rows, so they see together what one
process would see.

Legend: B batch rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POOL_BATCHES = 64  # rows of similar length are looked for among this many batches
MIN_TOKENS = 3  # step 0 learns x[t + 2]: shorter rows teach nothing


@dataclass(frozen=True)
class Batch:
    """tokens_BT, padded on the right behind lengths_B; loss_mask_BT: x[t] is to be predicted.

    rows_B: which conversation each row is, on the CPU (held-out ones are counted behind the
    others).
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    loss_mask_BT: Tensor
    rows_B: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda values: values.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Where a GPU can fetch it beside its other work."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tokens_BT, lengths_B = change(self.tokens_BT), change(self.lengths_B)
        return Batch(tokens_BT, lengths_B, change(self.loss_mask_BT), self.rows_B)

    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def part(self, index: int, count: int) -> Batch:
        """The rows of one of `count` processes.

        A process without a row gets one that teaches nothing: it has to take part in every
        exchange between the processes all the same.
        """
        rows, columns = self.share(index, count)
        rows_B = None if self.rows_B is None else self.rows_B[rows]
        lengths_B, mask_BT = self.lengths_B[rows], self.loss_mask_BT[rows, columns]
        if index >= len(self.lengths_B):
            lengths_B, mask_BT = lengths_B.clamp(max=MIN_TOKENS), torch.zeros_like(mask_BT)
        return Batch(self.tokens_BT[rows, columns], lengths_B, mask_BT, rows_B)

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
        lengths_B = self.lengths[list(rows)]
        shape = (len(rows), padded_length(int(lengths_B.max()), self.longest))
        tokens_BT = torch.zeros(shape, dtype=torch.int64)
        mask_BT = torch.zeros(shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            start, length = int(self.starts[row]), int(self.lengths[row])
            tokens_BT[place, :length] = self.tokens[start : start + length]
            mask_BT[place, :length] = self.trained[start : start + length]
        rows_B = torch.tensor([self.first + row for row in rows])
        return Batch(tokens_BT, lengths_B, mask_BT, rows_B)

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

    A batch never holds more than `batch_tokens` tokens, padding included.
    """

    def __init__(self, lengths: Tensor, batch_tokens: int, seed: int):
        self.longest = int(lengths.max())
        assert self.longest <= batch_tokens
        self.lengths = lengths
        self.batch_tokens, self.seed = batch_tokens, seed
        self._plans: dict[int, list[list[int]]] = {}
        self._sizes: list[int] = []  # batches per epoch

    def count(self, epochs: int) -> int:
        """Batches in the first epochs."""
        while len(self._sizes) < epochs:
            self._sizes.append(len(self._plan(len(self._sizes))))
        return sum(self._sizes[:epochs])

    def at(self, position: int) -> list[int]:
        """The conversations of a batch. Positions run on through the epochs."""
        epoch = 0
        while position >= self.count(epoch + 1):
            epoch += 1
        return self._plan(epoch)[position - self.count(epoch)]

    def _plan(self, epoch: int) -> list[list[int]]:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._planned(epoch)
            self._plans = {epoch: plan}  # one epoch at a time is in memory
        return plan

    def _planned(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        mean = float(self.lengths.float().mean())
        pool_rows = max(1, int(POOL_BATCHES * self.batch_tokens / mean))
        batches: list[list[int]] = []
        for pool in order.split(pool_rows):
            by_length = pool[self.lengths[pool].sort(stable=True).indices].tolist()
            batches += self._grouped(by_length)
        order = torch.randperm(len(batches), generator=generator)
        return [batches[place] for place in order.tolist()]

    def _grouped(self, by_length: list[int]) -> list[list[int]]:
        """As many conversations per batch as fit."""
        batches: list[list[int]] = [[]]
        for row in by_length:
            columns = padded_length(int(self.lengths[row]), self.longest)
            if (len(batches[-1]) + 1) * columns > self.batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return [batch for batch in batches if batch]
