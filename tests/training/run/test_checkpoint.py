"""A run that was cut off and goes on ends exactly where an uncut run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import learned, mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows
from torch import Tensor

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.reporting.metrics_log import Progress
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import train

STEPS = 11  # of two batches each: several epochs


class PowerCut(Exception):
    pass


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl", mixed_rows(24))


def recipe_for(folder: Path, data: Path, *, resume: bool = False, **train_settings) -> Recipe:
    settings = {"steps": STEPS, "accumulate": 2, "log_every": 1, "save_every": 3, "seed": 5}
    plain = tiny_recipe(folder, data, **settings | train_settings, resume=resume)
    values = plain.model_dump(exclude_none=True)
    return make_recipe(values | {"eval": {"every": 2}, "data": values["data"] | {"holdout": 4}})


def everything(folder: Path) -> tuple[dict[str, Tensor], list[dict], dict]:
    """Weights and optimizer state, all figures but the speed, and where the run stands."""
    tensors = load_file(folder / "state" / "state.safetensors")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [learned(line) for line in lines]
    metadata = json.loads((folder / "state" / "state.json").read_text())
    metadata.pop("recipe")
    return tensors, lines, metadata


def run(recipe: Recipe, target: Target, **settings) -> None:
    train(recipe, target=target, head=tiny_head(target, draft_vocab=20), **settings)


@pytest.mark.parametrize(
    "how", [{"precision": "float32"}, {"precision": "bfloat16"}, {"optimizer": "muon"}]
)
@pytest.mark.parametrize("stop", ["asked", "cut"])
def test_resume_equals_not_stopping(target, data, tmp_path, stop, how):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe_for(whole, data, **how), target)

    def at_five(at: Progress) -> None:
        if at.kind == "train" and at.step == 5:
            if stop == "cut":
                raise PowerCut
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(PowerCut if stop == "cut" else Interrupted):
        run(recipe_for(cut, data, **how), target, log=at_five)
    saved_step = json.loads((cut / "state" / "state.json").read_text())["step"]
    assert saved_step == (4 if stop == "cut" else 5)  # 4: before an evaluation
    torch.manual_seed(99)  # whatever the machine did in between
    run(recipe_for(cut, data, **how, resume=True), target)

    (ours, our_lines, our_facts), (theirs, lines, facts) = everything(cut), everything(whole)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert our_lines == lines
    assert our_facts == facts
    assert facts["step"] == STEPS and facts["position"] == 2 * STEPS


def stopped_run(folder: Path, data: Path, target: Target) -> None:
    def at_two(at: Progress) -> None:
        if at.kind == "train" and at.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(recipe_for(folder, data), target, log=at_two)


def test_what_does_not_fit_is_refused(target, data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="holds no run to resume"):
        run(recipe_for(folder, data, resume=True), target)
    stopped_run(folder, data, target)
    with pytest.raises(ValueError, match=r"already holds a run \(step 2\)"):
        run(recipe_for(folder, data), target)
    with pytest.raises(ValueError, match=r"train\.warmup: was 0\.04, is 0\.5"):
        run(recipe_for(folder, data, resume=True, warmup=0.5), target)
    with pytest.raises(ValueError, match="belongs to another head"):
        train(
            recipe_for(folder, data, resume=True),
            target=target,
            head=tiny_head(target, draft_vocab=21),
        )
    write_rows(data, mixed_rows(25))
    with pytest.raises(ValueError, match="The data has changed"):
        run(recipe_for(folder, data, resume=True), target)


def test_reporting_may_change(target, data, tmp_path):
    folder = tmp_path / "run"
    stopped_run(folder, data, target)
    run(recipe_for(folder, data, resume=True, log_every=5, save_every=0), target)
    steps = [line["step"] for line in everything(folder)[1] if line["kind"] == "train"]
    assert steps == [1, 2, 5, 10, 11]


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(target, data, tmp_path, name):
    folder = tmp_path / "run"
    stopped_run(folder, data, target)
    path = folder / "state" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"state is damaged \({name}"):
        run(recipe_for(folder, data, resume=True), target)


def test_a_save_that_was_cut_off_is_no_loss(target, data, tmp_path):
    """The power fails while the new checkpoint is half written."""
    folder = tmp_path / "run"
    stopped_run(folder, data, target)
    half = folder / ".state.part"
    shutil.copytree(folder / "state", half)
    (half / "state.json").unlink()
    run(recipe_for(folder, data, resume=True), target)
    assert everything(folder)[2]["step"] == STEPS


@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_the_last_checkpoints_are_kept_and_one_can_be_gone_back_to(target, data, tmp_path, keep):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(recipe_for(whole, data), target)
    settings = {"save_every": 1, "keep": keep}
    run(recipe_for(folder, data, **settings), target)

    def older() -> list[int]:
        names = [path.name for path in folder.glob("state_step*")]
        return sorted(int(name.removeprefix("state_step")) for name in names)

    assert older() == list(range(1, STEPS))[max(0, STEPS - keep) :]
    if keep == 1:
        return
    back = older()[0]
    shutil.rmtree(folder / "state")
    (folder / f"state_step{back}").rename(folder / "state")
    run(recipe_for(folder, data, **settings, resume=True), target)
    assert older() == list(range(back, STEPS))[-(keep - 1) :]
    (ours, our_lines, _), (theirs, lines, _) = everything(folder), everything(whole)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [one for one in our_lines if one["kind"] == "train"] == [
        one for one in lines if one["kind"] == "train"
    ]


def test_auto_starts_and_goes_on(target, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\n')  # killed before a save
    run(recipe_for(folder, data, resume="auto", steps=4), target)
    assert [one["step"] for one in everything(folder)[1] if one["kind"] == "train"] == [1, 2, 3, 4]
    run(recipe_for(folder, data, resume="auto", steps=4), target)  # at its end
    shutil.rmtree(folder / "state")
    with pytest.raises(ValueError, match="Nothing there is replaced"):  # best and last are there
        run(recipe_for(folder, data, resume="auto", steps=4), target)
