"""What the coming step learns from, made by a thread while the device works on the present one.

Nothing depends on when it is made: the place in the data says what it is, and the thread draws no
random numbers. On a GPU it lies in pinned memory, which the GPU fetches beside its other work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from headstart.model.target.output import TargetOutput
from headstart.training.config.schema import Recipe
from headstart.training.distributed.process_group import WorkerGroup

from .batching import Batch, Batches, Corpus
from .hidden_states import Features

Made = TypeVar("Made")


class Prefetcher:
    """The batches of a run, and what is stored of them (features), if anything is.

    Batches are made one step ahead, as they are small; stored values one batch ahead. The thread
    starts with the first call and ends with `close`. What fails in it is raised by the call that
    asks for it.
    """

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        features: Features | None,
        team: WorkerGroup,
        dtype: torch.dtype,
    ):
        """dtype: of stored values on the device."""
        data, self.accumulate = recipe.data, recipe.train.accumulate
        self.batches = Batches(corpus.lengths, data.batch_tokens, recipe.train.seed)
        self.corpus, self.features, self.team = corpus, features, team
        self.dtype, self.device = dtype, team.device
        self.pins = self.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "headstart-feed", initializer=self._settle)
        self._steps = _Ahead(self._step, self._pool)
        self._stored = _Ahead(self._load, self._pool)

    def step(self, position: int, *, final: bool) -> list[tuple[Batch, Batch]]:
        """The batches from a position on: whole on the CPU, and our rows on the device.

        final: no step follows.
        """
        then = None if final else position + self.accumulate
        pairs = self._steps.at(position, then)
        return [(whole, ours.to(self.device)) for whole, ours in pairs]

    def seen(self, position: int, *, final: bool) -> TargetOutput | None:
        """What is stored of our rows of a batch, on the device. final: no batch follows."""
        if self.features is None:
            return None
        stored_LBTD = self._stored.at(position, None if final else position + 1)
        return self.features.seen(stored_LBTD, self.device)

    def close(self) -> None:
        """Waits for what is being made."""
        self._pool.shutdown(cancel_futures=True)

    def _step(self, position: int) -> list[tuple[Batch, Batch]]:
        places = range(position, position + self.accumulate)
        whole = [self._whole(place) for place in places]
        parts = [self._part(batch) for batch in whole]
        if self.pins:
            parts = [part.pinned() for part in parts]
        return list(zip(whole, parts, strict=True))

    def _load(self, position: int) -> Tensor:
        assert self.features is not None
        return self.features.load(self._part(self._whole(position)), self.dtype, pinned=self.pins)

    def _whole(self, position: int) -> Batch:
        return self.corpus.batch(self.batches.at(position))

    def _part(self, batch: Batch) -> Batch:
        return batch.part(self.team.index, self.team.count)

    def _settle(self) -> None:
        """In the new thread, which chooses its GPU anew, to which pinned memory belongs; and whose
        own pool of threads would take cores from the main one's (a fifth of the speed of two)."""
        torch.set_num_threads(1)
        if self.pins:
            torch.cuda.set_device(self.device)


class _Ahead(Generic[Made]):
    """The results of `make(place)`; the next one is made meanwhile."""

    def __init__(self, make: Callable[[int], Made], pool: ThreadPoolExecutor):
        self.make, self.pool = make, pool
        self._next: tuple[int, Future[Made]] | None = None

    def at(self, place: int, then: int | None) -> Made:
        """then: the place that is asked for next, if any."""
        ready, self._next = self._next, None
        if ready is None or ready[0] != place:
            ready = place, self.pool.submit(self.make, place)
        made = ready[1].result()
        if then is not None:
            self._next = then, self.pool.submit(self.make, then)
        return made
