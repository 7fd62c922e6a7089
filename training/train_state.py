"""Where a run is, and what follows from that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class TrainState:
    """All that a resumed run needs besides weights and optimizer."""

    step: int = 0
    total: int = 0  # optimizer steps of the whole run
    position: int = 0  # batches taken from the data
    tokens: int = 0
    answer_tokens: int = 0
    best_step: int = -1
    score: float | None = None
    evaluated: int = 0  # step of the last finished evaluation

    def resumed(self, facts: Mapping[str, Any]) -> TrainState:
        names = self.__dataclass_fields__.keys() & facts.keys()
        return replace(self, **{name: facts[name] for name in names})

    def evaluation_is_due(self, every: float) -> bool:
        """At the end, and every so many steps (below 1: that part of the run; 0: never)."""
        steps = math.ceil(every * self.total) if 0 < every < 1 else int(every)
        fits = self.step == self.total or (steps > 0 and self.step % steps == 0)
        return fits and self.step > self.evaluated

    def is_best(self, score: float | None) -> bool:
        """Without scores the newest head is; one whose score is no number never stays it."""
        if score is None or self.score is None or math.isnan(self.score):
            return True
        return score > self.score

    def forget_best(self) -> None:
        """Scores under other settings cannot be compared; the last evaluation is done again."""
        self.score, self.best_step = None, -1
        self.evaluated = min(self.evaluated, self.step - 1)
