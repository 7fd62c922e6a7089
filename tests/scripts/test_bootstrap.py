"""The script behind make: what it does when it is interrupted, or finds a half-made environment."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from processes import ROOT

SCRIPT = ROOT / "scripts" / "bootstrap.py"

# A command that needs a while to save after Ctrl-C, as training does.
SAVES = """
import pathlib, sys, time
print("ready", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1.5)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
"""
RUNS = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import bootstrap
sys.exit(bootstrap.run(sys.executable, "-c", {SAVES!r}, sys.argv[1]))
"""


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its environment in a folder of the test."""
    spec = importlib.util.spec_from_file_location("bootstrap", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / "venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / "venv" / "headstart.json")
    return module


@pytest.mark.skipif(os.name == "nt", reason="process groups and SIGINT are POSIX")
def test_ctrl_c_leaves_the_command_time_to_save(tmp_path):
    saved = tmp_path / "saved"
    parent = subprocess.Popen(
        [sys.executable, "-c", RUNS, str(saved)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of them
    assert parent.wait(timeout=30) == 130
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("content", ["", '{"pyproject": "1', "[]"])
def test_a_stamp_that_was_cut_short_counts_as_none(bootstrap, content):
    bootstrap.VENV.mkdir()
    bootstrap.STAMP.write_text(content)
    assert bootstrap.stamp() == {}


def test_an_environment_without_pip_is_made_anew(bootstrap, tmp_path):
    folder = tmp_path / "half"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    assert python.exists() and not bootstrap.runs(python)
    assert bootstrap.runs(Path(sys.executable))
