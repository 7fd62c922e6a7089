"""Files and folders that appear whole or not at all, and the folder of what is kept for later."""

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

ABANDONED = 24 * 3600  # seconds after which a part that nobody has finished is removed


@contextmanager
def atomic_folder(folder: Path, marker: str, key: str | None = None) -> Iterator[Path]:
    """Write a folder's files beside it; they take its place when everything is there.

    Yields the folder to write into. When writing fails (a full disk, say) what was there before is
    left as it was. marker: a file that every folder of this sort holds. key: what is in it, where
    others have files of that name (JSON). Only such a folder, or an empty one, is ever replaced;
    ValueError for another.
    """
    folder = folder.absolute()
    recover(folder)
    check_overwrite(folder, marker, key)
    for left in folder.parent.glob(f".{escape(folder.name)}.*.part"):
        with suppress(FileNotFoundError):  # its writer has just finished it
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    # A name of its own: another process may be writing the same folder.
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
    """Write a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def recover(folder: Path) -> None:
    """Bring a folder back whose writer was stopped just before the new one took its place."""
    folder = folder.absolute()
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        with suppress(FileNotFoundError):  # another process did it just now
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
    """ValueError for a folder that `written_beside` does not replace."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a folder is to be written. Name a new folder.")
    if not folder.exists() or not any(folder.iterdir()) or _holds(folder / marker, key):
        return
    of = f" with {key!r} in it" if key is not None else ""
    raise ValueError(
        f"{folder} holds other files (there is no {marker}{of}), and they would be lost. "
        "Name a new or an empty folder."
    )


def _holds(file: Path, key: str | None) -> bool:
    if key is None or not file.is_file():
        return file.is_file()
    try:
        return key in json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, TypeError):  # no JSON, or of another shape
        return False
