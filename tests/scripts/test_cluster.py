"""The scripts for clusters, with processes of this machine in the place of nodes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_model import save, write_recipe
from processes import ROOT
from tiny_run import mixed_rows, skip_without_deepspeed, write_rows

SCRIPTS = ROOT / "scripts" / "cluster"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="shell scripts"),
]

# Starts the processes as SLURM does: a signal goes to each process and to what it has started, and
# one that fails ends the others.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
echo $$ > "$SRUN_PID"
set -m
for n in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & children+=($!)
done
tell() { for child in "${children[@]}"; do kill "$1" -- "-$child" 2>/dev/null; done; }
trap 'tell -TERM' TERM
worst=0
for child in "${children[@]}"; do
    while true; do
        wait "$child"; status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ "$status" -ne 0 ]; then tell -KILL; fi
    [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$SCONTROL_LOG"; fi
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def short_training(folder: Path, steps: int) -> Path:
    target = save(folder / "target")
    data = write_rows(folder / "data.jsonl", mixed_rows(24))
    return write_recipe(folder / "recipe.yaml", target, data, folder / "run", steps)


def state(folder: Path) -> dict:
    return json.loads((folder / "run" / "state" / "state.json").read_text())


def steps_done(folder: Path) -> int:
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_slurm_job_saves_goes_back_into_the_queue_and_goes_on(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    steps = 200
    recipe = short_training(tmp_path, steps)
    environment = os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(free_port()),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "2",
        "SCONTROL_LOG": str(tmp_path / "scontrol"),
        "SRUN_PID": str(tmp_path / "srun"),
    }

    def start(*more: str) -> subprocess.Popen[str]:
        command = [str(SCRIPTS / "train.slurm"), str(recipe), "parallel.engine=fsdp2", *more]
        return subprocess.Popen(
            command,
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    job = start()
    deadline = time.monotonic() + 90
    while steps_done(tmp_path) < 3:
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.02)
    os.kill(int((tmp_path / "srun").read_text()), signal.SIGTERM)
    _, output = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert "Traceback" not in output
    stopped = state(tmp_path)["step"]
    assert 3 <= stopped < steps

    environment["MASTER_PORT"] = str(free_port())
    job = start()
    _, output = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert state(tmp_path)["step"] == steps == steps_done(tmp_path)
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert not list(tmp_path.glob(".headstart*"))

    job = start("train.lr=nothing")  # a mistake is no reason to try again
    _, output = job.communicate(timeout=120)
    assert job.returncode != 0 and "train.lr" in output
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_machines_without_a_cluster_manager(tmp_path):
    skip_without_deepspeed("zero1")
    recipe = short_training(tmp_path, 4)
    first = f"127.0.0.1:{free_port()}"
    nodes = [
        subprocess.Popen(
            [str(SCRIPTS / "train_nodes.sh"), str(recipe), "parallel.engine=zero1"],
            env=os.environ
            | {"NODES": "2", "NODE": str(node), "FIRST": first, "GPUS": "1"}
            | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    for node in nodes:
        _, output = node.communicate(timeout=120)
        assert node.returncode == 0, output[-3000:]
    assert state(tmp_path)["step"] == 4
    assert state(tmp_path)["recipe"]["parallel"]["engine"] == "zero1"
