"""Atomic writing of files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

ABANDONED = 24 * 3600  # seconds after which an unfinished folder is removed


@contextmanager
def atomic_folder(folder: Path, marker: str, key: str | None = None) -> Iterator[Path]:
    """Replace a folder atomically: yield a new folder to write into, then swap the two.

    If writing fails (full disk, for example), the existing folder is left unchanged.

    folder: the folder to replace or create.
    marker: a file that every folder of this kind holds.
    key: a key of that JSON file, if other folders may hold a file of the same name.

    ValueError if the existing folder is neither of this kind nor empty.
    """
    folder = folder.absolute()
    recover(folder)
    check_overwrite(folder, marker, key)
    for left in folder.parent.glob(f".{escape(folder.name)}.*.part"):
        with suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    # A unique name, since another process may be writing the same folder.
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir(parents=True)
    try:
        yield part
        _swap(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def recover(folder: Path) -> None:
    """Restore a folder whose writer was killed between the two renames of the swap."""
    folder = folder.absolute()
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        with suppress(FileNotFoundError):  # another process has just done it
            old.rename(folder)


def _swap(part: Path, folder: Path) -> None:
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        recover(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def check_overwrite(folder: Path, marker: str, key: str | None) -> None:
    """Raise ValueError for a folder that `atomic_folder` does not replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder. Name a new folder.")
    if not folder.exists() or not any(folder.iterdir()) or _holds(folder / marker, key):
        return
    of = f" with {key!r} in it" if key is not None else ""
    raise ValueError(
        f"{folder} holds other files (there is no {marker}{of}), which would be lost. "
        "Name a new or an empty folder."
    )


def _holds(file: Path, key: str | None) -> bool:
    if key is None or not file.is_file():
        return file.is_file()
    try:
        return key in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError):  # no JSON, or of another shape
        return False
