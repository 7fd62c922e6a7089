"""Time shares of the parts of a training step, and peak memory."""

from __future__ import annotations

import sys
import time

import torch


class StepTimer:
    """Splits a step into parts: a mark assigns the time since the last one to the part it names.

    On a GPU marks are events, which are read after the step, so that nothing synchronizes.
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

    def metrics(self) -> dict[str, float]:
        """Return peak memory and the time shares of the last step."""
        return self._memory() | self._shares()

    def _shares(self) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            name = f"share_{part}"
            seconds[name] = seconds.get(name, 0.0) + _between(before, after)
        total = sum(seconds.values()) or 1.0
        return {name: value / total for name, value in seconds.items()}

    def _memory(self) -> dict[str, float]:
        """Return the peak memory of this process: on a GPU the GPU's, else the machine's."""
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
