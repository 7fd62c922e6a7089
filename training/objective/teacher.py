"""What a head learns from. The loop does not know which teacher it has.

Here the frozen target, read in the same process or from disk; `training/joint.py` has the one that
learns along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from headstart.model.checkpoint.metadata import Lora
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.training.config.schema import Recipe
from headstart.training.data.batching import Batch
from headstart.training.data.hidden_states import Features
from headstart.training.distributed.process_group import WorkerGroup

from .losses import Loss


class Teacher:
    """A frozen target.

    adapters: weights of the target that learn along, by name; none here.
    """

    adapters: Mapping[str, nn.Parameter]

    def __init__(self, head: DraftHead, team: WorkerGroup, features: Features | None = None):
        self.head, self.target, self.team, self.features = head, head.target, team, features
        self.adapters = {}

    def begin(self, step: int, total: int) -> None:
        """An optimizer step, of so many."""

    def read(self, whole: Batch, ours: Batch) -> TargetOutput:
        """What the target sees of our rows of a batch; where it learns, with a graph.

        Processes that share every layer read the whole batch together, and each keeps its rows.
        """
        if self.features is not None:
            return self.features.read(ours, self.target.device, self.target.dtype)
        together = self.target.is_tensor_parallel
        batch = whole.to(self.target.device) if together else ours
        with torch.no_grad():
            seen = self.target.forward_train(batch.tokens_BT, batch.lengths_B, self.head.taps)
        return seen.slice(*whole.share(self.team.index, self.team.count)) if together else seen

    def held(self, loss: Loss, seen: TargetOutput, batch: Batch) -> Loss:
        """The loss, with what holds the target near the original beside it."""
        return loss

    def objective(self, loss: Loss, weight: float, rows: int) -> Tensor:
        """What is minimised. weight, rows: of all batches of the step together, rows being
        those of `answer_rows`."""
        return loss.total / weight

    def rate(self, rate: float) -> float:
        """The adapters' learning rate, when the head's is `rate`."""
        return 0.0

    def meta(self, divergence: float | None) -> Lora | None:
        """What the head's folder says of how the target has changed."""
        return None

    def save(self, folder: Path) -> None:
        """What belongs into the head's folder."""

    def close(self) -> None:
        """Leave the target as it was before."""


def make_teacher(
    recipe: Recipe, head: DraftHead, features: Features | None, team: WorkerGroup
) -> Teacher:
    if recipe.joint is None:
        return Teacher(head, team, features)
    from .joint_lora import Joint  # peft is optional

    return Joint(recipe.joint, recipe, head, team)
