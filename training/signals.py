"""Stopping between two steps, never within one: a half-updated head must not be saved."""

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
    """Training was stopped and saved; the message says how to go on."""


class Abandoned(BaseException):
    """An evaluation was cut short: it changes nothing, so it need not wait for its end."""


class StopRequest:
    """While open, Ctrl-C and a termination request only set `asked`. A second Ctrl-C stops at once.

    Not a second termination request: where a cluster stops a job, the process gets one from the
    cluster and one from its launcher. For the same reason two signals within SAME_SECONDS are one.

    what_is_saved: what to tell whoever stops at once.
    """

    def __init__(self, what_is_saved: Callable[[], str], *, speaks: bool = True) -> None:
        self.asked = False
        self.what_is_saved, self.speaks = what_is_saved, speaks
        self._abandons = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python's rule for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
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
    def abandons(self) -> Iterator[None]:
        """Within, the first request raises `Abandoned`: for work that changes nothing."""
        if self.asked:
            raise Abandoned
        self._abandons = True
        try:
            yield
        finally:
            self._abandons = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked:
            if number == signal.SIGINT and now - self._since > SAME_SECONDS:
                raise Interrupted(f"At once. {self.what_is_saved()}")
            return
        self.asked, self._since = True, now
        if self.speaks:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping after this step; Ctrl-C again to stop at once.\n")
        if self._abandons:
            raise Abandoned
