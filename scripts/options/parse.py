"""Option values: choices and lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

OutType = Literal["auto", "f32", "f16", "bf16", "q8_0"]  # of llama.cpp's converter


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers such as `256,2k`; k is 1024. Raises ValueError for anything else."""
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch("[1-9][0-9]*k?", part):
            raise ValueError(
                f"{option} takes whole numbers above 0 separated by commas, such as 1,4 or 256,2k, "
                f"got {text!r}."
            )
    sizes = (int(part.rstrip("k")) * (1024 if part.endswith("k") else 1) for part in parts)
    return tuple(dict.fromkeys(sizes))


def parse_choices(text: str, choices: Sequence[str], option: str) -> tuple[str, ...]:
    """Some of the choices, separated by commas. Raises ValueError for any other name."""
    given = [part.strip() for part in text.split(",")]
    for name in given:
        if name not in choices:
            raise ValueError(f"{option} takes some of {', '.join(choices)}, got {name!r}.")
    return tuple(dict.fromkeys(given))
