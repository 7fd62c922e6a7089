"""Power cuts at random moments, and a process of several that dies."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killed_worker import STEPS
from processes import HELPERS, launch, launch_together
from resident_workers import run_together
from safetensors.torch import load_file
from tiny_run import learned, mixed_rows, write_rows

KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    seed = time.time_ns() % 1_000_000
    done = launch(HELPERS / "killed_worker.py", tmp_path, data, KILLS, seed)
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
    """Return weights and optimizer state, metrics without speed, and names of checkpoints."""
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
    began = time.monotonic()
    given = (tmp_path / "run", data, json.dumps({"dies": how}))
    done = launch_together(2, "strategies_worker.py", *given)
    seconds = time.monotonic() - began
    assert done.returncode != 0
    if how == "error":
        assert "RuntimeError: the disk of process 1 is gone" in done.stderr
    else:
        assert "Signal 9 (SIGKILL)" in done.stderr
    died = float((tmp_path / "run" / "died").read_text())
    assert seconds - (died - began) < 60


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_one_on_another_machine_that_is_gone_ends_the_others_too(tmp_path, how):
    """Without a launcher that sees both. stopped: as where the network is gone."""
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    settings = json.dumps({"dies": how, "timeout": 5})
    given = [sys.executable, HELPERS / "strategies_worker.py", tmp_path / "run", data, settings]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "PYTHONPATH": HELPERS}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        added = {name: str(value) for name, value in env.items()}
        inherited = os.environ.get("PYTHONPATH")
        added["PYTHONPATH"] += os.pathsep + inherited if inherited else ""
        processes.append(subprocess.Popen(given, env=os.environ | added, stderr=subprocess.PIPE))
    try:
        _, errors = processes[0].communicate(timeout=300)
        ended = time.monotonic()
        assert processes[0].returncode not in (0, None)
        assert b"Error" in errors
        assert ended - float((tmp_path / "run" / "died").read_text()) < 60
    finally:
        processes[1].kill()
        processes[1].communicate()


@pytest.mark.slow
def test_the_main_process_may_decode_for_longer_than_a_collective_may(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    settings = json.dumps({"timeout": 4, "decodes": 6})
    done = run_together(2, "strategies_worker.py", tmp_path / "run", data, settings)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_processes_with_different_data_are_refused(tmp_path):
    for number in (0, 1):
        write_rows(tmp_path / f"data{number}.jsonl", mixed_rows(24 + number))
    given = (tmp_path / "run", tmp_path / "data{rank}.jsonl", "{}")
    done = run_together(2, "strategies_worker.py", *given)
    assert done.returncode != 0
    assert "The processes differ in data and recipe" in done.stderr
    assert not (tmp_path / "run").exists()
