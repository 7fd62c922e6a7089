"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(folder: Path, marker: str) -> Iterator[Path]:
    """Write a folder's files beside it; they take its place when everything is there.

    Yields the folder to write into. When writing fails (a full disk, say) what was there before is
    left as it was. marker: a file that every folder of this sort holds: only such a folder, or an
    empty one, is ever replaced; ValueError for another.
    """
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ValueError(
            f"{folder} holds other files (there is no {marker} in it), and they would be lost. "
            "Name a new or an empty folder."
        )
    part = folder.with_name(f".{folder.name}.part")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
