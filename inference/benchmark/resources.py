"""Time and peak memory of a piece of work, added to `RunMetrics`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .metrics import RunMetrics, max_known

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux
RESET_PEAK = "5"  # written to CLEAR_REFS
PEAK_IS_KNOWN = os.access(CLEAR_REFS, os.W_OK)


@contextmanager
def measured(device: torch.device, metrics: RunMetrics) -> Iterator[None]:
    """Add wall time, CPU time and peak memory of the body to the metrics."""
    _synchronize(device)
    bytes_before = _reset_peak(device)
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    _synchronize(device)
    metrics.seconds += time.perf_counter() - wall
    metrics.cpu_seconds += time.process_time() - cpu
    peak = _memory_bytes(device, peak=True)
    metrics.peak_bytes = max_known(metrics.peak_bytes, peak)
    if peak is not None and bytes_before is not None:
        metrics.working_bytes = max_known(metrics.working_bytes, peak - bytes_before)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif PEAK_IS_KNOWN:
        CLEAR_REFS.write_text(RESET_PEAK)
    return _memory_bytes(device, peak=False)


def _memory_bytes(device: torch.device, *, peak: bool) -> int | None:
    """Memory in use now or at the peak: of the process, or of torch's allocator on a GPU.

    None where the system cannot reset a peak.
    """
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return int(memory(device))
    if not PEAK_IS_KNOWN:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
