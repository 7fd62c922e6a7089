"""Where the figures of a run go: a callback, `metrics.jsonl`, and trackers when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from headstart.model.checkpoint.atomic import replace_text
from headstart.training.config.schema import Recipe
from headstart.training.evaluation.samples import SAMPLES, Sample

from .trackers import Trackers

FIGURES = "metrics.jsonl"
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Progress:
    """What the caller is told. eta: seconds that are left, or None before the first step.

    kind: "train" after every optimizer step, "eval" after an evaluation, "note" for a message.
    samples: answers that the evaluation wrote.
    """

    kind: Literal["train", "eval", "note"]
    step: int
    total: int
    metrics: Figures
    eta: float | None
    message: str = ""
    samples: Sequence[Sample] = ()


Log = Callable[[Progress], None]


class Report:
    """Written by the main process only; `metrics.jsonl` and `samples.jsonl` hold one JSON object
    per line."""

    def __init__(self, recipe: Recipe, folder: Path, log: Log | None, step: int, evaluated: int):
        """step, evaluated: where the run begins, and its last finished evaluation before."""
        self.log, self.first = log, step
        self.began = time.monotonic()
        self.path, self.samples = folder / FIGURES, folder / SAMPLES
        _keep_until(self.path, step, evaluated)
        _keep_until(self.samples, evaluated, evaluated)
        self.file = self.path.open("a", encoding="utf-8")
        self.trackers = Trackers(recipe, folder)

    def train(self, step: int, total: int, figures: Figures, *, keep: bool) -> None:
        """step: optimizer steps done. keep: write it down, beside telling the callback."""
        if keep:
            self._write("train", step, figures)
        self._tell("train", step, total, figures)

    def eval(self, step: int, total: int, figures: Figures, samples: Sequence[Sample] = ()) -> None:
        self._write("eval", step, figures)
        if samples:
            lines = [json.dumps({"step": step, "kind": "eval", **asdict(one)}) for one in samples]
            with self.samples.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
            self.trackers.show(step, samples)
        self._tell("eval", step, total, figures, samples=samples)

    def note(self, step: int, total: int, message: str) -> None:
        self._tell("note", step, total, {}, message)

    def keep(self, head: Path) -> None:
        """The best head of a run that came to its end."""
        self.trackers.keep(head)

    def close(self) -> None:
        self.file.close()
        self.trackers.close()

    def _write(self, kind: str, step: int, figures: Figures) -> None:
        line = {"step": step, "kind": kind, **figures}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.trackers.log(kind, step, figures)

    def _tell(
        self,
        kind: Literal["train", "eval", "note"],
        step: int,
        total: int,
        figures: Figures,
        message: str = "",
        samples: Sequence[Sample] = (),
    ) -> None:
        if self.log is not None:
            eta = self._eta(step, total)
            self.log(Progress(kind, step, total, figures, eta, message, samples))

    def _eta(self, step: int, total: int) -> float | None:
        if step <= self.first:
            return None
        passed = time.monotonic() - self.began
        return passed / (step - self.first) * (total - step)


def _keep_until(path: Path, step: int, evaluated: int) -> None:
    """Drop lines behind the step that a run goes on from: they will come again."""
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
