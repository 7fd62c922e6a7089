"""The option `--quantize`, and what it changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headstart.scripts.console import show

if TYPE_CHECKING:
    from headstart.model.target.target import Target

QUANTIZE_HELP = "int8: faster on a CPU. The model in integers is then the target."
TEXTS = 6  # prompts that the change is measured on


def tell_quantized(target: Target) -> None:
    """One line, if the target is quantised: how much it differs from its weights as they are."""
    if target.quantized is None:
        return
    import torch

    from headstart.model.target.quantize import quantization_report

    from .prompts import decodable, first_turns

    prompts = decodable("dev", TEXTS, target)
    texts = [torch.tensor(ids) for ids in first_turns(target, prompts)]
    change = quantization_report(target.model, texts)
    show(
        f"{target.quantized}: the likeliest next token is the same as in float32 after "
        f"{change.agreement:.1%} of {change.tokens} tokens (mean divergence "
        f"{change.divergence:.4f} nats). Plain and speculative decoding are compared with this "
        "model."
    )
