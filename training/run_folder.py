"""The output folder of a run: checkpoints to resume from, and the heads `best` and `last`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import Recipe
from headstart.training.objective.teacher import Teacher

from .run.checkpoint import FOLDER, could_not_save, save_metadata, save_state
from .run.train_state import TrainState


class RunFolder:
    """Written by the main rank only. saved_step: step of the newest checkpoint, if any."""

    def __init__(
        self, recipe: Recipe, target: Target, teacher: Teacher, state: TrainState, data_hash: str
    ):
        self.path, self.recipe, self.target = Path(recipe.train.output), recipe, target
        self.teacher, self.state, self.data_hash = teacher, state, data_hash
        self.checkpoint, self.best = self.path / FOLDER, self.path / "best"
        self.saved_step: int | None = None

    def save_checkpoint(self, head: DraftHead, optimizer: Mapping[str, Tensor]) -> None:
        """Save the state to resume from, and the present head as `last`."""
        save_state(self.checkpoint, head, optimizer, self._metadata(), self.recipe.train.keep)
        self._save_head(head, "last", {})

    def save_best(self, head: DraftHead, metrics: Mapping[str, float]) -> None:
        """Save the best head so far. metrics: of its evaluation."""
        self._save_head(head, "best", metrics)

    def save_progress(self) -> None:
        """Update the metadata of the checkpoint, e.g. after an evaluation of its weights."""
        save_metadata(self.checkpoint, self._metadata())

    def describe_saved(self) -> str:
        """Return what is saved, for the message of a run that ends early."""
        if self.saved_step is None:
            return "Nothing of this run is saved yet."
        return (
            f"Step {self.saved_step} of {self.state.total} is saved in {self.checkpoint}: "
            "train.resume=true resumes there."
        )

    def describe_stop(self) -> str:
        """Return the message of a run that was asked to stop, which is saved."""
        return (
            f"Stopped after step {self.state.step} of {self.state.total}; saved in "
            f"{self.checkpoint}. Resume with the same recipe and train.resume=true."
        )

    def _save_head(self, head: DraftHead, name: str, metrics: Mapping[str, float]) -> None:
        meta = HeadMeta(
            target=self.target.name,
            steps=self.recipe.loss.steps,
            tokens=self.state.labels,
            data=", ".join(self.recipe.data.paths) or None,
            data_hash=self.data_hash,
            start=self.recipe.train.start_from,
            weight_only=self.target.weight_only,
            recipe=self.recipe.decisive(),
            **self.teacher.metadata(metrics),
        )
        try:
            save_head(head, self.path / name, meta, beside=self.teacher.save)
        except OSError as error:
            raise could_not_save(self.path / name, error) from error

    def _metadata(self) -> dict[str, Any]:
        return asdict(self.state) | {
            "data_hash": self.data_hash,
            "target_hash": target_hash(self.target),
            "recipe": self.recipe.model_dump(mode="json"),
        }
