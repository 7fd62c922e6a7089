"""Where else the figures of a run go: Weights & Biases, TensorBoard."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headstart.model.checkpoint.atomic import replace_text
from headstart.training.config.schema import Recipe, WandbConfig
from headstart.training.evaluation.samples import Sample, as_html, as_text

WANDB_ID = "wandb_id"  # in the folder of the run, so that a run that goes on is one run there too
TENSORBOARD = "tensorboard"


class Trackers:
    """All that the recipe names; in the main process only."""

    def __init__(self, recipe: Recipe, folder: Path):
        self.wandb = _start_wandb(recipe, folder)
        self.tensorboard = _start_tensorboard(recipe, folder)

    def log(self, kind: str, step: int, figures: Mapping[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in figures.items()}
        if self.wandb is not None:
            self.wandb.log(named, step=step)
        if self.tensorboard is not None:
            self.tensorboard.log(named, step=step)

    def show(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers of an evaluation."""
        if self.wandb is not None:
            import wandb

            self.wandb.log({"eval/samples": wandb.Html(as_html(samples))}, step=step)
        if self.tensorboard is not None:
            self.tensorboard.log({"eval/samples": as_text(samples)}, step=step)

    def keep(self, head: Path) -> None:
        """The finished head, as an artifact where there are such."""
        if self.wandb is not None and head.is_dir():
            self.wandb.log_artifact(str(head), name=f"head-{self.wandb.id}", type="model")

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.finish()


def check_trackers(recipe: Recipe) -> None:
    """ValueError where something that the recipe names cannot be used."""
    _check_wandb(recipe.train.wandb)
    known = (TENSORBOARD, "tensorboardX")
    if recipe.train.tensorboard and not any(map(importlib.util.find_spec, known)):
        raise ValueError(
            "train.tensorboard is set, but it is not installed. Run `pip install tensorboard`, or "
            "leave train.tensorboard out."
        )


def _check_wandb(config: WandbConfig | None) -> Any:
    """The library, or None when it is not asked for."""
    if config is None:
        return None
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
    return wandb


def _start_wandb(recipe: Recipe, folder: Path) -> Any:
    config = recipe.train.wandb
    wandb = _check_wandb(config)
    if config is None:
        return None
    file = folder / WANDB_ID
    if recipe.train.resume and file.is_file():
        name = file.read_text(encoding="utf-8").strip()
    else:
        name = secrets.token_hex(4)
        replace_text(file, f"{name}\n")
    return wandb.init(
        project=config.project,
        name=config.name,
        mode=config.mode,
        id=name,
        resume="allow",
        dir=folder,
        config=recipe.model_dump(mode="json"),
    )


def _start_tensorboard(recipe: Recipe, folder: Path) -> Any:
    if not recipe.train.tensorboard:
        return None
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker(TENSORBOARD, logging_dir=str(folder))
    tracker.start()
    return tracker
