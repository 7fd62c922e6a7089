"""Report metrics to a callback, to `metrics.jsonl` and to trackers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from headstart.model.checkpoint.atomic import replace_text
from headstart.training.config.schema import Recipe

from .samples import SAMPLES, Sample
from .trackers import Trackers

METRICS = "metrics.jsonl"
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Progress:
    """One report to the caller.

    kind: "train" after every optimizer step, "eval" after an evaluation, "note" for a message.
    step, total: optimizer steps done and of the whole run. eta: seconds left, None before the
    first step. samples: responses of the evaluation.
    """

    kind: Literal["train", "eval", "note"]
    step: int
    total: int
    metrics: Metrics
    eta: float | None
    message: str = ""
    samples: Sequence[Sample] = ()


Log = Callable[[Progress], None]


class Report:
    """Reports of one run, on the main rank only. `metrics.jsonl` and `samples.jsonl` hold one JSON
    object per line."""

    def __init__(self, recipe: Recipe, folder: Path, log: Log | None, step: int, evaluated: int):
        """step, evaluated: where the run starts, and its last finished evaluation before that."""
        self.log, self.first = log, step
        self.began = time.monotonic()
        self.path, self.samples = folder / METRICS, folder / SAMPLES
        _drop_after(self.path, step, evaluated)
        _drop_after(self.samples, evaluated, evaluated)
        self.file = self.path.open("a", encoding="utf-8")
        self.trackers = Trackers(recipe, folder)

    def train(self, step: int, total: int, metrics: Metrics, *, write: bool) -> None:
        """Report an optimizer step. write: to the file and trackers too, not only the callback."""
        if write:
            self._write("train", step, metrics)
        self._call("train", step, total, metrics)

    def eval(self, step: int, total: int, metrics: Metrics, samples: Sequence[Sample] = ()) -> None:
        """Report an evaluation."""
        self._write("eval", step, metrics)
        if samples:
            lines = [json.dumps({"step": step, "kind": "eval", **asdict(one)}) for one in samples]
            with self.samples.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
            self.trackers.log_samples(step, samples)
        self._call("eval", step, total, metrics, samples=samples)

    def note(self, step: int, total: int, message: str) -> None:
        self._call("note", step, total, {}, message)

    def upload_best(self, head: Path) -> None:
        """Upload the best head of a finished run."""
        self.trackers.upload_best(head)

    def close(self) -> None:
        self.file.close()
        self.trackers.close()

    def _write(self, kind: str, step: int, metrics: Metrics) -> None:
        line = {"step": step, "kind": kind, **metrics}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.trackers.log(kind, step, metrics)

    def _call(
        self,
        kind: Literal["train", "eval", "note"],
        step: int,
        total: int,
        metrics: Metrics,
        message: str = "",
        samples: Sequence[Sample] = (),
    ) -> None:
        if self.log is not None:
            eta = self._eta(step, total)
            self.log(Progress(kind, step, total, metrics, eta, message, samples))

    def _eta(self, step: int, total: int) -> float | None:
        if step <= self.first:
            return None
        passed = time.monotonic() - self.began
        return passed / (step - self.first) * (total - step)


def _drop_after(path: Path, step: int, evaluated: int) -> None:
    """Drop lines after the step that a run resumes from: they will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        whole = line.endswith("}")  # a crash may have cut the last line
        if not step or not whole:
            continue
        known = json.loads(line)
        if known["step"] <= (evaluated if known["kind"] == "eval" else step):
            kept.append(line)
    replace_text(path, "".join(f"{line}\n" for line in kept))
