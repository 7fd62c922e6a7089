"""Train a draft head on the hidden states of a frozen target: the training loop.

The target computes each batch in the same process, without a gradient. The loss is divided by the
weight of all labels of the whole optimizer step, over micro-batches and ranks, so that neither
changes what is learned. The loop knows no head kind, objective or parallel strategy.

Legend: B sequences, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.training.config.schema import LossConfig, Recipe
from headstart.training.data.batching import Batch
from headstart.training.evaluation.calibration import calibrate_best
from headstart.training.evaluation.evaluate import Evaluate, score
from headstart.training.objective.losses import label_rows, loss_sum, loss_weight
from headstart.training.objective.step_metrics import StepSums
from headstart.training.optim.optimizers import learning_rate
from headstart.training.reporting.metrics_log import Log

from .build import TrainingRun, build_run
from .failures import memory_advice, not_finite_advice
from .run.checkpoint import save_tensors
from .run.signals import Abandoned, Interrupted

TIMED_STEPS = 3  # to estimate the speed; the first is slower: memory and kernels are set up


@dataclass(frozen=True)
class Result:
    """steps: optimizer steps done. best: folder of the best head; score: acceptance length."""

    steps: int
    best: Path
    best_step: int
    score: float | None


@dataclass(frozen=True)
class StepInputs:
    """This rank's batches of an optimizer step, and totals over all ranks.

    loss_weight: what the loss is divided by. labels: labels of the first draft step.
    tokens: padding excluded. final: no step follows.
    """

    batches: Sequence[Batch]
    loss_weight: float
    labels: int
    tokens: int
    final: bool


def train(
    recipe: Recipe,
    *,
    target: Target,
    head: DraftHead,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
) -> Result:
    """Train `head`, which is bound to `target`, as the recipe says.

    evaluate: decodes with a head in the target's dtype and returns metrics, among them
    `acceptance_length`, which chooses the best head. Without it the acceptance length predicted on
    held-out conversations does; without those the last head is the best.
    log: called after every optimizer step and evaluation.

    The folder train.output then holds the heads `best` and `last`, `state` to resume from, and
    `metrics.jsonl`. Raises ValueError for a wrong recipe or wrong data before long work starts,
    `Interrupted` after Ctrl-C, FloatingPointError for a loss that is not finite, MemoryError,
    OSError for a full disk.
    """
    run = build_run(recipe, target, head, evaluate, log)
    with memory_advice(run.recipe, run.folder.describe_saved), run.stop:
        return Trainer(run).train()


class Trainer:
    """The loop over a run's optimizer steps."""

    def __init__(self, run: TrainingRun):
        self.run, self.state, self.step_began = run, run.state, 0.0

    def train(self) -> Result:
        """Train to the end, evaluate and calibrate. Resumes where the run's state is."""
        run, state, mark = self.run, self.state, self.run.timer.mark
        teacher, strategy, ranks = run.teacher, run.strategy, run.workers.world_size
        try:
            run.head.train()
            self._evaluate_if_due()  # an evaluation that failed or was abandoned
            while state.step < state.total:
                objective, inputs = self._objective(), self._next_inputs()
                sums = StepSums.zeros(objective.steps, run.workers.device)
                for batch, last in run.data.on_device(
                    inputs.batches, state.position, final=inputs.final
                ):
                    output = teacher.forward(batch)  # the target's hidden states
                    mark("target")
                    hidden = strategy.forward(output, batch.tokens_BT, last=last)  # head.unroll
                    with strategy.autocast():
                        loss = loss_sum(objective, run.head, output, hidden, batch)
                    mark("head")
                    extra_loss = teacher.extra_loss(output, batch)
                    mark("target")
                    total = loss.total / inputs.loss_weight
                    total = total + teacher.extra_loss_weight * extra_loss / inputs.labels
                    sums = sums + loss.sums.with_extra_loss(extra_loss)
                    del output, hidden, loss, extra_loss  # the backward pass needs the memory
                    strategy.backward(total * ranks, last=last)  # gradients are averaged over ranks
                    del total
                    mark("backward")
                metrics = self._reduce(sums)
                lr = learning_rate(run.recipe.train, state.step, state.total)
                finite = math.isfinite(metrics["loss"])
                norm = strategy.step(lr, teacher.learning_rate(lr)) if finite else math.nan
                mark("update")
                self._check_finite(metrics["loss"], norm, inputs.batches)
                self._finish_step(inputs, metrics | {"lr": lr, "grad_norm": norm})
                self._save_if_due()
                self._evaluate_if_due()
            self._calibrate()
            if run.report is not None:
                run.report.upload_best(run.folder.best)
        finally:
            self._close()
        return Result(state.step, run.folder.best, state.best_step, state.score)

    # --- one optimizer step

    def _objective(self) -> LossConfig:
        """Return the objective of this step, which may change for the last part of the run."""
        config, state = self.run.recipe.loss, self.state
        if config.finish is None or state.step < (1 - config.finish_part) * state.total:
            return config
        return config.model_copy(update={"kind": config.finish})

    def _next_inputs(self) -> StepInputs:
        """Fetch this rank's batches and all-reduce the step's totals, together with the request to
        stop: all ranks save and stop together."""
        run, state = self.run, self.state
        self.step_began = time.monotonic()
        seed = (run.recipe.train.seed * 1_000_003 + state.step) * 1009 + run.workers.rank
        torch.manual_seed(seed)
        run.teacher.begin_step(state.step, state.total)
        run.timer.start()
        final = state.step + 1 == state.total
        batches = run.data.step(state.position, final=final)
        objective = self._objective()
        local = (
            float(run.stop.requested),
            sum(loss_weight(objective, batch) for batch in batches),
            sum(len(label_rows(batch)) for batch in batches),
            sum(batch.num_tokens for batch in batches),
        )
        totals = torch.tensor(local, dtype=torch.float64, device=run.workers.device)
        stop, weight, labels, tokens = run.workers.all_reduce(totals).tolist()
        if stop:
            self._save()
            raise Interrupted(run.folder.describe_stop())
        run.timer.mark("data")
        return StepInputs(batches, weight, int(labels), int(tokens), final)

    def _reduce(self, sums: StepSums) -> dict[str, float]:
        """Return the metrics of all ranks together."""
        total = StepSums.unpack(self.run.workers.all_reduce(sums.pack()).cpu())
        return total.metrics(self.run.teacher.extra_loss_name)

    def _check_finite(self, loss: float, norm: float, batches: Sequence[Batch]) -> None:
        """FloatingPointError for a step that is not finite; its batches are saved."""
        if math.isfinite(loss) and math.isfinite(norm):
            return
        run, state = self.run, self.state
        name = f"bad_batch_step{state.step}_process{run.workers.rank}.safetensors"
        path = run.folder.path / name
        tensors: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            tensors |= {f"{index}.{key}": value for key, value in batch.tensors().items()}
        save_tensors(path, tensors)
        rows = [run.data.batches.at(state.position + index) for index in range(len(batches))]
        if not run.workers.any_rank(not run.strategy.is_finite()):
            self._save()
        saved, where = run.folder.saved_step, run.folder.describe_saved()
        raise FloatingPointError(
            f"Step {state.step}: the loss is {loss} and the gradient norm {norm}. Nothing was "
            f"updated. The batch (conversations {rows}) is saved in {path}. "
            + not_finite_advice(run.recipe, run.target, saved, where)
        )

    def _finish_step(self, inputs: StepInputs, metrics: dict[str, float]) -> None:
        """Count the step and report its metrics."""
        run, state = self.run, self.state
        state.advance(len(inputs.batches), inputs.tokens, inputs.labels)
        seconds = time.monotonic() - self.step_began
        self._limit_time(seconds)
        metrics["tokens"] = float(state.tokens)
        metrics |= run.throughput.metrics(inputs.tokens / seconds, inputs.labels / seconds)
        metrics |= run.timer.metrics()
        if run.report is not None:
            write = state.step % run.recipe.train.log_every == 0 or state.step == state.total
            run.report.train(state.step, state.total, metrics, write=write)

    def _limit_time(self, seconds: float) -> None:
        """Drop the steps that do not fit into train.minutes, once the speed is known."""
        run, minutes = self.run, self.run.recipe.train.minutes
        if minutes is None or self.state.step != TIMED_STEPS:
            return
        # The mean over ranks, so that all plan the same.
        total = run.workers.all_reduce(torch.tensor(seconds, device=run.workers.device))
        fit = TIMED_STEPS + int(60 * minutes * run.workers.world_size / float(total))
        self.state.total = min(self.state.total, fit)

    # --- checkpoints and evaluation

    def _save_if_due(self) -> None:
        """Save before an evaluation too: if that fails, no training is lost."""
        recipe, state = self.run.recipe, self.state
        if state.save_is_due(recipe.train.save_every) or state.evaluation_is_due(recipe.eval.every):
            self._save()

    def _save(self) -> None:
        run = self.run
        head, optimizer = run.strategy.full_head(), run.strategy.optimizer_state()
        if run.workers.is_main:
            assert head is not None
            run.folder.save_checkpoint(head, optimizer)
        run.folder.saved_step = self.state.step
        run.workers.barrier()

    def _evaluate_if_due(self) -> None:
        """Evaluate the head, and save it where it is the best so far."""
        run, state = self.run, self.state
        if not state.evaluation_is_due(run.recipe.eval.every):
            return
        run.head.eval()
        metrics: dict[str, float] | None = None
        head = run.strategy.full_head()
        with suppress(Abandoned):
            metrics = run.evaluation.run(head)
        run.head.train()
        run.workers.barrier()  # the main rank alone decodes
        if run.workers.any_rank(metrics is None) or metrics is None:
            raise Interrupted(run.folder.describe_stop())
        found = score(metrics)
        state.evaluated = state.step
        if run.workers.is_main:
            assert head is not None
            if metrics and run.report is not None:
                run.report.eval(state.step, state.total, metrics, run.evaluation.samples)
            if state.is_best(found):
                state.score, state.best_step = found, state.step
                run.folder.save_best(head, metrics)
            run.folder.save_progress()
        run.workers.barrier()

    def _calibrate(self) -> None:
        """Calibrate the best head on held-out conversations, where the target can decode. A run
        that is stopped here resumes here."""
        run, state = self.run, self.state
        if run.target.is_sharded or run.teacher.parameters:
            return
        done = run.report is None
        if run.report is not None:  # on the main rank
            with suppress(Abandoned), run.stop.abandonable():
                holdout = run.data.data.holdout
                note = calibrate_best(run.folder.best, run.target, holdout, run.recipe)
                run.report.note(state.step, state.total, note)
                done = True
        run.workers.barrier()
        if run.workers.any_rank(not done):
            raise Interrupted(run.folder.describe_stop())

    def _close(self) -> None:
        self.run.data.close()
        if self.run.report is not None:
            self.run.report.close()
        self.run.teacher.close()
