"""Calibration in checkpoints, and the commands that write it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import rewrite_meta
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.checkpoint.model_card import model_card
from headstart.model.target.target import Target
from headstart.scripts.commands.calibrate import calibrate as command
from headstart.training.config.schema import make_recipe
from headstart.training.reporting.metrics_log import Progress
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import train

CALIBRATION = {
    "temperatures": (1.25, 0.5),
    "rank_acceptance": ((0.5, 0.25), (0.4, 0.2)),
    "calibration_positions": (1234, 567),
    "calibration_errors": ((0.1, 0.02), (0.2, 0.03)),
    "path_errors": (0.11, 0.012),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def saved(target, tmp_path) -> Path:
    save_head(tiny_head(target), tmp_path / "head", HeadMeta(target="someone/tiny"))
    return tmp_path / "head"


def test_a_calibration_is_saved_and_loaded(target, saved):
    weights = (saved / "model.safetensors").read_bytes()
    head = load_head(saved, target)
    assert head.temperatures == ()
    meta = read_head_file(saved).meta.model_copy(update=CALIBRATION)
    rewrite_meta(saved, head, meta)
    assert read_head_file(saved).meta == meta
    assert load_head(saved, target).temperatures == (1.25, 0.5)
    assert (saved / "model.safetensors").read_bytes() == weights
    assert {file.name for file in saved.iterdir()} == {"config.json", "model.safetensors"}


def test_a_checkpoint_without_calibration_loads(target, saved):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    for name in CALIBRATION:
        if name != "temperatures":
            del config["headstart"]["meta"][name]
    path.write_text(json.dumps(config))
    assert load_head(saved, target).temperatures == ()
    assert read_head_file(saved).meta.rank_acceptance == ()


@pytest.mark.parametrize("wrong", [[0.0], [-1.0], [float("nan")], ["warm"]])
def test_invalid_temperatures_are_an_error(target, saved, wrong):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["headstart"]["meta"]["temperatures"] = wrong
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds no draft head"):
        load_head(saved, target)


def test_the_card_shows_the_calibration(target, tmp_path):
    meta = HeadMeta(target="someone/tiny").model_copy(update=CALIBRATION)
    card = model_card(tiny_head(target), meta, tmp_path)
    assert "| 1 | 1,234 | 1.25 | 0.100 | 0.020 | 0.500 0.250 |" in card
    assert "| 2 | 567 | 0.50 | 0.200 | 0.030 | 0.400 0.200 |" in card
    assert "0.110 before, 0.012 after" in card
    assert "Calibration" not in model_card(tiny_head(target), HeadMeta(target="x"), tmp_path)


def held_out_recipe(tmp_path: Path, holdout: int = 30, **train_settings):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(60))
    values = tiny_recipe(tmp_path / "run", data, steps=4, **train_settings).model_dump(
        exclude_none=True
    )
    values["data"]["holdout"] = holdout
    return make_recipe(values)


def run_once(target: Target, recipe) -> list[str]:
    seen: list[Progress] = []
    train(recipe, target=target, head=tiny_head(target), log=seen.append)
    return [at.message for at in seen if at.kind == "note"]


def test_training_calibrates_its_best_head_once(target, tmp_path):
    notes = run_once(target, held_out_recipe(tmp_path))
    best = tmp_path / "run" / "best"
    meta = read_head_file(best).meta
    assert meta.recipe is not None and meta.recipe["loss"]["steps"] == meta.steps
    before, after = meta.path_errors
    assert f"from {before:.3f} to {after:.3f}" in notes[-1] and after <= before
    assert load_head(best, target).temperatures == meta.temperatures != ()
    assert meta.steps == 2 and meta.tokens
    assert read_head_file(tmp_path / "run" / "last").meta.temperatures == ()
    kept = (best / "config.json").read_bytes()
    again = run_once(target, held_out_recipe(tmp_path, resume=True))
    assert again[-1] == "The best head is calibrated already."
    assert (best / "config.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("holdout", "message"), [(0, "data.holdout keeps no conversations"), (2, "100 are needed")]
)
def test_training_reports_why_it_does_not_calibrate(target, tmp_path, holdout, message):
    notes = run_once(target, held_out_recipe(tmp_path, holdout))
    assert message in notes[-1]
    assert read_head_file(tmp_path / "run" / "best").meta.temperatures == ()


def test_a_run_stopped_during_calibration_resumes_there(target, tmp_path, monkeypatch):
    def stop(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was ignored")

    with monkeypatch.context() as patch:
        patch.setattr("headstart.training.trainer.calibrate_best", stop)
        with pytest.raises(Interrupted, match=r"after step 4 of 4.*train\.resume=true"):
            run_once(target, held_out_recipe(tmp_path))
    notes = run_once(target, held_out_recipe(tmp_path, resume=True))
    assert "calibrated on" in notes[-1]
    assert read_head_file(tmp_path / "run" / "best").meta.temperatures


def test_the_command_rewrites_metadata_only(target, saved, tmp_path, capsys):
    target.model.save_pretrained(tmp_path / "plain")
    fuse(tmp_path / "plain", saved, tmp_path / "fused")

    def files() -> dict[str, bytes]:
        found = (tmp_path / "fused").rglob("*.*")
        return {file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in found}

    before = files()
    responses = write_rows(tmp_path / "responses.jsonl", mixed_rows(60))
    command(tmp_path / "fused", responses, limit=40, depth=2, width=3, dtype="auto")
    assert "acceptance by rank" in capsys.readouterr().out
    meta = read_head_file(tmp_path / "fused").meta
    assert meta.calibration_positions[0] == sum(len(row) - 3 for row in mixed_rows(60)[:40])
    after = files()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {"fused/README.md", "fused/draft_heads/config.json"}
