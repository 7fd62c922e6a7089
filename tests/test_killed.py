"""Power cuts at random moments, and a process of several that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killed_worker import STEPS
from safetensors.torch import load_file
from tiny_run import learned, mixed_rows, write_rows

HERE = Path(__file__).parent
KILLS = 20


def environment() -> dict[str, str]:
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *inherited]),
    }


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    seed = time.time_ns() % 1_000_000
    worker = str(HERE / "killed_worker.py")
    done = subprocess.run(
        [sys.executable, worker, str(tmp_path), str(data), str(KILLS), str(seed)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["killed"] == KILLS
    reference = finished(tmp_path / "undisturbed")
    for number in range(1, told["runs"] + 1):
        run = finished(tmp_path / f"run{number}")
        for name, tensors in reference[0].items():
            for key, value in tensors.items():
                assert torch.equal(run[0][name][key], value), f"seed {seed}: {name} {key}"
        assert run[1:] == reference[1:], f"seed {seed}"


def finished(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], list[dict], list[str]]:
    """Weights and optimizer; figures but the speed; the checkpoints that are there."""
    files = {"state": "state/state.safetensors"}
    files |= {name: f"{name}/model.safetensors" for name in ("best", "last")}
    tensors = {name: load_file(folder / file) for name, file in files.items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [learned(line) for line in lines]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    return tensors, lines, sorted(path.name for path in folder.glob("state*"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["error", "killed"])
def test_a_process_that_dies_ends_the_others(tmp_path, how):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / "engines_worker.py")]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(tmp_path / "run"), str(data), json.dumps({"dies": how})],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    seconds = time.monotonic() - began
    assert done.returncode != 0
    if how == "error":
        assert "RuntimeError: the disk of process 1 is gone" in done.stderr
    else:
        assert "Signal 9 (SIGKILL)" in done.stderr
    died = float((tmp_path / "run" / "died").read_text())
    assert seconds - (died - began) < 60


@pytest.mark.slow
def test_processes_with_different_data_are_refused(tmp_path):
    for number in (0, 1):
        write_rows(tmp_path / f"data{number}.jsonl", mixed_rows(24 + number))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(HERE / "engines_worker.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "run"), str(tmp_path / "data{rank}.jsonl"), "{}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "The processes differ in data and recipe" in done.stderr
    assert not (tmp_path / "run").exists()
