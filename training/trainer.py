"""Training a draft head on what a frozen target sees.

The target reads each batch in the same process and takes no part in the gradient. The loss is
divided by the weight of all valid rows of the whole optimizer step, over micro-batches and
processes, so neither changes what is learned. The loop knows no head kind and no objective.

Legend: B batch rows, T positions, D hidden size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import LossConfig, Recipe
from headstart.training.data.batching import Batch
from headstart.training.data.conversations import read_conversations
from headstart.training.data.hidden_states import open_features
from headstart.training.data.prefetch import Prefetcher
from headstart.training.distributed.launcher import with_engine
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.distributed.strategies import make_engine
from headstart.training.evaluation.calibration import calibrate_best
from headstart.training.evaluation.evaluate import Evaluate, Evaluation, score
from headstart.training.objective.losses import Loss, answer_rows, loss_sum, loss_weight
from headstart.training.objective.step_metrics import StepSums
from headstart.training.objective.teacher import make_teacher
from headstart.training.optim.optimizers import learning_rate
from headstart.training.optim.precision import with_precision
from headstart.training.reporting.metrics_log import Log, Report
from headstart.training.reporting.step_timer import StepTimer

from .checkpoint import (
    FOLDER,
    could_not_save,
    load_facts,
    load_state,
    save_facts,
    save_state,
    save_tensors,
)
from .cost_estimate import Arithmetic
from .preflight import (
    best_holds,
    check_fit,
    check_folder,
    check_lengths,
    check_same,
    choose_draft_vocab,
    fingerprint,
    memory_advice,
    not_finite_advice,
    summary,
    total_steps,
)
from .signals import Abandoned, Interrupted, StopRequest
from .train_state import TrainState

TIMED_STEPS = 3  # the first is slower: memory and kernels are set up


@dataclass(frozen=True)
class Result:
    """steps: optimizer steps done. best: folder of the best head; score: its accepted length."""

    steps: int
    best: Path
    best_step: int
    score: float | None


def train(
    recipe: Recipe,
    *,
    target: Target,
    head: DraftHead,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
) -> Result:
    """Train `head` (bound to `target`) as the recipe says.

    evaluate: decodes with a head in the target's dtype and returns figures, `accepted_length` among
    them; it chooses the best head. Without it the held-out predicted accepted length does, and
    without held-out conversations the last head is the best. The folder train.output then holds
    the heads `best` and `last`, `state` to go on from, and `metrics.jsonl`.
    Raises ValueError for a wrong recipe or wrong data before long work starts, `Interrupted` after
    Ctrl-C, FloatingPointError for a loss that is no number, MemoryError, OSError for a full disk.
    """
    run = _Run(recipe, target, head, evaluate, log)
    with memory_advice(recipe, run.what_is_saved), run.stop:
        return run.until_done()


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        head: DraftHead,
        evaluate: Evaluate | None,
        log: Log | None,
    ):
        self.folder = Path(recipe.train.output)
        facts = load_facts(self.folder / FOLDER)
        recipe = with_engine(with_precision(recipe, target, facts))
        check_fit(recipe, target, head, evaluate is not None)
        check_folder(recipe, self.folder, facts)
        self.recipe, self.target, self.head = recipe, target, head
        self.team, self.clock = WorkerGroup(target.device), StepTimer(target.device)
        self.stop = StopRequest(self.what_is_saved, speaks=self.team.main)
        data = read_conversations(recipe.data, target, recipe.train.seed)
        check_lengths(data, target)
        self.corpus, self.holdout = data.train, data.holdout
        self.data_hash = fingerprint(self.corpus)
        step = "none" if facts is None else str(facts["step"])
        settings = recipe.model_dump_json()
        self.team.check_same_on_all_ranks(
            {"data": self.data_hash, "recipe": settings, "checkpoint": step}
        )
        features = open_features(recipe, data, target, head)
        self.feed = Prefetcher(recipe, self.corpus, features, self.team, target.dtype)
        self.at = TrainState(total=total_steps(recipe.train, self.feed.batches))
        self.saved_step: int | None = None
        notes = [summary(data)]
        optimizer: dict[str, Tensor] = {}
        if facts is not None:
            changes, optimizer = self._resume(facts)
            notes += changes
        else:
            choose_draft_vocab(head, self.corpus)
        self.arithmetic = Arithmetic(recipe, target, head, self.team.count)
        self.teacher = make_teacher(recipe, head, features, self.team)
        self.engine = make_engine(head, recipe, self.team, self.clock, self.teacher.adapters)
        self.engine.restore(optimizer)
        self.evaluation = Evaluation(
            recipe, self.holdout, self.team, self.stop, self._held_out, evaluate
        )
        self.report: Report | None = None
        if self.team.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.report = Report(recipe, self.folder, log, self.at.step, self.at.evaluated)
            for note in notes:
                self.report.note(self.at.step, self.at.total, note)

    def until_done(self) -> Result:
        every, saves = self.recipe.eval.every, self.recipe.train.save_every
        try:
            self.head.train()
            if self.at.evaluation_is_due(every):  # it failed or was abandoned before
                self._evaluate()
            while self.at.step < self.at.total:
                if self._step():
                    self._save()
                    raise Interrupted(self._how_to_go_on())
                due = self.at.evaluation_is_due(every)
                if due or (saves and self.at.step % saves == 0):
                    self._save()  # before the evaluation: if that fails, no training is lost
                if due:
                    self._evaluate()
            self._calibrate()
            if self.report is not None:
                self.report.keep(self.folder / "best")
        finally:
            self.feed.close()
            if self.report is not None:
                self.report.close()
            self.teacher.close()
        return Result(self.at.step, self.folder / "best", self.at.best_step, self.at.score)

    # --- one optimizer step

    def _step(self) -> bool:
        """Returns True when some process was asked to stop (the step is then not done)."""
        began = time.monotonic()
        config, loss = self.recipe.train, self._loss_config()
        torch.manual_seed((config.seed * 1_000_003 + self.at.step) * 1009 + self.team.index)
        if self.team.any_rank(self.stop.asked):
            return True
        self.teacher.begin(self.at.step, self.at.total)
        self.clock.start()
        final = self.at.step + 1 == self.at.total
        pairs = self.feed.step(self.at.position, final=final)
        # Every process knows the whole batches, so nothing has to be added up.
        weight = sum(loss_weight(loss, whole) for whole, _ in pairs)
        rows = sum(len(answer_rows(whole)) for whole, _ in pairs)
        tokens = sum(int(whole.lengths_B.sum()) for whole, _ in pairs)
        self.clock.mark("data")
        sums = StepSums.zeros(loss.steps, self.target.device)
        for index, (whole, ours) in enumerate(pairs):
            last = index + 1 == len(pairs)
            stored = self.feed.seen(self.at.position + index, final=final and last)
            result = self._loss(whole, ours, loss, stored, last=last)
            objective = self.teacher.objective(result, weight, rows)
            # Averaged over processes afterwards, hence the factor.
            self.engine.backward(objective * self.team.count, last=last)
            self.clock.mark("backward")  # with what it hides of the exchange of gradients
            sums = sums + result.sums
        sums = StepSums.unpack(self.team.sum(sums.pack()).cpu())
        figures = sums.figures()
        rate = learning_rate(config, self.at.step, self.at.total)
        adapters = self.teacher.rate(rate)
        finite = math.isfinite(figures["loss"])
        norm = self.engine.update(rate, adapters) if finite else math.nan
        self.clock.mark("update")
        self._must_be_finite(figures["loss"], norm, [ours for _, ours in pairs])
        self._advance(tokens, sums)
        seconds = time.monotonic() - began
        self._plan(seconds)
        figures |= {"lr": rate, "gradient_norm": norm, "tokens": float(self.at.tokens)}
        figures |= self.arithmetic.figures(tokens / seconds, float(sums.count_K[0]) / seconds)
        self._report_step(figures | self.clock.figures(tokens / seconds))
        return False

    def _loss(
        self,
        whole: Batch,
        ours: Batch,
        config: LossConfig,
        stored: TargetOutput | None = None,
        *,
        last: bool = True,
    ) -> Loss:
        """Of our rows of a batch, where the target is. stored: what it saw of them, if at hand."""
        seen = self.teacher.read(whole, ours) if stored is None else stored
        self.clock.mark("target")
        hidden = self.engine.forward(seen, ours.tokens_BT, last=last)
        with self.engine.unrolled.autocast():
            result = loss_sum(config, self.head, seen, hidden, ours)
        self.clock.mark("head")
        result = self.teacher.held(result, seen, ours)
        self.clock.mark("target")
        return result

    def _held_out(self, whole: Batch) -> Loss:
        return self._loss(whole, self.team.part(whole), self.recipe.loss)

    def _advance(self, tokens: int, sums: StepSums) -> None:
        self.at.step += 1
        self.at.position += self.recipe.train.accumulate
        self.at.tokens += tokens
        self.at.answer_tokens += int(sums.count_K[0])

    def _loss_config(self) -> LossConfig:
        """The objective of this step: it may change for the last part of the run."""
        config = self.recipe.loss
        if config.finish is None or self.at.step < (1 - config.finish_part) * self.at.total:
            return config
        return config.model_copy(update={"kind": config.finish})

    # --- evaluation, saving, resuming

    def _evaluate(self) -> None:
        """Measure, and keep the head when it is the best so far. The state is saved already."""
        self.head.eval()
        figures: dict[str, float] | None = None
        whole = self.engine.whole_head()
        with suppress(Abandoned):
            figures = self.evaluation.figures(whole)
        self.head.train()
        self.team.wait()  # for the main process, which alone decodes
        if self.team.any_rank(figures is None) or figures is None:
            raise Interrupted(self._how_to_go_on())
        found = score(figures)
        self.at.evaluated = self.at.step
        if self.team.main:
            if figures and self.report is not None:
                self.report.eval(self.at.step, self.at.total, figures, self.evaluation.samples)
            if self.at.is_best(found):
                self.at.score, self.at.best_step = found, self.at.step
                self._save_head(whole, "best", figures.get("holdout_divergence"))
            save_facts(self.folder / FOLDER, self._facts())
        self.team.wait()

    def _calibrate(self) -> None:
        """The best head, on held-out conversations. A run that is stopped here can go on here."""
        if self.target.is_sharded or self.teacher.adapters:  # such a target does not decode
            return
        done = not self.team.main
        if self.report is not None:  # in the main process
            with suppress(Abandoned), self.stop.abandons():
                note = calibrate_best(self.folder / "best", self.target, self.holdout, self.recipe)
                self.report.note(self.at.step, self.at.total, note)
                done = True
        self.team.wait()
        if self.team.any_rank(not done):
            raise Interrupted(self._how_to_go_on())

    def _save_head(
        self, whole: DraftHead | None, name: str, divergence: float | None = None
    ) -> None:
        assert whole is not None
        meta = HeadMeta(
            target=self.target.name,
            steps=self.recipe.loss.steps,
            tokens=self.at.answer_tokens,
            data=", ".join(self.recipe.data.paths) or None,
            data_hash=self.data_hash,
            start=self.recipe.train.start_from,
            joint=self.teacher.meta(divergence),
            weight_only=self.target.weight_only,
            recipe=self.recipe.decisive(),
        )
        try:
            save_head(whole, self.folder / name, meta, beside=self.teacher.save)
        except OSError as error:
            raise could_not_save(self.folder / name, error) from error

    def _save(self) -> None:
        """The state to go on from, and the head as it is now."""
        whole, optimizer = self.engine.whole_head(), self.engine.optimizer_state()
        if self.team.main:
            assert whole is not None
            keep = self.recipe.train.keep
            save_state(self.folder / FOLDER, whole, optimizer, self._facts(), keep)
            self._save_head(whole, "last")
        self.saved_step = self.at.step
        self.team.wait()

    def _facts(self) -> dict[str, Any]:
        return asdict(self.at) | {
            "data_hash": self.data_hash,
            "target_hash": target_hash(self.target),
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def _resume(self, facts: Mapping[str, Any]) -> tuple[list[str], dict[str, Tensor]]:
        """Go back to where the run was saved; what to tell about it, and the optimizer's state."""
        check_same(facts, self.folder / FOLDER, self.data_hash, target_hash(self.target))
        optimizer = load_state(self.folder / FOLDER, self.head)
        self.head.bind(self.target)  # forgets what it worked out from the old weights
        self.at = self.at.resumed(facts)
        self.saved_step = self.at.step
        if best_holds(facts, self.recipe, self.folder / "best"):
            return [], optimizer
        self.at.forget_best()
        note = "Evaluation has changed, or the run went back: the best head is chosen anew."
        return [note], optimizer

    def _plan(self, seconds: float) -> None:
        """Once the speed is known, drop the steps that do not fit into train.minutes."""
        minutes = self.recipe.train.minutes
        if minutes is None or self.at.step != TIMED_STEPS:
            return
        # The mean of all processes, so that all plan the same.
        mean = float(self.team.sum(torch.tensor(seconds, device=self.target.device)))
        fit = TIMED_STEPS + int(60 * minutes * self.team.count / mean)
        self.at.total = min(self.at.total, fit)

    def _report_step(self, figures: Mapping[str, float]) -> None:
        if self.report is not None:
            keep = self.at.step % self.recipe.train.log_every == 0 or self.at.step == self.at.total
            self.report.train(self.at.step, self.at.total, figures, keep=keep)

    def _must_be_finite(self, loss: float, norm: float, batches: list[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        path = self.folder / f"bad_batch_step{self.at.step}_process{self.team.index}.safetensors"
        tensors: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            tensors |= {f"{index}.{name}": value for name, value in batch.tensors().items()}
        save_tensors(path, tensors)
        rows = [self.feed.batches.at(self.at.position + index) for index in range(len(batches))]
        if not self.team.any_rank(not self.engine.is_finite()):
            self._save()
        raise FloatingPointError(
            f"Step {self.at.step}: the loss is {loss} and the gradient norm {norm}. Nothing was "
            f"updated. The batch (conversations {rows}) is saved in {path}. "
            + not_finite_advice(self.recipe, self.target, self.saved_step, self.what_is_saved())
        )

    def what_is_saved(self) -> str:
        if self.saved_step is None:
            return "Nothing of this run is saved yet."
        return (
            f"Step {self.saved_step} of {self.at.total} is saved in {self.folder / FOLDER}: "
            "train.resume=true goes on from there."
        )

    def _how_to_go_on(self) -> str:
        return (
            f"Stopped after step {self.at.step} of {self.at.total}; saved in "
            f"{self.folder / FOLDER}. Go on with the same recipe and train.resume=true."
        )
