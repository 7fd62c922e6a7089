"""Two processes that train together learn what one alone learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_run import VOCAB, mixed_rows, tiny_head, tiny_target, write_rows
from two_processes_worker import decoded, two_process_recipe

from headstart.training.data import Batches
from headstart.training.loop import train
from headstart.training.recipe import Recipe
from headstart.training.sources import read_conversations

HERE = Path(__file__).parent


def figures(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_per_batch(recipe: Recipe) -> list[int]:
    corpus = read_conversations(recipe.data, tiny_target(), recipe.train.seed).train
    batches = Batches(corpus.lengths, recipe.data.batch_tokens, recipe.train.seed)
    return [len(batches.at(position)) for position in range(batches.count(1))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "optimizer"), [("lk", "adamw"), ("e2e_tv", "adamw"), ("lk", "muon")]
)
def test_two_processes_equal_one(tmp_path, kind, optimizer):
    # The long rows fill a batch alone, so that one process has nothing to do in some batches.
    long_rows = [torch.randint(0, VOCAB, (32,)).tolist() for _ in range(3)]
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(20) + long_rows)
    assert 1 in rows_per_batch(two_process_recipe(tmp_path, data, kind, optimizer))
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(HERE / "two_processes_worker.py")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    done = subprocess.run(
        [*command, str(pair), str(data), kind, optimizer],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(HERE), *inherited])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    for index in (0, 1):
        with safe_open(pair / f"weights_{index}.safetensors", "pt") as file:
            assert file.metadata()["processes"] == "2"
            assert file.metadata()["type"].endswith("MULTI_CPU")
    first, second = (load_file(pair / f"weights_{index}.safetensors") for index in (0, 1))
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    start = {name: value.clone() for name, value in head.state_dict().items()}
    recipe = two_process_recipe(alone, data, kind, optimizer)
    result = train(recipe, target=target, head=head, evaluate=decoded)
    state = json.loads((pair / "state" / "state.json").read_text())
    assert state["best_step"] == result.best_step
    assert [one["step"] for one in figures(pair) if one["kind"] == "eval"] == [2, 4, 6]
    for name, value in head.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        # Adam turns rounding in a tiny gradient into a part of a step (1e-3), hence not 1e-7, and
        # Muon orthogonalises in bfloat16.
        near = 3e-5 if optimizer == "adamw" else 2e-4
        torch.testing.assert_close(first[name], value, rtol=0, atol=near)
        assert not torch.allclose(start[name].float(), value.float(), rtol=0, atol=1e-3), name
    for ours, theirs in zip(figures(pair), figures(alone), strict=True):
        for name in ours.keys() - {"kind", "tokens_per_second"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
