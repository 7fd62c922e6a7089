"""What the head of a run is worth: real decoding of prompts, and held-out conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from headstart.model.checkpoint.head import roundtrip_bf16
from headstart.model.heads.common.base import DraftHead
from headstart.training.config.schema import Recipe
from headstart.training.data.batching import Batch, Corpus
from headstart.training.data.conversations import in_batches
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.objective.losses import Loss
from headstart.training.objective.step_metrics import StepSums
from headstart.training.signals import Abandoned, StopRequest

from .samples import Sample

# Figures, and under `samples` a list of `Sample` where there are answers to show.
Evaluate = Callable[[DraftHead], Mapping[str, Any]]
SCORE = "acceptance_length"  # what `Evaluate` has to return among its figures
HELD_OUT = "holdout_accepted_length_t0"  # what chooses the best head where nothing is decoded


class Evaluation:
    """evaluate: decodes with a head, or None. loss: of this process' rows of a batch.

    samples: answers of the last time that `figures` was called.
    """

    def __init__(
        self,
        recipe: Recipe,
        holdout: Corpus,
        team: WorkerGroup,
        stop: StopRequest,
        loss: Callable[[Batch], Loss],
        evaluate: Evaluate | None,
    ):
        self.recipe, self.holdout, self.team, self.stop = recipe, holdout, team, stop
        self.loss, self.evaluate = loss, evaluate
        self.samples: Sequence[Sample] = ()

    @torch.no_grad()
    def figures(self, whole: DraftHead | None) -> dict[str, float]:
        """All processes call it together. whole: the head, in the main process.

        Raises Abandoned where the run is asked to stop.
        """
        return self._held_out() | self._decoded(whole)

    def _held_out(self) -> dict[str, float]:
        if not len(self.holdout):
            return {}
        sums = StepSums.zeros(self.recipe.loss.steps, self.team.device)
        for batch in in_batches(self.holdout, self.recipe.data.batch_tokens):
            if self.team.any_rank(self.stop.asked):
                raise Abandoned
            sums = sums + self.loss(batch).sums
        figures = StepSums.unpack(self.team.sum(sums.pack()).cpu()).figures()
        return {f"holdout_{name}": value for name, value in figures.items()}

    def _decoded(self, whole: DraftHead | None) -> dict[str, float]:
        """What `evaluate` finds; nothing in the processes that wait for the main one."""
        if not self.team.main or self.evaluate is None:
            return {}
        assert whole is not None
        with self.stop.abandons():
            figures = dict(self.evaluate(roundtrip_bf16(whole)))
        self.samples = figures.pop("samples", ())
        if SCORE not in figures:
            raise ValueError(f"evaluate has to return {SCORE!r} among its figures.")
        return figures


def score(figures: Mapping[str, float]) -> float | None:
    """By which the best head is chosen, if anything was measured."""
    return figures.get(SCORE, figures.get(HELD_OUT))
