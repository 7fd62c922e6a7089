"""Kernels in Triton for GPUs, as functions of tensors.

Imported where they are used (cuda_ops.py): Triton is no part of installations without a GPU. With
TRITON_INTERPRET=1 the same code runs on a CPU, which is how tests compare it with the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import attention
from . import layer_ops as layers
from . import tree_ops as trees


def _on_their_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton starts kernels on the current device, whatever their tensors are on."""

    @wraps(function)
    def start(*given: Any, **named: Any) -> Any:
        with torch.cuda.device_of(_tensors(given)[0]):
            return function(*given, **named)

    return start


def _tensors(given: Any) -> list[Tensor]:
    """Those of the arguments, also within tuples."""
    found: list[Tensor] = []
    for one in given:
        found += [one] if isinstance(one, Tensor) else _tensors(one) if type(one) is tuple else []
    return found


ancestors = _on_their_device(trees.ancestors)
attend = _on_their_device(attention.attend)
topk_logprobs = _on_their_device(trees.topk_logprobs)
expand = _on_their_device(trees.expand)
gate = _on_their_device(layers.gate)
inherit = _on_their_device(trees.inherit)
residual_norm = _on_their_device(layers.residual_norm)
rotate_store = _on_their_device(layers.rotate_store)
row_product = _on_their_device(layers.row_product)

__all__ = [
    "ancestors",
    "attend",
    "expand",
    "gate",
    "inherit",
    "residual_norm",
    "rotate_store",
    "row_product",
    "topk_logprobs",
]
