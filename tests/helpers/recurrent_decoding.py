"""Shared by tests: recurrent decoding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from families import DELTA, SHARED_EXPERTS

NEW_TOKENS = 24
DEEP = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
DEEP |= {"num_hidden_layers": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_next": DELTA | SHARED_EXPERTS | DEEP,
    "qwen3_5_text": DELTA | DEEP,
    "qwen3_5_moe_text": DELTA | SHARED_EXPERTS | DEEP,
}


def answers(steps: Iterator[list[list[int]]], rows: int = 1) -> list[list[int]]:
    told: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for answer, tokens in zip(told, step, strict=True):
            answer += tokens
    return told
