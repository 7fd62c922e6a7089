"""A tiny fused chat model and two small suites, for tests of `headstart bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_model import save

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target

Patch = pytest.MonkeyPatch
Suites = tuple[Path, Path]
Opened = tuple[Target, DraftHead]


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model with a random mtp head, listed for transformers too."""
    folder = tmp_path_factory.mktemp("bench")
    save(folder / "plain", context=512)
    target = load_target(folder / "plain")
    torch.manual_seed(1)
    save_head(make_head(target, "mtp", {}), folder / "head", HeadMeta(target="tiny"))
    fuse(folder / "plain", folder / "head", folder / "fused", index=True)
    return folder / "fused"


@pytest.fixture(scope="module")
def opened(fused: Path) -> Opened:
    return load_fused(fused)


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Suites:
    """A file as benchmarks come, and a folder that `datasets` opens."""
    folder = tmp_path_factory.mktemp("suites")
    file = folder / "talk.jsonl"
    talk = {"suite": "talk", "category": "x"}
    lines = [talk | {"id": f"t-{n}", "turns": [f"tell {'ab' * n}", "more"]} for n in range(1, 6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = folder / "sums"
    data.mkdir()
    rows = [json.dumps({"question": f"what is {n} + {n}?", "answer": "?"}) for n in range(5)]
    (data / "test.jsonl").write_text("\n".join(rows))
    return file, data
