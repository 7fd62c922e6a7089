"""How far a run is, and which head is the best so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class TrainState:
    """All that a resumed run needs besides weights and optimizer state.

    step: optimizer steps done. total: optimizer steps of the whole run.
    position: global batches consumed. tokens: trained on, padding excluded. labels: of the first
    draft step.
    best_step, score: of the best head so far. evaluated: step of the last finished evaluation.
    """

    step: int = 0
    total: int = 0
    position: int = 0
    tokens: int = 0
    labels: int = 0
    best_step: int = -1
    score: float | None = None
    evaluated: int = 0

    def resumed(self, metadata: Mapping[str, Any]) -> TrainState:
        """The state that a checkpoint holds; `metadata` may hold other keys too."""
        names = self.__dataclass_fields__.keys() & metadata.keys()
        return replace(self, **{name: metadata[name] for name in names})

    def advance(self, batches: int, tokens: int, labels: int) -> None:
        """Count one optimizer step."""
        self.step += 1
        self.position += batches
        self.tokens += tokens
        self.labels += labels

    def evaluation_is_due(self, every: float) -> bool:
        """Return whether to evaluate now: always at the end.

        every: steps between evaluations; below 1 a share of the run, 0 for never before the end.
        """
        steps = math.ceil(every * self.total) if 0 < every < 1 else int(every)
        fits = self.step == self.total or (steps > 0 and self.step % steps == 0)
        return fits and self.step > self.evaluated

    def save_is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def is_best(self, score: float | None) -> bool:
        """Return whether a score beats the best one. Without scores the newest head is the best;
        a NaN score is replaced by any other."""
        if score is None or self.score is None or math.isnan(self.score):
            return True
        return score > self.score

    def forget_best(self) -> None:
        """Drop the best score, for evaluations that it cannot be compared with, and repeat the last
        evaluation."""
        self.score, self.best_step = None, -1
        self.evaluated = min(self.evaluated, self.step - 1)
