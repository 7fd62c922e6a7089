"""Ctrl-C to real commands: status 130, no traceback, and the same command resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_model import save, write_recipe
from tiny_run import mixed_rows, write_rows

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="SIGINT to another process is POSIX"),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("target"), context=4096)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "headstart.scripts.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(child: subprocess.Popen[str], ready: Callable[[], bool]) -> str:
    """Send Ctrl-C as soon as the command is ready; its stderr."""
    deadline = time.monotonic() + 60
    while not ready():
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in out + err
    return err


def finish(*arguments: object) -> None:
    child = start(*arguments)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_responses_are_kept(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(24)))
    out = tmp_path / "responses.jsonl"
    settings = ("--out", out, "--max-new-tokens", 100, "--batch-size", 1)
    command = ("data", prompts, "--target", target, *settings)
    message = interrupt(start(*command), lambda: bool(lines(out)))
    assert "the same command resumes" in message
    kept = lines(out)
    assert 1 <= len(kept) < 24
    finish(*command)
    assert lines(out)[: len(kept)] == kept
    assert len({json.loads(line)["id"] for line in lines(out)}) == len(lines(out)) == 24


def test_training_is_saved(target, tmp_path):
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(16))
    write_recipe(recipe, target, data, run, 200)
    message = interrupt(start("train", recipe), lambda: len(lines(run / "metrics.jsonl")) > 1)
    assert "train.resume=true" in message
    saved = json.loads((run / "state" / "state.json").read_text())["step"]
    assert 1 <= saved < 200
    finish("train", recipe, "train.resume=true")
    steps = [json.loads(line)["step"] for line in lines(run / "metrics.jsonl")]
    assert max(steps) == 200 and set(range(1, 201)) <= set(steps)


def test_a_response_can_be_stopped(target, tmp_path):
    opened = load_target(target)
    save_head(make_head(opened, "mtp", {}), tmp_path / "head", HeadMeta(target=opened.name))
    fuse(str(target), tmp_path / "head", tmp_path / "fused")
    child = start("generate", tmp_path / "fused", "hello", "--max-new-tokens", 4000)
    assert child.stdout is not None
    stdout = child.stdout
    message = interrupt(child, lambda: "tokens per step" in stdout.readline())
    assert "Nothing was changed" in message
