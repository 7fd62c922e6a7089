"""Where the time of a training step goes, and how much memory it took."""

from __future__ import annotations

import sys
import time

import torch


class StepTimer:
    """Splits a step into parts: what passed since the last mark belongs to the part named.

    On a GPU the marks are events, read once the step is over, so nothing waits for them.
    """

    def __init__(self, device: torch.device):
        self.on_gpu, self.device = device.type == "cuda", device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self.marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def figures(self, speed: float) -> dict[str, float]:
        """speed: tokens per second."""
        return {"tokens_per_second": speed} | self._memory() | self._shares()

    def _shares(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            name = f"share_{part}"
            seconds[name] = seconds.get(name, 0.0) + _between(before, after)
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    def _memory(self) -> dict[str, float]:
        """The most that this process has held: of the GPU's memory, on a CPU of the machine's."""
        if self.on_gpu:
            return {"memory_gb": torch.cuda.max_memory_allocated(self.device) / 1e9}
        if sys.platform == "win32":
            return {}
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return {"memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float) and isinstance(after, float)
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1e3
