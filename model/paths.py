"""The folder where downloads, kernels and measured costs are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads and measured costs are kept: `$HEADSTART_HOME`, else `~/.cache/headstart`."""
    home = os.environ.get("HEADSTART_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "headstart"
