"""Shared by tests: joint run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

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
    values["data"] |= {"holdout": 5, "batch_tokens": 64}
    values["loss"] |= sections.get("loss", {})
    return make_recipe(values | {"joint": joint, "eval": {"every": 3}})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", mixed_rows(40))


def run(folder: Path, data: Path, joint: dict, head: str = "mtp", **sections: dict) -> Target:
    target = tiny_target()
    recipe = recipe_for(folder, data, joint, **sections)
    train(recipe, target=target, head=tiny_head(target, head))
    return target
