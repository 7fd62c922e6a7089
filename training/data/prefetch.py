"""Batches made ready by a thread while the device computes.

Nothing depends on when a batch is made: its position decides what it holds, and the thread draws no
random numbers. On a GPU batches are in pinned memory, which the GPU fetches asynchronously.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from headstart.training.config.schema import Recipe

from .batching import Batch, Batches
from .conversations import Conversations, grouped_by_length
from .hidden_states import Features

Made = TypeVar("Made")


class Prefetcher:
    """One rank's batches: those of a run by position, and the held-out ones.

    Where hidden states are stored (`features`), every batch that goes to the device carries them,
    in training and in evaluation. Batches are made one step ahead, as they are small; stored
    hidden states are read one batch ahead. The thread starts with the first call and ends with
    `close`; its errors are raised by the call that asks for the batch.

    dtype: of stored hidden states on the device. whole: attach the global batch too.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Conversations,
        features: Features | None = None,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        whole: bool = False,
    ):
        self.data, self.features = data, features
        self.global_batch_tokens = recipe.data.global_batch_tokens
        self.accumulate = recipe.train.accumulate
        self.batches = Batches(data.train.lengths, self.global_batch_tokens, recipe.train.seed)
        self.rank, self.world_size, self.whole = rank, world_size, whole
        self.device, self.dtype, self.pin = device, dtype, device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "headstart-prefetch", initializer=self._start_thread)
        self._steps = _Ahead(self._make_step, self._pool)
        self._stored = _Ahead(self._read_stored, self._pool)

    def step(self, position: int, *, final: bool) -> list[Batch]:
        """Return this rank's part of each batch of a step, on the CPU.

        position: of the first one. final: no step follows, so none is made ahead.
        """
        return self._steps.at(position, None if final else position + self.accumulate)

    def on_device(
        self, batches: Sequence[Batch], position: int, *, final: bool
    ) -> Iterator[tuple[Batch, bool]]:
        """Yield the batches of a step on the device, each with whether it is the step's last."""
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            follows = None if final and last else position + index + 1
            yield self._to_device(batch, self._stored, position + index, follows), last

    def holdout(self) -> Iterator[Batch]:
        """Yield this rank's part of the held-out batches, on the device."""
        corpus = self.data.holdout
        groups = list(grouped_by_length(corpus, self.global_batch_tokens))
        batches = [corpus.batch(rows, self.rank, self.world_size) for rows in groups]
        if self.whole:
            batches = [
                replace(batch, whole=corpus.batch(rows))
                for batch, rows in zip(batches, groups, strict=True)
            ]
        stored = _Ahead(lambda place: self._read(batches[place]), self._pool)
        places: list[int | None] = [*range(len(batches)), None]
        for place, follows in pairwise(places):
            assert place is not None
            yield self._to_device(batches[place], stored, place, follows)

    def close(self) -> None:
        """End the thread once it has made what it is making."""
        self._pool.shutdown(cancel_futures=True)

    def _make_step(self, position: int) -> list[Batch]:
        positions = range(position, position + self.accumulate)
        batches = [self._make(place) for place in positions]
        return [batch.pinned() for batch in batches] if self.pin else batches

    def _make(self, position: int) -> Batch:
        rows, corpus = self.batches.at(position), self.data.train
        batch = corpus.batch(rows, self.rank, self.world_size)
        return replace(batch, whole=corpus.batch(rows)) if self.whole else batch

    def _read_stored(self, position: int) -> Tensor:
        return self._read(self._make(position))

    def _read(self, batch: Batch) -> Tensor:
        assert self.features is not None
        return self.features.read(batch, self.dtype, pinned=self.pin)

    def _to_device(
        self, batch: Batch, stored: _Ahead[Tensor], place: int, follows: int | None
    ) -> Batch:
        if self.features is not None:
            batch = replace(batch, stored_LBTD=stored.at(place, follows))
        return batch.to(self.device)

    def _start_thread(self) -> None:
        """Set up the thread: pinned memory belongs to its GPU, which a thread chooses anew, and a
        pool of its own would take cores from the main thread's (a fifth of the speed of two)."""
        torch.set_num_threads(1)
        if self.pin:
            torch.cuda.set_device(self.device)


class _Ahead(Generic[Made]):
    """The results of `make(place)`, with the next one made in the meantime."""

    def __init__(self, make: Callable[[int], Made], pool: ThreadPoolExecutor):
        self.make, self.pool = make, pool
        self._next: tuple[int, Future[Made]] | None = None

    def at(self, place: int, follows: int | None) -> Made:
        """Return the result for a place. follows: the place asked for next, if any."""
        ready, self._next = self._next, None
        if ready is None or ready[0] != place:
            ready = place, self.pool.submit(self.make, place)
        made = ready[1].result()
        if follows is not None:
            self._next = follows, self.pool.submit(self.make, follows)
        return made
