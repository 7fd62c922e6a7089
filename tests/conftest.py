"""What every test shares: no network, the same random numbers, and one small real model."""

from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from headstart.scripts import ui
from headstart.scripts.fetch_smollm2 import fetch_smollm2

# A shell's background jobs ignore Ctrl-C and pass that on, but some tests send it to a child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Tiny models are slower with threads than without, most of all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file (downloaded once, 98 MB)."""
    return fetch_smollm2()


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages in one line, so that they can be searched."""
    monkeypatch.setattr(ui.errors, "_width", 4000)
    monkeypatch.setattr(ui.console, "_width", 4000)
