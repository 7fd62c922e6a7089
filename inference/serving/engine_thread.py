"""The thread that owns the model, and the requests that wait for it.

Requests are answered one at a time, in the order in which they came. Whoever asks is told of every
piece from this thread, through `Job.tell`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Thread

import torch

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.detokenizer import TextStream
from headstart.inference.generate import SpeculativeModel

from .openai_api import ApiError, Reason, Usage
from .prometheus import Metrics

MEMORY = 0.8  # of what an answer tells about the seconds that one takes, per answer
PATIENCE = 10.0  # seconds
LEFT = 499  # nginx's status for a client that has gone; nobody reads it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What to answer, and how. seed None: a new one."""

    tokens: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Text that the latest pass added, perhaps none."""

    text: str


@dataclass(frozen=True)
class Done:
    reason: Reason
    usage: Usage


Event = Piece | Done | ApiError


class Job:
    """One request on its way. tell: is given its events, from any thread; `Done` or an error is
    the last one that counts. cancelled: nobody wants the answer any more. ended: it was told so."""

    def __init__(self, order: Order, tell: Callable[[Event], None]):
        self.order, self._tell = order, tell
        self.cancelled = self.ended = False
        self.since = time.perf_counter()

    def tell(self, event: Event) -> None:
        self.ended = self.ended or not isinstance(event, Piece)
        try:
            self._tell(event)
        except RuntimeError:  # the server's loop was closed
            self.cancelled = True


class Worker:
    """Answers jobs with a model in a thread of its own. guesses: how it guesses; None: not at all.

    places: how many jobs may wait.
    """

    def __init__(self, model: SpeculativeModel, candidates: SpeculativeConfig | None, places: int):
        self.model, self.candidates, self.places = model, candidates, places
        self.metrics = Metrics(lambda: len(self._waiting), lambda: int(self._job is not None))
        self.draining = False
        self._waiting: deque[Job] = deque()
        self._job: Job | None = None
        self._closed = False
        self._seconds = 1.0  # that an answer takes, by the last ones
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._job is None and not self._waiting

    def check(self) -> None:
        """ApiError when no job can be taken now."""
        if self.draining:
            raise _leaving()
        if len(self._waiting) >= self.places:
            raise ApiError(
                429,
                f"{len(self._waiting)} requests are waiting already, and no more may. Try again "
                "later.",
                code="queue_full",
                retry_after=max(1, round(self._seconds)),
            )

    def submit(self, job: Job) -> None:
        """Put a job into the queue. ApiError when it cannot be taken now."""
        with self._changed:
            self.check()
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job: it leaves the queue now, or ends after the pass that is being made."""
        with self._changed:
            if job.ended:
                return
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
        self.metrics.disconnects.inc()
        job.tell(ApiError(LEFT, "The client has gone."))

    def drain(self) -> None:
        """Take no more jobs, and send those away that wait. The one that runs goes on."""
        with self._changed:
            self.draining = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for job in waiting:
            job.tell(_leaving())

    def stop(self) -> None:
        """End the thread after the pass that is being made, without waiting for it."""
        self.drain()
        with self._changed:
            self._closed = True
            job = self._job
            self._changed.notify()
        if job is not None:
            job.cancelled = True
            job.tell(_leaving())

    def close(self) -> None:
        """End the thread. A pass that takes very long ends with the process."""
        self.stop()
        if self.alive:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        while self._answer_next():
            pass

    def _answer_next(self) -> bool:
        """False at the end."""
        job = self._next()
        if job is None:
            return False
        try:
            self._answer(job)
        except ApiError as error:
            job.tell(error)
        except Exception:
            log.exception("A request could not be answered")
            job.tell(ApiError(500, "The server could not answer; its log says why."))
        finally:
            self._job = None
        return True

    def _next(self) -> Job | None:
        """The next job; None when there will be none."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            self._job = None if self._closed else self._waiting.popleft()
            return self._job

    def _answer(self, job: Job) -> None:
        began = time.perf_counter()
        order, usage = job.order, Usage(len(job.order.tokens))
        text = TextStream(self.model.target, order.stop)
        steps = self._steps(order)
        stats = self.model.last_stats
        last = -1
        for tokens in steps:
            if not text.count:
                self.metrics.first.observe(time.perf_counter() - job.since)
            before = text.count
            if piece := text.add(tokens):
                job.tell(Piece(piece))
            # A pass gives the guesses that were right, then the target's own token. Behind a stop
            # string both are left out.
            right = sum(stats.accepted) - usage.accepted
            usage.accepted += min(right, text.count - before)
            last = tokens[-1]
            if text.stopped or job.cancelled:
                break
        usage.completion, usage.rejected = text.count, stats.drafted - usage.accepted
        seconds = time.perf_counter() - began
        self._seconds = MEMORY * self._seconds + (1 - MEMORY) * seconds
        self.metrics.answered(usage, stats.rounds, seconds)
        if job.cancelled:
            return
        if piece := text.end():
            job.tell(Piece(piece))
        whole = text.count == order.max_tokens and not text.stopped
        ended = not whole or last in self.model.target.eos_ids
        job.tell(Done("stop" if ended else "length", usage))

    def _steps(self, order: Order) -> Iterator[list[int]]:
        """ApiError for what `generate` refuses."""
        try:
            sampling = SamplingParams(
                order.max_tokens,
                order.temperature,
                top_p=order.top_p,
                seed=secrets.randbits(62) if order.seed is None else order.seed,
            )
            return self.model.stream(
                torch.tensor([order.tokens]),
                speculative=self.candidates or SpeculativeConfig(),
                **sampling.generate_options(),
            )
        except ValueError as wrong:
            raise ApiError(400, str(wrong)) from wrong


def _leaving() -> ApiError:
    return ApiError(
        503, "The server is about to end. Ask another one.", code="shutting_down", retry_after=5
    )
