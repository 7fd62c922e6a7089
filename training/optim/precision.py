"""Which precision a head's matrix products have where the recipe leaves it open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe

# Instructions for bfloat16. Without them a CPU emulates it, slower than float32.
NATIVE = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def with_precision(recipe: Recipe, target: Target, facts: Mapping[str, Any] | None) -> Recipe:
    """The recipe with `auto` resolved: as the run began (facts), else as fits this machine."""
    if recipe.train.precision != "auto":
        return recipe
    chosen = _fitting(target) if facts is None else facts["recipe"]["train"]["precision"]
    train = recipe.train.model_copy(update={"precision": chosen})
    return recipe.model_copy(update={"train": train})


def _fitting(target: Target) -> str:
    if target.dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"  # a float32 head cannot read such a target
    if target.device.type == "cpu" and not native_bfloat16():
        return "float32"
    return "bfloat16"


def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware. The checks are private names of torch."""
    checks = [getattr(torch.cpu, name, None) for name in NATIVE]
    return any(bool(check()) for check in checks if check is not None)
