"""Runs that train the target jointly with its head."""

from __future__ import annotations

from pathlib import Path

from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.trainer import train

JOINT = {"rank": 4, "lr": 0.5, "start": 0.0}
STEPS = 6


def recipe_for(folder: Path, data: Path, joint: dict, **sections: dict) -> Recipe:
    train = {"steps": STEPS, "log_every": 1, "lr": 1e-2, "save_every": 2} | sections.get(
        "train", {}
    )
    values = tiny_recipe(folder, data, **train).model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "global_batch_tokens": 64}
    values["loss"] |= sections.get("loss", {})
    return make_recipe(values | {"joint": joint, "eval": {"every": 3}})


def run(folder: Path, data: Path, joint: dict, head: str = "mtp", **sections: dict) -> Target:
    target = tiny_target()
    recipe = recipe_for(folder, data, joint, **sections)
    train(recipe, target=target, head=tiny_head(target, head))
    return target
