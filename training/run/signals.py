"""Stop a run between two optimizer steps: a half-updated head must not be saved."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

SAME_SECONDS = 0.5


class Interrupted(KeyboardInterrupt):
    """Training was stopped and saved; the message tells how to resume it."""


class Abandoned(BaseException):
    """An evaluation was cut short. It changes nothing, so it need not be finished."""


class StopRequest:
    """While entered, SIGINT and SIGTERM only set `requested`. A second SIGINT stops at once.

    A second SIGTERM does not: where a cluster stops a job, the process gets one from the cluster
    and one from its launcher. For the same reason two signals within SAME_SECONDS count as one.

    describe_saved: returns what is saved, for the message of a run that is stopped at once.
    announce: write a line to stderr at the first request.
    """

    def __init__(self, describe_saved: Callable[[], str], *, announce: bool = True) -> None:
        self.requested = False
        self.describe_saved, self.announce = describe_saved, announce
        self._abandon = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python's rule for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Raise `Abandoned` at the first request while entered, for work that changes nothing."""
        if self.requested:
            raise Abandoned
        self._abandon = True
        try:
            yield
        finally:
            self._abandon = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if number == signal.SIGINT and now - self._since > SAME_SECONDS:
                raise Interrupted(f"Stopped at once. {self.describe_saved()}")
            return
        self.requested, self._since = True, now
        if self.announce:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping after this step; Ctrl-C again to stop at once.\n")
        if self._abandon:
            raise Abandoned
