"""A target in parts on two processes trains the head that a whole one trains.

Sharded and tensor-parallel, over gloo.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import chat_model
import pytest
import resident_workers
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import mixed_rows, skip_without_deepspeed, write_rows

from headstart.scripts.options.recipe import run_recipe
from headstart.training.config.schema import load_recipe

PROCESSES = 2


def write_recipe(
    folder: Path, name: Path, data: Path, kind: str = "eagle3", **parallel: str
) -> Path:
    values = {
        "target": {"name": str(name), "dtype": "float32"},
        "head": {"kind": kind},
        "data": {"path": str(data), "max_length": 32, "global_batch_tokens": 32, "holdout": 4},
        "loss": {"steps": 2, "chunk_rows": 50},
        "train": {
            "output": str(folder / "run"),
            "precision": "float32",
            "lr": 1e-3,
            "steps": 5,
            "log_every": 1,
        },
        "eval": {"prompts": None, "every": 2},
        "parallel": parallel,
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["holdout_loss"] if line["kind"] == "eval" else line["loss"] for line in lines]


def run_together(recipe: Path) -> subprocess.CompletedProcess[str]:
    return resident_workers.run_together(PROCESSES, "sharded_worker.py", recipe, recipe.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "engine", "how"),
    [
        ("eagle3", "fsdp2", "sharded"),
        ("mtp", "zero2", "sharded"),
        ("eagle3", "ddp", "tensor_parallel"),
        ("mtp", "fsdp2", "tensor_parallel"),
    ],
)
def test_a_target_in_parts_trains_the_same_head(tmp_path, kind, engine, how):
    skip_without_deepspeed(engine)
    target = chat_model.save(tmp_path / "target")
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    pair = write_recipe(tmp_path / "pair", target, data, kind, engine=engine, target=how)
    done = run_together(pair)
    assert done.returncode == 0, done.stderr[-4000:]
    alone = write_recipe(tmp_path / "alone", target, data, kind)
    run_recipe(load_recipe(alone))

    facts = [json.loads((pair.parent / f"facts_{n}.json").read_text()) for n in range(PROCESSES)]
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of the two layers
    for one in facts:
        assert one["processes"] == PROCESSES and one["gradients"] == 0
        # All layers are in parts, and half of them is here. Tensor parallelism leaves norms whole.
        assert one["in_parts"] == matrices + (0 if how == "tensor_parallel" else 2 * 2 * 32)
        assert one["here"] == one["whole"] - one["in_parts"] // PROCESSES
        assert one["reads_together"] == (how == "tensor_parallel")
    ours, theirs = (
        load_file(recipe.parent / "run" / "state" / "state.safetensors") for recipe in (pair, alone)
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=3e-5)
    curves = [losses(recipe.parent / "run") for recipe in (pair, alone)]
    assert len(curves[1]) == 8  # five steps, three evaluations
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    heads = [json.loads((r.parent / "run/best/config.json").read_text()) for r in (pair, alone)]
    assert heads[0]["headstart"]["target_hash"] == heads[1]["headstart"]["target_hash"]
    # To go on with a whole target is allowed: it is the same one.
    whole = ("parallel.target=replicated", "parallel.engine=ddp", "train.resume=true")
    run_recipe(load_recipe(pair, whole))


@pytest.mark.slow
def test_a_target_that_cannot_be_read_ends_every_process(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    missing = tmp_path / "nothing"
    done = run_together(write_recipe(tmp_path / "pair", missing, data, target="sharded"))
    assert done.returncode != 0
    assert done.stderr.count(f"There is no folder {missing}") == PROCESSES
