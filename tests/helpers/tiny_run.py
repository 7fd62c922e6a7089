"""A training run small enough for a test: a tiny target, tokens that follow a rule, a recipe.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe, make_recipe

VOCAB = 48
# How the names of figures begin that say something of the machine, not of what is learned.
MEASURED = ("tokens_per_second", "tflops", "mfu", "memory_gb", "share_")


def tiny_target(layers: int = 2, device: torch.device | str = "cpu") -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return wrap_target(LlamaForCausalLM(config).to(device))


def follower() -> Tensor:
    """V: the token that follows each token, in one cycle through the vocabulary."""
    return (torch.arange(VOCAB) * 1 + 7) % VOCAB


def rule_target() -> Target:
    """A target that is certain that `follower` holds: its layers pass tokens through unchanged."""
    target = tiny_target()
    with torch.no_grad():
        for name, parameter in target.model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        target.model.get_input_embeddings().weight.copy_(torch.eye(VOCAB))
        target.model.get_output_embeddings().weight.zero_()
        target.model.get_output_embeddings().weight[follower(), torch.arange(VOCAB)] = 2.0
    return target


def rule_rows(count: int, length: int) -> list[list[int]]:
    rows = []
    for row in range(count):
        tokens = [row % VOCAB]
        while len(tokens) < length:
            tokens.append(int(follower()[tokens[-1]]))
        rows.append(tokens)
    return rows


def write_rows(path: Path, rows: list[list[int]], start: int = 3) -> Path:
    lines = [json.dumps({"tokens": row, "spans": [[start, len(row)]]}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def mixed_rows(count: int) -> list[list[int]]:
    """Random tokens in rows of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(6, 30, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def tiny_recipe(folder: Path, data: Path, **train: Any) -> Recipe:
    return make_recipe(
        {
            "target": {"random": {"model_type": "llama"}},
            "head": {"kind": "mtp"},
            "data": {"path": str(data), "max_length": 32, "global_batch_tokens": 128},
            "loss": {"steps": 2, "chunk_rows": 50},
            "train": {"output": str(folder), "precision": "float32", "lr": 1e-2, **train},
        }
    )


def skip_without_deepspeed(*engines: str) -> None:
    """Where one of the engines is DeepSpeed's and that is not installed."""
    if any(engine.startswith("zero") for engine in engines) and not find_spec("deepspeed"):
        pytest.skip("DeepSpeed is not installed")


def learned(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of a line without those that say something of the machine."""
    return {name: value for name, value in figures.items() if not name.startswith(MEASURED)}


def tiny_head(target: Target, kind: str = "mtp", **settings: Any) -> DraftHead:
    torch.manual_seed(1)
    return make_head(target, kind, settings)
