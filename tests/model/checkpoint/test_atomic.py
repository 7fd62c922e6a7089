"""Folders are replaced atomically, whenever the writer is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from headstart.model.checkpoint.atomic import ABANDONED, atomic_folder, recover


def write(folder: Path, text: str, key: str | None = None) -> None:
    with atomic_folder(folder, "data.json", key) as part:
        (part / "data.json").write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def stop_at_rename(
    monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> Callable[[], None]:
    """Fail at one of the renames; returns a function that undoes this."""
    rename, calls = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == number:
            raise error("stopped")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    return lambda: monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("number", [1, 2])
def test_a_stop_between_the_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    write(tmp_path / "x", "old")
    stop_at_rename(monkeypatch, number, error)
    with pytest.raises(error):
        write(tmp_path / "x", "new")
    assert content(tmp_path) == {"x/data.json": "old"}


def test_a_kill_between_the_renames_is_recovered(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".x.old")  # as a killed process leaves it
    recover(tmp_path / "x")
    recover(tmp_path / "x")
    assert content(tmp_path) == {"x/data.json": "old"}
    (tmp_path / "x").rename(tmp_path / ".x.old")
    with pytest.raises(OSError), atomic_folder(tmp_path / "x", "data.json"):
        raise OSError("full")
    assert content(tmp_path) == {"x/data.json": "old"}
    (tmp_path / "x").rename(tmp_path / ".x.old")
    write(tmp_path / "x", "new")
    assert content(tmp_path) == {"x/data.json": "new"}


def test_two_writers_do_not_interfere(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "x", "data.json") as first:
        (first / "data.json").write_text("first")
        write(tmp_path / "x", "second")
        assert content(tmp_path / "x") == {"data.json": "second"}
    assert content(tmp_path) == {"x/data.json": "first"}


def test_abandoned_folders_are_removed(tmp_path: Path) -> None:
    for name, age in (("fresh", 60), ("stale", ABANDONED + 60)):
        part = tmp_path / f".x.{name}.part"
        part.mkdir()
        now = part.stat().st_mtime
        os.utime(part, (now - age, now - age))
    write(tmp_path / "x", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.fresh.part", "x"]


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"model_type": "llama"}', "{"])
def test_a_folder_whose_marker_lacks_the_key_is_not_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"no data.json with 'headstart' in it.*Name a new"):
        write(tmp_path / "x", '{"headstart": 1}', "headstart")
    assert content(tmp_path) == {"x/data.json": text}


def test_a_folder_with_the_key_is_replaced(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / "x", f'{{"headstart": {number}}}', "headstart")
    assert content(tmp_path) == {"x/data.json": '{"headstart": 2}'}


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        write(tmp_path / "x", "new")
    assert content(tmp_path) == {"x": "mine"}
