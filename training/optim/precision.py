"""Resolve `train.precision=auto`: the precision of the head's matrix products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe

# Instructions for bfloat16. Without them a CPU emulates it, slower than float32.
INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def resolve_precision(
    recipe: Recipe, target: Target, metadata: Mapping[str, Any] | None = None
) -> Recipe:
    """Return the recipe with a concrete precision.

    metadata: of the run's checkpoint, whose precision is kept (default: what fits the machine).
    """
    if recipe.train.precision != "auto":
        return recipe
    if metadata is None:
        chosen = _fitting(target)
    else:
        chosen = metadata["recipe"]["train"]["precision"]
    train = recipe.train.model_copy(update={"precision": chosen})
    return recipe.model_copy(update={"train": train})


def _fitting(target: Target) -> str:
    if target.dtype in (torch.bfloat16, torch.float16):
        return "bfloat16"  # a float32 head cannot take its hidden states
    if target.device.type == "cpu" and not native_bfloat16():
        return "float32"
    return "bfloat16"


def native_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware. The checks are private in torch."""
    checks = [getattr(torch.cpu, name, None) for name in INSTRUCTIONS]
    return any(bool(check()) for check in checks if check is not None)
