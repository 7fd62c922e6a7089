"""What a head learns from. The loop does not know which teacher it has.

Here the frozen target, read in the same process or from disk; `training/joint.py` has the one that
learns along.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from headstart.model.head import DraftHead
from headstart.model.meta import Lora
from headstart.model.seen import Seen

from .data import Batch
from .features import Features, read
from .losses import Loss
from .parallel import Team
from .recipe import Recipe


class Teacher:
    """A frozen target.

    adapters: weights of the target that learn along, by name; none here.
    """

    adapters: Mapping[str, nn.Parameter]

    def __init__(self, head: DraftHead, team: Team, features: Features | None = None):
        self.head, self.target, self.team, self.features = head, head.target, team, features
        self.adapters = {}

    def begin(self, step: int, total: int) -> None:
        """An optimizer step, of so many."""

    def read(self, whole: Batch) -> tuple[Batch, Seen]:
        """Our rows of a batch, and what the target sees of them; where it learns, with a graph."""
        return read(self.features, self.target, whole, self.head.layers, self.team)

    def held(self, loss: Loss, seen: Seen, batch: Batch) -> Loss:
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


def make_teacher(recipe: Recipe, head: DraftHead, features: Features | None, team: Team) -> Teacher:
    if recipe.joint is None:
        return Teacher(head, team, features)
    from .joint import Joint  # peft is optional

    return Joint(recipe.joint, recipe, head, team)
