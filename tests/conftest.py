"""What every test shares: no network, the same random numbers, and one small real model."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a function of Triton is defined

from bench_fixtures import fused, opened, suites  # noqa: F401 (fixtures)
from tiny_checkpoint import TinyCheckpoint, write_tiny_checkpoint

from headstart.scripts import console as ui
from headstart.scripts.options.fetch_smollm2 import fetch_smollm2

# A shell's background jobs ignore Ctrl-C and pass that on, but some tests send it to a child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models are slower with threads than without, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _no_costs_are_kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tiny models would fill the user's folder of measured costs."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headstart.inference.engine.measure_costs.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (downloaded once, 98 MB)."""
    return fetch_smollm2()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """A tiny chat target, heads of every kind and fused checkpoints, to read and not to change."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in one line, so that they can be searched."""
    monkeypatch.setattr(ui.errors, "_width", 4000)
    monkeypatch.setattr(ui.console, "_width", 4000)
