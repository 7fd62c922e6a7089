"""The option `--quantize`, and a report of what quantisation changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headstart.scripts.console import show

if TYPE_CHECKING:
    from headstart.model.target.target import Target

QUANTIZE_HELP = "Quantise the target: int8, faster on a CPU. Its own output is then the reference."
PROMPTS = 6  # that the change is measured on


def report_quantization(target: Target) -> None:
    """Print how much a quantised target differs from the original one; nothing for others."""
    if target.quantized is None:
        return
    import torch

    from headstart.model.target.quantize import quantization_report

    from .prompts import decodable, first_turns

    prompts = decodable("dev", PROMPTS, target)
    sequences = [torch.tensor(ids) for ids in first_turns(target, prompts)]
    change = quantization_report(target.model, sequences)
    show(
        f"{target.quantized}: the top-1 token agrees with float32 at {change.agreement:.1%} of "
        f"{change.tokens} positions (mean KL divergence {change.divergence:.4f} nats). Speculative "
        "and autoregressive decoding both use this model."
    )
