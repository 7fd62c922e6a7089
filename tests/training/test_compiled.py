"""Compiled layers learn what plain ones learn, and leave no trace in what is saved.

Most tests leave out the code that is generated at last (`aot_eager`), which takes a minute.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch_together
from safetensors.torch import load_file
from strategies_worker import STEPS, decoded, recipe_for
from tiny_run import (
    learned,
    mixed_rows,
    skip_without_deepspeed,
    tiny_head,
    tiny_recipe,
    tiny_target,
    write_rows,
)
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from headstart.model.checkpoint.head import load_head
from headstart.model.heads.common.base import kinds
from headstart.training import compiled
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.trainer import train

NEAR = 1e-5  # of losses, against runs that are not compiled


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch._dynamo.reset()
        counters.clear()
        yield
    torch._dynamo.reset()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl", mixed_rows(24))


def recipe(folder: Path, data: Path, holdout: int = 0, **train: Any) -> Recipe:
    """Batches of two rows at least: a single one, or rows held out, have graphs of their own."""
    settings = {"steps": STEPS, "log_every": 1, "lr": 1e-3} | train
    values = tiny_recipe(folder, data, **settings).model_dump(exclude_none=True)
    values["data"] |= {"holdout": holdout, "batch_tokens": 64}
    return make_recipe(values)


def run(given: Recipe, kind: str = "medusa") -> list[dict[str, Any]]:
    target = tiny_target()
    head = tiny_head(target, kind, **({"num_heads": 2} if kind == "medusa" else {}))
    train(given, target=target, head=head)
    text = (Path(given.train.output) / "metrics.jsonl").read_text()
    return [learned(json.loads(line)) for line in text.splitlines()]


def check_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], near: float) -> None:
    assert len(ours) == len(theirs)
    for line, other in zip(ours, theirs, strict=True):
        for name in line.keys() - {"kind"}:
            assert line[name] == pytest.approx(other[name], rel=near, abs=near), name


def check_saved(ours: Path, theirs: Path) -> None:
    one, other = (load_file(at / "state" / "state.safetensors") for at in (ours, theirs))
    assert list(one) == list(other)
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_losses_and_names_are_those_of_a_plain_run(data, tmp_path, kind):
    theirs = run(recipe(tmp_path / "plain", data), kind)
    assert not counters["stats"]
    ours = run(recipe(tmp_path / "compiled", data, compile=True), kind)
    check_close(ours, theirs, NEAR)
    check_saved(tmp_path / "compiled", tmp_path / "plain")
    assert load_head(tmp_path / "compiled" / "best", tiny_target())
    # The trial is a graph; medusa's heads share one; the layers have four, around their attention.
    graphs = 1 if kind == "medusa" else 4
    assert 1 < counters["stats"]["unique_graphs"] <= 1 + 2 * graphs


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_run_goes_on_compiled_or_not(data, tmp_path, compiled_first):
    theirs = run(recipe(tmp_path / "plain", data))

    class PowerCut(Exception):
        pass

    def cut(at) -> None:
        if at.kind == "train" and at.step == 3:
            raise PowerCut

    target = tiny_target()
    half = recipe(tmp_path / "cut", data, compile=compiled_first, save_every=1)
    with pytest.raises(PowerCut):
        train(half, target=target, head=tiny_head(target, "medusa", num_heads=2), log=cut)
    settings = {"compile": not compiled_first, "save_every": 1, "resume": True}
    ours = run(recipe(tmp_path / "cut", data, **settings))
    check_close(ours, theirs, NEAR)
    check_saved(tmp_path / "cut", tmp_path / "plain")


@pytest.mark.slow
def test_recomputing_in_the_backward_pass(data, tmp_path):
    theirs = run(recipe(tmp_path / "plain", data), "mtp")
    values = recipe(tmp_path / "compiled", data, compile=True).model_dump(exclude_none=True)
    values["loss"]["recompute"] = True
    check_close(run(make_recipe(values), "mtp"), theirs, NEAR)


def test_too_many_shapes_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    with pytest.raises(FailOnRecompileLimitHit):
        run(recipe(tmp_path / "run", data, holdout=5, compile=True))


def test_what_cannot_compile_is_refused_before_anything_is_written(data, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "missing")
    with pytest.raises(ValueError, match=r"nothing can be compiled here.*Install them, or leave"):
        run(recipe(tmp_path / "run", data, compile=True))
    with pytest.raises(ValueError, match=r"does not go with parallel\.engine=zero3"):
        compiled.check_compiler("zero3", torch.device("cpu"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_with_generated_code(data, tmp_path, monkeypatch):
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    theirs = run(recipe(tmp_path / "plain", data), "mtp")
    ours = run(recipe(tmp_path / "compiled", data, compile=True), "mtp")
    check_close(ours, theirs, NEAR)
    check_saved(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_two_processes_equal_one(data, tmp_path, engine):
    skip_without_deepspeed(engine)
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    train(recipe_for(tmp_path / "alone", data, {}), target=target, head=head, evaluate=decoded)
    settings = {"engine": engine, "compile": True, "backend": "aot_eager"}
    given = (tmp_path / "pair", data, json.dumps(settings))
    done = launch_together(2, "strategies_worker.py", *given)
    assert done.returncode == 0, done.stderr[-4000:]
    check_saved(tmp_path / "pair", tmp_path / "alone")
