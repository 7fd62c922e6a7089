"""The demo on a tiny chat model: its stages, and what happens when they are run again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from chat_model import save
from typer.testing import CliRunner, Result

from headstart.model.target.load import load_target
from headstart.scripts.cli import app
from headstart.scripts.commands import demo
from headstart.scripts.options import recipe as recipes
from headstart.training.config.schema import load_recipe
from headstart.training.run.signals import Interrupted

SMALL = ("--prompts", "8", "--heldout", "2", "--max-new-tokens", "8")


def run(target: Path, out: Path, *more: str) -> Result:
    command = ["demo", "--target", str(target), "--out", str(out), *SMALL, *more]
    return CliRunner().invoke(app, command)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("target"), context=2048)


@pytest.fixture(scope="module")
def done(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    result = run(target, out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_all_stages_and_a_second_run(done, target):
    out, output = done
    results = json.loads((out / "results.json").read_text())["results"]
    assert set(results) == {"autoregressive", "new head"}
    assert results["new head"]["identical"] == results["new head"]["compared"] == 2
    assert "2/2" in output
    head = out / "fused" / "draft_heads" / "model.safetensors"
    before = head.stat().st_mtime_ns
    assert "already trained" in run(target, out).output
    assert head.stat().st_mtime_ns == before


def test_another_demo_is_not_mixed_in(done, target, tmp_path):
    other = save(tmp_path / "other", context=2048, seed=1)
    for arguments in ((target, done[0], "--prompts", "9"), (other, done[0])):
        result = run(*arguments)
        message = " ".join(result.output.replace("\u2502", " ").split())
        assert result.exit_code == 2 and "other settings" in message


def test_a_moved_target_resumes(done, target, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(target, moved)
    result = run(moved, done[0])
    assert result.exit_code == 0, result.output
    assert "already generated" in result.output and "already trained" in result.output


def test_the_command_for_a_longer_training_works(done):
    line = next(line for line in done[1].splitlines() if line.startswith("  headstart train"))
    result = CliRunner().invoke(app, [*shlex.split(line)[1:], "train.steps=2"])
    assert result.exit_code == 0, result.output
    assert (done[0] / "longer" / "best" / "config.json").exists()


def test_the_same_command_resumes_a_stopped_training(target, tmp_path, monkeypatch):
    def stopped(*_: object) -> Path:
        raise Interrupted("Resume with train.resume=true.")

    monkeypatch.setattr(recipes, "run_recipe", stopped)
    result = run(target, tmp_path / "out")
    assert result.exit_code == 130
    assert "the same command" in result.output and "train.resume" not in result.output
    monkeypatch.undo()
    assert run(target, tmp_path / "out").exit_code == 0


def test_the_head_is_chosen_and_measured_on_different_prompts(target, tmp_path):
    overrides = demo._overrides(load_target(target), str(target), tmp_path / "a", tmp_path / "b")
    recipe = load_recipe(recipes.find_recipe(demo.RECIPE), overrides)
    assert recipe.eval.prompts == "dev"  # the table is made of `heldout`
