"""Sums over the labels of a step, from which its metrics are computed.

Sums and counts are added over chunks, micro-batches and ranks; only the end divides.

Legend: B sequences, T positions, K draft steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SINGLE = 6  # numbers that are not one per draft step


@dataclass(frozen=True)
class StepSums:
    """Sums per draft step, and over all of them.

    count_K: labels. loss_K: loss. acceptance_K: acceptance rate at temperature 1. top1_K: labels
    whose argmax is the target's.
    chains_3: anchors that have all K labels, and the draft tokens accepted after them at
    temperature 0 and at temperature 1. objective_2: the weighted loss, and its weight.
    extra_loss: the teacher's extra loss over the labels of the first step.
    """

    count_K: Tensor
    loss_K: Tensor
    acceptance_K: Tensor
    top1_K: Tensor
    chains_3: Tensor
    objective_2: Tensor
    extra_loss: Tensor

    @staticmethod
    def of(
        valid_KBT: Tensor,
        loss_K: Tensor,
        acceptance_KBT: Tensor,
        top1_KBT: Tensor,
        total: Tensor,
        weights_KBT: Tensor,
    ) -> StepSums:
        complete_BT = valid_KBT.all(0)
        greedy = (top1_KBT.cumprod(0).sum(0) * complete_BT).sum()
        sampled = (acceptance_KBT.cumprod(0).sum(0) * complete_BT).sum()
        return StepSums(
            valid_KBT.sum((1, 2)).double(),
            loss_K.double(),
            (acceptance_KBT * valid_KBT).sum((1, 2)).double(),
            (top1_KBT * valid_KBT).sum((1, 2)).double(),
            torch.stack([complete_BT.sum().double(), greedy.double(), sampled.double()]),
            torch.stack([total.double(), weights_KBT.sum(dtype=torch.float64)]),
            torch.zeros((), dtype=torch.float64, device=total.device),
        )

    @staticmethod
    def zeros(steps: int, device: torch.device | str = "cpu") -> StepSums:
        return StepSums.unpack(torch.zeros(4 * steps + SINGLE, dtype=torch.float64, device=device))

    def with_extra_loss(self, extra_loss: Tensor) -> StepSums:
        return replace(self, extra_loss=extra_loss.detach().double())

    def __add__(self, other: StepSums) -> StepSums:
        return StepSums.unpack(self.pack() + other.pack())

    def pack(self) -> Tensor:
        """Return one vector, for one all-reduce."""
        by_step = (self.count_K, self.loss_K, self.acceptance_K, self.top1_K)
        return torch.cat([*by_step, self.chains_3, self.objective_2, self.extra_loss[None]])

    @staticmethod
    def unpack(vector: Tensor) -> StepSums:
        steps = (len(vector) - SINGLE) // 4
        count_K, loss_K, acceptance_K, top1_K = vector[:-SINGLE].split(steps)
        single = vector[-SINGLE:]
        sums = (count_K, loss_K, acceptance_K, top1_K)
        return StepSums(*sums, single[:3], single[3:5], single[5])

    def metrics(self, extra_loss_name: str | None = None) -> dict[str, float]:
        """Return means by name. Acceptance lengths count the bonus token.

        extra_loss_name: name of the teacher's extra loss (default: it has none).
        """
        count_K = self.count_K.clamp(min=1)
        chains = self.chains_3[0].clamp(min=1)
        metrics = {
            "loss": float(self.objective_2[0] / self.objective_2[1].clamp(min=1e-9)),
            "acceptance_length_t0": float(1 + self.chains_3[1] / chains),
            "acceptance_length_t1": float(1 + self.chains_3[2] / chains),
        }
        if extra_loss_name is not None:
            metrics[extra_loss_name] = float(self.extra_loss / count_K[0])
        for step in range(len(count_K)):
            metrics[f"loss_{step + 1}"] = float(self.loss_K[step] / count_K[step])
            acceptance_rate = float(self.acceptance_K[step] / count_K[step])
            metrics[f"acceptance_rate_{step + 1}"] = acceptance_rate
            metrics[f"top1_accuracy_{step + 1}"] = float(self.top1_K[step] / count_K[step])
        return metrics
