"""The folder of downloads, compiled kernels and measured costs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$HEADSTART_HOME`, else `~/.cache/headstart`."""
    home = os.environ.get("HEADSTART_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "headstart"
