"""The thread that owns the model, and the queue of requests in front of it.

Requests are served one at a time, first come first served. The thread reports every event of a
request through `Request.publish`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Condition, Thread

import torch

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.detokenizer import TextStream
from headstart.inference.generate import SpeculativeModel

from .openai_api import ApiError, FinishReason, Usage
from .prometheus import Metrics

LATENCY_DECAY = 0.8  # weight of earlier requests in the moving average of seconds per request
JOIN_TIMEOUT = 10.0  # seconds
CLIENT_CLOSED_REQUEST = 499  # nginx's status; the client that would read it is gone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RequestParams:
    """What to generate. stop: strings that end the response."""

    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]


@dataclass(frozen=True)
class TextDelta:
    """Text that the latest decode step added; it may be empty."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of a request that succeeded."""

    reason: FinishReason
    usage: Usage


Event = TextDelta | Finished | ApiError


class Request:
    """One request in flight.

    on_event: receives its events, from any thread. The first `Finished` or `ApiError` is the last
        event that counts.
    cancelled: the client no longer wants a response.
    finished: the last event was published.
    """

    def __init__(self, params: RequestParams, on_event: Callable[[Event], None]):
        self.params, self._on_event = params, on_event
        self.cancelled = self.finished = False
        self.arrival_time = time.perf_counter()

    def publish(self, event: Event) -> None:
        self.finished = self.finished or not isinstance(event, TextDelta)
        try:
            self._on_event(event)
        except RuntimeError:  # the server's event loop was closed
            self.cancelled = True


class EngineThread:
    """Serves requests with a model in a thread of its own.

    speculative: where drafts come from.
    max_queued: maximum number of requests that wait; one more is refused.
    """

    def __init__(self, model: SpeculativeModel, speculative: SpeculativeConfig, max_queued: int):
        self.model, self.speculative, self.max_queued = model, speculative, max_queued
        self.metrics = Metrics(
            num_waiting=lambda: len(self._waiting),
            num_running=lambda: int(self._running is not None),
        )
        self.draining = False
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._closed = False
        self._mean_seconds = 1.0  # per request, a moving average
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle(self) -> bool:
        with self._changed:
            return self._running is None and not self._waiting

    def check_capacity(self) -> None:
        """Raise ApiError if no request can be accepted now."""
        if self.draining:
            raise _shutting_down()
        if len(self._waiting) >= self.max_queued:
            raise ApiError(
                429,
                f"The queue is full: {len(self._waiting)} requests are waiting. Try again later.",
                code="queue_full",
                retry_after=max(1, round(self._mean_seconds)),
            )

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ApiError if it cannot be accepted now."""
        with self._changed:
            self.check_capacity()
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Remove a request from the queue, or end it after the current decode step."""
        with self._changed:
            if request.finished:
                return
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
        self.metrics.client_disconnects.inc()
        request.publish(ApiError(CLIENT_CLOSED_REQUEST, "The client closed the connection."))

    def drain(self) -> None:
        """Refuse new and waiting requests; the running one continues."""
        with self._changed:
            self.draining = True
            waiting = list(self._waiting)
            self._waiting.clear()
        for request in waiting:
            request.publish(_shutting_down())

    def stop(self) -> None:
        """End the thread after the current decode step, without waiting for it."""
        self.drain()
        with self._changed:
            self._closed = True
            request = self._running
            self._changed.notify()
        if request is not None:
            request.cancelled = True
            request.publish(_shutting_down())

    def close(self) -> None:
        """End the thread. A decode step longer than `JOIN_TIMEOUT` ends with the process."""
        self.stop()
        if self.alive:
            self._thread.join(JOIN_TIMEOUT)

    def _run(self) -> None:
        while self._serve_next():
            pass

    def _serve_next(self) -> bool:
        """Serve one request; False once the thread is to end."""
        request = self._next()
        if request is None:
            return False
        try:
            self._serve(request)
        except ApiError as error:
            request.publish(error)
        except Exception:
            log.exception("A request failed")
            request.publish(ApiError(500, "Internal error; see the server's log."))
        finally:
            self._running = None
        return True

    def _next(self) -> Request | None:
        """Wait for the next request; None once the thread is to end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            self._running = None if self._closed else self._waiting.popleft()
            return self._running

    def _serve(self, request: Request) -> None:
        started = time.perf_counter()
        params, usage = request.params, Usage(len(request.params.prompt_token_ids))
        text = TextStream(self.model.target, params.stop)
        steps = self._decode(params)
        stats = self.model.last_stats
        last_token = -1
        for tokens in steps:
            if not text.count:
                self.metrics.time_to_first_token.observe(time.perf_counter() - request.arrival_time)
            count_before = text.count
            if delta := text.add(tokens):
                request.publish(TextDelta(delta))
            # A step emits the accepted draft tokens, then the target's own token. Tokens behind a
            # stop string are not part of the response and count as neither.
            accepted = stats.num_accepted_tokens - usage.accepted
            usage.accepted += min(accepted, text.count - count_before)
            last_token = tokens[-1]
            if text.stopped or request.cancelled:
                break
        usage.completion, usage.rejected = text.count, stats.num_draft_tokens - usage.accepted
        seconds = time.perf_counter() - started
        self._mean_seconds = LATENCY_DECAY * self._mean_seconds + (1 - LATENCY_DECAY) * seconds
        self.metrics.observe_request(usage, stats.num_steps, seconds)
        if request.cancelled:
            return
        if delta := text.end():
            request.publish(TextDelta(delta))
        at_limit = text.count == params.sampling.max_new_tokens and not text.stopped
        stopped = not at_limit or last_token in self.model.target.eos_ids
        request.publish(Finished("stop" if stopped else "length", usage))

    def _decode(self, params: RequestParams) -> Iterator[list[int]]:
        """The tokens of each decode step. Raises ApiError for what `generate` refuses."""
        try:
            return self.model.stream(
                torch.tensor([params.prompt_token_ids]),
                speculative=self.speculative,
                **params.sampling.generate_options(),
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from error


def _shutting_down() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down. Send the request to another one.",
        code="shutting_down",
        retry_after=5,
    )
