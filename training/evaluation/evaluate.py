"""Evaluate the head of a run: decode prompts with it, and measure the loss on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from headstart.model.checkpoint.head import roundtrip_bf16
from headstart.model.heads.common.base import DraftHead
from headstart.training.config.schema import LossConfig
from headstart.training.data.prefetch import Prefetcher
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.distributed.strategies import ParallelStrategy
from headstart.training.objective.losses import loss_sum
from headstart.training.objective.step_metrics import StepSums
from headstart.training.objective.teacher import Teacher
from headstart.training.reporting.samples import Sample
from headstart.training.run.signals import Abandoned, StopRequest

# Returns metrics, and under `samples` a list of `Sample` where there are responses to show.
Evaluate = Callable[[DraftHead], Mapping[str, Any]]
SCORE = "acceptance_length"  # the metric that `Evaluate` has to return
HOLDOUT_SCORE = "holdout_acceptance_length_t0"  # chooses the best head where nothing is decoded


class Evaluation:
    """Evaluates a head, on all ranks together.

    config: the objective on held-out conversations. evaluate: decodes with a head, or None.
    samples: responses of the last evaluation.
    """

    def __init__(
        self,
        config: LossConfig,
        data: Prefetcher,
        teacher: Teacher,
        strategy: ParallelStrategy,
        stop: StopRequest,
        evaluate: Evaluate | None,
    ):
        self.config, self.data, self.teacher = config, data, teacher
        self.strategy, self.stop, self.evaluate = strategy, stop, evaluate
        self.workers: WorkerGroup = strategy.workers
        self.samples: Sequence[Sample] = ()

    @torch.no_grad()
    def run(self, full_head: DraftHead | None) -> dict[str, float]:
        """Return the metrics of the head. full_head: with full weights, on the main rank.

        Raises Abandoned where the run is asked to stop.
        """
        return self._holdout() | self._decode(full_head)

    def _holdout(self) -> dict[str, float]:
        if not len(self.data.data.holdout):
            return {}
        head, strategy = self.strategy.head, self.strategy
        sums = StepSums.zeros(self.config.steps, self.workers.device)
        for batch in self.data.holdout():
            if self.workers.any_rank(self.stop.requested):
                raise Abandoned
            output = self.teacher.forward(batch)
            hidden = strategy.forward(output, batch.tokens_BT, last=True)
            with strategy.autocast():
                loss = loss_sum(self.config, head, output, hidden, batch)
            sums = sums + loss.sums.with_extra_loss(self.teacher.extra_loss(output, batch))
        total = StepSums.unpack(self.workers.all_reduce(sums.pack()).cpu())
        metrics = total.metrics(self.teacher.extra_loss_name)
        return {f"holdout_{name}": value for name, value in metrics.items()}

    def _decode(self, full_head: DraftHead | None) -> dict[str, float]:
        """Return the metrics of `evaluate`; none on the ranks that wait for the main one."""
        if not self.workers.is_main or self.evaluate is None:
            return {}
        assert full_head is not None
        with self.stop.abandonable():
            metrics = dict(self.evaluate(roundtrip_bf16(full_head)))
        self.samples = metrics.pop("samples", ())
        if SCORE not in metrics:
            raise ValueError(f"evaluate has to return {SCORE!r} among its metrics.")
        return metrics


def score(metrics: Mapping[str, float]) -> float | None:
    """Return the score that chooses the best head, if anything was measured."""
    return metrics.get(SCORE, metrics.get(HOLDOUT_SCORE))
