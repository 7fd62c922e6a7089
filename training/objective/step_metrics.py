"""Sums over training rows, from which the figures are made.

Sums and counts add up over chunks, micro-batches and processes; only the end divides.

Legend: B batch rows, T positions, K draft steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = 7  # numbers that are not one per step


@dataclass(frozen=True)
class StepSums:
    """Per step: valid rows, loss, acceptance at temperature 1, agreement of the likeliest tokens.

    chains_3: over anchors with all K labels, their number, and the accepted tokens of a drafted
    chain at temperature 0 and at temperature 1. objective_2: the weighted loss that is minimised,
    and the weight that it is divided by. divergence_2: in joint training, that of the changed
    target from the original, and its rows.
    """

    count_K: Tensor
    loss_K: Tensor
    alpha_K: Tensor
    top1_K: Tensor
    chains_3: Tensor
    objective_2: Tensor
    divergence_2: Tensor

    @staticmethod
    def of(
        valid_KBT: Tensor,
        loss_K: Tensor,
        alpha_KBT: Tensor,
        top1_KBT: Tensor,
        total: Tensor,
        weights_KBT: Tensor,
    ) -> StepSums:
        complete_BT = valid_KBT.all(0)
        greedy = (top1_KBT.cumprod(0).sum(0) * complete_BT).sum()
        sampled = (alpha_KBT.cumprod(0).sum(0) * complete_BT).sum()
        return StepSums(
            valid_KBT.sum((1, 2)).double(),
            loss_K.double(),
            (alpha_KBT * valid_KBT).sum((1, 2)).double(),
            (top1_KBT * valid_KBT).sum((1, 2)).double(),
            torch.stack([complete_BT.sum().double(), greedy.double(), sampled.double()]),
            torch.stack([total.double(), weights_KBT.sum(dtype=torch.float64)]),
            torch.zeros(2, dtype=torch.float64, device=total.device),
        )

    @staticmethod
    def zeros(steps: int, device: torch.device | str = "cpu") -> StepSums:
        return StepSums.unpack(torch.zeros(4 * steps + SINGLE, dtype=torch.float64, device=device))

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums.unpack(self.pack() + other.pack())

    def pack(self) -> Tensor:
        """One vector, for one reduction over processes."""
        rows = (self.count_K, self.loss_K, self.alpha_K, self.top1_K)
        return torch.cat([*rows, self.chains_3, self.objective_2, self.divergence_2])

    @staticmethod
    def unpack(vector: Tensor) -> StepSums:
        steps = (len(vector) - SINGLE) // 4
        by_step, single = vector[:-SINGLE].split(steps), vector[-SINGLE:].split((3, 2, 2))
        return StepSums(*by_step, *single)

    def figures(self) -> dict[str, float]:
        """Means by name; accepted lengths count the token that the target adds itself."""
        count_K = self.count_K.clamp(min=1)
        chains = self.chains_3[0].clamp(min=1)
        figures = {
            "loss": float(self.objective_2[0] / self.objective_2[1].clamp(min=1e-9)),
            "accepted_length_t0": float(1 + self.chains_3[1] / chains),
            "accepted_length_t1": float(1 + self.chains_3[2] / chains),
        }
        if self.divergence_2[1]:
            figures["divergence"] = float(self.divergence_2[0] / self.divergence_2[1])
        for step in range(len(count_K)):
            figures[f"loss_{step + 1}"] = float(self.loss_K[step] / count_K[step])
            figures[f"alpha_{step + 1}"] = float(self.alpha_K[step] / count_K[step])
            figures[f"top1_{step + 1}"] = float(self.top1_K[step] / count_K[step])
        return figures
