"""Global batches of conversations, and each rank's part of them.

The order follows from (seed, epoch) alone and the position in the data is one integer, so that a
run can resume anywhere. Ranks share every global batch by sequences: what is learned does not
depend on how many there are.

Legend: B sequences, T positions, L stored layers, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

POOL_BATCHES = 64  # sequences are sorted by length within pools of this many batches
MIN_TOKENS = 3  # step 0 learns x[t + 2]: shorter rows teach nothing


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right.

    tokens_BT: token ids. lengths_B: sequence lengths. loss_mask_BT: whether token t is a label.
    rows_B: index of each conversation, on the CPU; held-out ones follow the training ones.
    stored_LBTD: the target's hidden states, where they come from disk; the LM head's input last.
    whole: the global batch that this is one rank's part of, for targets that need all of it.
    filler: whether it stands for no sequences, on a rank without a part.
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    loss_mask_BT: Tensor
    rows_B: Tensor | None = None
    stored_LBTD: Tensor | None = None
    whole: Batch | None = None
    filler: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens to train on, padding excluded."""
        return 0 if self.filler else int(self.lengths_B.sum())

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda values: values.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return a copy in pinned memory, which a GPU fetches asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        stored_LBTD = None if self.stored_LBTD is None else change(self.stored_LBTD)
        return replace(
            self,
            tokens_BT=change(self.tokens_BT),
            lengths_B=change(self.lengths_B),
            loss_mask_BT=change(self.loss_mask_BT),
            stored_LBTD=stored_LBTD,
            whole=None if self.whole is None else self.whole._map(change),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, to save them."""
        named = vars(self).items()
        return {name: value for name, value in named if isinstance(value, Tensor)}


def rank_slices(size: int, rank: int, world_size: int) -> tuple[slice, slice]:
    """Return the sequences and positions of a global batch of `size` that a rank trains on.

    A rank without a sequence gets a few tokens that teach nothing: it has to take part in every
    collective operation all the same.
    """
    if rank >= size:
        return slice(0, 1), slice(0, MIN_TOKENS)
    return slice(rank, None, world_size), slice(None)


def padded_length(length: int, longest: int) -> int:
    """Return the width of a batch whose longest sequence has `length` tokens.

    Rounded up by at most an eighth, and to `longest` (of all the data) at most: matrix libraries
    and allocators keep memory for every new shape (on a CPU, gigabytes in an hour).
    """
    step = 1 << max(0, length.bit_length() - 4)
    return min(-(-length // step) * step, longest)


class Corpus:
    """All conversations in memory, concatenated: 5 bytes per token.

    first: index of the first conversation, where several corpora share one numbering.
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

    def batch(self, rows: Sequence[int], rank: int = 0, world_size: int = 1) -> Batch:
        """Return one rank's part of the global batch of these conversations, on the CPU.

        It is as wide as the global batch, whose other sequences are not built.
        """
        width = padded_length(int(self.lengths[list(rows)].max()), self.longest)
        own, columns = rank_slices(len(rows), rank, world_size)
        if rank < len(rows):
            return self._batch(rows[own], width)
        batch = self._batch(rows[own], width)
        return replace(
            batch,
            tokens_BT=batch.tokens_BT[:, columns],
            lengths_B=batch.lengths_B.clamp(max=MIN_TOKENS),
            loss_mask_BT=torch.zeros_like(batch.loss_mask_BT[:, columns]),
            filler=True,
        )

    def _batch(self, rows: Sequence[int], width: int) -> Batch:
        lengths_B = self.lengths[list(rows)]
        tokens_BT = torch.zeros((len(rows), width), dtype=torch.int64)
        mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
        for place, row in enumerate(rows):
            start, length = int(self.starts[row]), int(self.lengths[row])
            tokens_BT[place, :length] = self.tokens[start : start + length]
            mask_BT[place, :length] = self.trained[start : start + length]
        rows_B = torch.tensor([self.first + row for row in rows])
        return Batch(tokens_BT, lengths_B, mask_BT, rows_B)

    def sha256(self) -> str:
        """Return the hash of all tokens and labels."""
        digest = hashlib.sha256()
        for values in (self.lengths, self.tokens, self.trained):
            digest.update(values.numpy().data)
        return digest.hexdigest()

    def token_counts(self, vocab_size: int) -> Tensor:
        """Return how often each token is a label (V)."""
        return torch.bincount(self.tokens[self.trained].long(), minlength=vocab_size)


def frequent_tokens(counts_V: Tensor, size: int) -> Tensor:
    """Return the `size` most frequent token ids, ascending; of ties the smaller id."""
    if size > len(counts_V):
        raise ValueError(
            f"head.draft_vocab is {size}, more than the {len(counts_V)} tokens of the target's "
            "vocabulary. Lower it, or leave it out for the whole vocabulary."
        )
    return counts_V.sort(descending=True, stable=True).indices[:size].sort().values


class Batches:
    """Which conversations each global batch holds: grouped by length, shuffled by (seed, epoch).

    A batch never exceeds `global_batch_tokens`, padding included.
    """

    def __init__(self, lengths: Tensor, global_batch_tokens: int, seed: int):
        self.longest = int(lengths.max())
        assert self.longest <= global_batch_tokens
        self.lengths = lengths
        self.global_batch_tokens, self.seed = global_batch_tokens, seed
        self._plans: dict[int, list[list[int]]] = {}
        self._sizes: list[int] = []  # batches per epoch

    def count(self, epochs: int) -> int:
        """Return the number of batches in the first epochs."""
        while len(self._sizes) < epochs:
            self._sizes.append(len(self._plan(len(self._sizes))))
        return sum(self._sizes[:epochs])

    def at(self, position: int) -> list[int]:
        """Return the conversations of a batch. Positions continue through the epochs."""
        epoch = 0
        while position >= self.count(epoch + 1):
            epoch += 1
        return self._plan(epoch)[position - self.count(epoch)]

    def _plan(self, epoch: int) -> list[list[int]]:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = self._planned(epoch)
            self._plans = {epoch: plan}  # keep one epoch in memory
        return plan

    def _planned(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        mean = float(self.lengths.float().mean())
        pool_rows = max(1, int(POOL_BATCHES * self.global_batch_tokens / mean))
        batches: list[list[int]] = []
        for pool in order.split(pool_rows):
            by_length = pool[self.lengths[pool].sort(stable=True).indices].tolist()
            batches += self._grouped(by_length)
        order = torch.randperm(len(batches), generator=generator)
        return [batches[place] for place in order.tolist()]

    def _grouped(self, by_length: list[int]) -> list[list[int]]:
        """Fill each batch with as many conversations as fit."""
        batches: list[list[int]] = [[]]
        for row in by_length:
            columns = padded_length(int(self.lengths[row]), self.longest)
            if (len(batches[-1]) + 1) * columns > self.global_batch_tokens:
                batches.append([])
            batches[-1].append(row)
        return [batch for batch in batches if batch]
