"""What a benchmark ran on: machine, versions and the speed of its memory."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from headstart.model.target.target import Target

READ_BYTES = 1 << 29  # summed to measure the memory bandwidth
MEGA, GIGA = 1e6, 1e9


def environment(target: Target) -> dict[str, Any]:
    """Target, dtype, device, threads and versions, as JSON."""
    import torch

    from headstart.inference.engine.measure_costs import device_name

    return {
        "target": target.name,
        "dtype": target.quantized or str(target.dtype).removeprefix("torch."),
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("headstart", "torch", "transformers")},
    }


def memory_speed(target: Target) -> dict[str, float]:
    """The memory bandwidth, and the megabytes of weights that an autoregressive step reads.

    Of an input embedding a step reads one row, unless the embedding is tied to the LM head. A
    mixture of experts reads less than this reports.
    """
    model = target.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    weights = [weight for weight in model.parameters() if weight is not embedding]
    weights += [output] if output is embedding else []
    matrix_bytes = 1 if target.quantized else output.element_size()  # per number
    size = sum(
        one.numel() * (matrix_bytes if one.dim() > 1 else one.element_size()) for one in weights
    )
    speed = _bandwidth(target.device) / GIGA
    return {"bandwidth_gb_per_second": round(speed, 3), "step_mb": round(size / MEGA, 3)}


def _bandwidth(device: torch.device) -> float:
    """Bytes per second that torch reads with all its threads: the best of five sums."""
    import torch

    values = torch.ones(READ_BYTES // 4, device=device)
    # On an accelerator many sums, so that the launch overhead does not count.
    sums = 1 if device.type == "cpu" else 16
    best = float("inf")
    for _ in range(5):
        values[0].item()  # waits for the device
        start = time.perf_counter()
        for _ in range(sums):
            last = values.sum()
        last.item()
        best = min(best, time.perf_counter() - start)
    return sums * READ_BYTES / best
