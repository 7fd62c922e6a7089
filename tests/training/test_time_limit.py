"""A run that is given minutes plans its steps by the speed of its first ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.model.target.target import Target
from headstart.training import trainer as loop
from headstart.training.config.schema import make_recipe
from headstart.training.trainer import Result, train


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is five seconds later: a step, which looks twice, takes five."""
    now = iter(range(0, 10**6, 5))
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(now)))


def run(target: Target, folder: Path, *, every: float = 0, **settings: Any) -> tuple[Result, Any]:
    """The result, and the steps at which the head was evaluated."""
    data = write_rows(folder / "data.jsonl", mixed_rows(24))
    values = tiny_recipe(folder, data).model_dump(exclude_none=True)
    values["train"] |= settings
    values["eval"] = {"every": every}
    steps: list[int] = []

    def log(at: Any) -> None:
        steps.extend([at.step] if at.kind == "eval" else [])

    recipe = make_recipe(values)
    return train(
        recipe,
        target=target,
        head=tiny_head(target),
        evaluate=lambda head: {"acceptance_length": 1.0},
        log=log,
    ), steps


def test_steps_that_do_not_fit_are_not_planned(target, tmp_path, slow_clock):
    result, evaluated = run(target, tmp_path, steps=100, minutes=1, every=0.25)
    assert result.steps == 3 + 60 / 5  # three to know the speed, then a minute of five seconds each
    assert evaluated == [4, 8, 12, 15]


def test_a_fast_machine_does_all_steps(target, tmp_path):
    result, evaluated = run(target, tmp_path, steps=9, minutes=600, every=0.5)
    assert result.steps == 9
    assert evaluated == [5, 9]
