"""The shipped head, fused with its target on first use."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from headstart.model.paths import cache_folder
from headstart.scripts.console import show

from .fetch_smollm2 import fetch_smollm2

NAME = "smollm2-135m-instruct"


def shipped_head() -> Path:
    """The folder of the shipped head for SmolLM2-135M-Instruct."""
    return Path(str(resources.files("headstart.configs") / "shipped" / NAME))


def shipped_checkpoint() -> Path:
    """SmolLM2-135M-Instruct fused with the shipped head, written on first use."""
    from headstart.model.checkpoint.fuse import fuse
    from headstart.model.checkpoint.fused import is_fused

    head = shipped_head()
    digest = hashlib.sha256()
    for file in sorted(head.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    folder = cache_folder() / f"{NAME}-{digest.hexdigest()[:12]}"
    if not is_fused(folder):
        show(f"fusing SmolLM2-135M-Instruct with the shipped head into {folder}")
        fuse(fetch_smollm2(), head, folder)
    return folder
