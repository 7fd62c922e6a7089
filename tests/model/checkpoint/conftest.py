"""A tiny target and the folder of a head of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from saved_heads import META, random_head, write_sharded_target

from headstart.model.checkpoint.head import save_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target


@pytest.fixture(scope="session")
def sharded_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a target whose weights are in several files; to read, not to change."""
    return write_sharded_target(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="session")
def target(sharded_target: Path) -> Target:
    return load_target(sharded_target)


@pytest.fixture
def saved(target: Target, tmp_path: Path) -> Path:
    """The folder of an eagle3 head."""
    save_head(random_head(target, "eagle3"), tmp_path / "head", META)
    return tmp_path / "head"
