"""Hidden states from disk: training equals training without, and nothing stale is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import chat_model
import pytest
import torch
from run_command import refused
from run_command import run as run_command
from safetensors.torch import load_file
from stored_states import STEPS, conversations, recipe_for, write
from tiny_run import learned, mixed_rows, tiny_head, tiny_target, write_rows

from headstart.model.target.target import Target
from headstart.training import trainer
from headstart.training.config.schema import Recipe
from headstart.training.data import hidden_states as store
from headstart.training.trainer import train


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=4)


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl", mixed_rows(24))


def run(recipe: Recipe, target: Target) -> list[dict]:
    train(recipe, target=target, head=tiny_head(target, "eagle3", draft_vocab=20))
    path = Path(recipe.train.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "near", "error"),
    [(None, 1e-5, 0), ("bfloat16", 5e-3, 0.003), ("float8", 4e-2, 0.04)],
)
def test_training_with_stored_features_equals_training_online(
    target, data, tmp_path, monkeypatch, kind, near, error
):
    online = run(recipe_for(tmp_path / "online", data), target)
    index = write(tmp_path / "features", recipe_for(tmp_path, data), target, kind)
    assert len(index.shards) > 2 and index.rows == 24
    assert index.error == 0 if not error else error / 10 < index.error < error

    def never(*_, **__):
        raise AssertionError("the target ran")

    for name in ("forward", "forward_train"):
        monkeypatch.setattr(target, name, never)
    monkeypatch.setattr(trainer, "calibrate_best", lambda *_: "")  # it runs the target
    stored = run(recipe_for(tmp_path / "stored", data, tmp_path / "features"), target)
    assert len(stored) == len(online) == STEPS + 2
    for ours, theirs in zip(stored, online, strict=True):
        for name in learned(ours).keys() - {"kind"}:
            assert ours[name] == pytest.approx(theirs[name], rel=near, abs=near), name
    first, second = (
        load_file(tmp_path / name / "state" / "state.safetensors") for name in ("stored", "online")
    )
    for name, value in second.items():
        torch.testing.assert_close(first[name].float(), value.float(), rtol=0, atol=near * 10)


def test_the_announced_size_is_the_size(target, data, tmp_path):
    recipe = recipe_for(tmp_path, data)
    for kind in ("float32", "bfloat16", "float8"):
        index = write(tmp_path / kind, recipe, target, kind)
        announced = store.size_bytes(index, conversations(recipe, target))
        content = [load_file(path) for path in sorted((tmp_path / kind).glob("*.safetensors"))]
        held = sum(value.nbytes for tensors in content for value in tensors.values())
        assert held == announced
        on_disk = sum(path.stat().st_size for path in (tmp_path / kind).glob("*.safetensors"))
        assert announced < on_disk < 1.3 * announced  # rows of ten tokens: names weigh something


def test_a_disk_without_room_is_refused_before_anything_is_written(
    target, data, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"GB are\s+free there\. Nothing was written"):
        write(tmp_path / "features", recipe_for(tmp_path, data), target)
    assert not (tmp_path / "features").exists()


def test_writing_resumes_where_it_stopped(target, data, tmp_path):
    recipe = recipe_for(tmp_path, data)
    whole = write(tmp_path / "whole", recipe, target)

    class PowerCut(Exception):
        pass

    def cut(done: int, total: int) -> None:
        if done > total // 2:
            raise PowerCut

    with pytest.raises(PowerCut):
        write(tmp_path / "cut", recipe, target, progress=cut)
    kept = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    with pytest.raises(ValueError, match="of 24 conversations"):
        run(recipe_for(tmp_path / "run", data, tmp_path / "cut"), target)
    times = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in kept}
    assert write(tmp_path / "cut", recipe, target) == whole
    assert 0 < len(kept) < len(whole.shards)
    for name, time in times.items():  # not written again
        assert (tmp_path / "cut" / name).stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("data", "made of other data"),
        ("holdout", "made of other data"),
        ("target", "made of another target"),
        ("taps", r"hold the layers \[\], but the head taps"),
        ("flipped", "has changed since it was written"),
        ("missing", "is missing"),
        ("index", "cannot be read"),
    ],
)
def test_stale_and_damaged_features_are_refused(target, data, tmp_path, how, said):
    folder, changed = tmp_path / "features", {}
    recipe = recipe_for(tmp_path, data)
    write(folder, recipe, target)
    shard = folder / "shard-00000.safetensors"
    if how == "data":
        write_rows(data, mixed_rows(25))
    if how == "holdout":
        changed = {"holdout": 4}
    if how == "target":
        target = tiny_target(layers=5)
    if how == "taps":
        index = json.loads((folder / "features.json").read_text()) | {"layers": []}
        (folder / "features.json").write_text(json.dumps(index))
    if how == "flipped":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    if how == "missing":
        shard.unlink()
    if how == "index":
        (folder / "features.json").write_text("{")
    with pytest.raises(ValueError, match=said):
        run(recipe_for(tmp_path / "run", data, folder, **changed), target)
    if how in ("data", "target"):  # nothing of another run is written over
        with pytest.raises(ValueError, match=said):
            write(folder, recipe, target)


def test_the_command(tmp_path, monkeypatch):
    target = chat_model.save(tmp_path / "target")
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    recipe = chat_model.write_recipe(tmp_path / "recipe.yaml", target, data, tmp_path / "run", 2)
    features = tmp_path / "features"
    told = run_command("features", recipe, "--out", features).output
    # An mtp head reads the LM head's input alone: 32 numbers of 4 bytes for every token.
    tokens = sum(map(len, mixed_rows(24)))
    index = json.loads((features / "features.json").read_text())
    assert index["layers"] == [] and f"{tokens * 32 * 4 / 1e9:.3f} GB" in told
    run_command("train", recipe, f"data.features={features}")
    assert (tmp_path / "run" / "best" / "config.json").exists()
    assert "--dtype is 'int3'" in refused("features", recipe, "--out", features, "--dtype", "int3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused("features", recipe, "--out", features)
