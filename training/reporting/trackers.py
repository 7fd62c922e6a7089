"""Trackers of a run: Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from headstart.model.checkpoint.atomic import replace_text
from headstart.training.config.schema import Recipe, WandbConfig

from .samples import Sample, as_html, as_text

WANDB_ID = "wandb_id"  # file in the run's folder: a resumed run stays one run
TENSORBOARD = "tensorboard"


class Trackers:
    """All trackers of the recipe, on the main rank only."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.wandb = _start_wandb(recipe, folder)
        self.tensorboard = _start_tensorboard(recipe, folder)

    def log(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        for tracker in self._all():
            tracker.log(named, step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Log responses of an evaluation."""
        if self.wandb is not None:
            import wandb

            self.wandb.log({"eval/samples": wandb.Html(as_html(samples))}, step=step)
        if self.tensorboard is not None:
            self.tensorboard.log({"eval/samples": as_text(samples)}, step=step)

    def upload_best(self, head: Path) -> None:
        """Upload the best head as an artifact, to trackers that have artifacts."""
        if self.wandb is not None and head.is_dir():
            run = self.wandb.tracker
            run.log_artifact(str(head), name=f"head-{run.id}", type="model")

    def close(self) -> None:
        for tracker in self._all():
            tracker.finish()

    def _all(self) -> list[GeneralTracker]:
        return [one for one in (self.wandb, self.tensorboard) if one is not None]


def check_trackers(recipe: Recipe) -> None:
    """ValueError where a tracker of the recipe cannot be used."""
    _check_wandb(recipe.train.wandb)
    known = (TENSORBOARD, "tensorboardX")
    if recipe.train.tensorboard and not any(map(importlib.util.find_spec, known)):
        raise ValueError(
            "train.tensorboard is set, but it is not installed. Run `pip install tensorboard`, or "
            "leave train.tensorboard out."
        )


def _check_wandb(config: WandbConfig | None) -> None:
    if config is None:
        return
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "train.wandb is set, but wandb is not installed. Run `pip install wandb`, or leave "
            "train.wandb out."
        ) from error
    online = config.mode == "online" and os.environ.get("WANDB_MODE", "online") == "online"
    if online and wandb.api.api_key is None:
        raise ValueError(
            "train.wandb is online, but nobody is logged in here. Run `wandb login`, or set "
            "train.wandb.mode=offline."
        )


def _start_wandb(recipe: Recipe, folder: Path) -> WandBTracker | None:
    config = recipe.train.wandb
    _check_wandb(config)
    if config is None:
        return None
    file = folder / WANDB_ID
    if recipe.train.resume and file.is_file():
        name = file.read_text(encoding="utf-8").strip()
    else:
        name = secrets.token_hex(4)
        replace_text(file, f"{name}\n")
    tracker = WandBTracker(
        config.project,
        name=config.name,
        mode=config.mode,
        id=name,
        resume="allow",
        dir=folder,
        config=recipe.model_dump(mode="json"),
    )
    tracker.start()
    return tracker


def _start_tensorboard(recipe: Recipe, folder: Path) -> TensorBoardTracker | None:
    if not recipe.train.tensorboard:
        return None
    tracker = TensorBoardTracker(TENSORBOARD, logging_dir=str(folder))
    tracker.start()
    return tracker
