"""Muon for CPUs without bfloat16 instructions.

torch's Muon orthogonalises every update in bfloat16. A CPU that emulates bfloat16 takes a hundred
times as long for it as in float32, most of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Muon


class Float32Muon(Muon):
    """torch's Muon with its iteration in float32.

    Update of a matrix (Keller Jordan, "Muon", 2024; its size as in arXiv 2502.16982, equation 4):
    Nesterov momentum, orthogonalised by Newton-Schulz steps, scaled to the size of AdamW's.
    """

    def __init__(self, params: Any, **settings: Any):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        update = orthogonalised(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)


def orthogonalised(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return the matrix with singular values near 1, by quintic Newton-Schulz iteration."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    update = matrix.T if tall else matrix
    update = update / update.norm().clamp(min=eps)
    for _ in range(steps):
        gram = update @ update.T
        update = a * update + (b * gram + c * gram @ gram) @ update
    return update.T if tall else update
