"""Functions in Triton for GPUs, as kernels/cpu has them for CPUs.

Imported where they are used (accelerated.py): Triton is no part of installations without a GPU.
With TRITON_INTERPRET=1 the same code runs on a CPU, which is how tests compare it with PyTorch's
operations.
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


def _where_its_tensors_are(function: Callable[..., Any]) -> Callable[..., Any]:
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


ancestors = _where_its_tensors_are(trees.ancestors)
attend = _where_its_tensors_are(attention.attend)
best_words = _where_its_tensors_are(trees.best_words)
expand = _where_its_tensors_are(trees.expand)
gate = _where_its_tensors_are(layers.gate)
inherit = _where_its_tensors_are(trees.inherit)
residual_norm = _where_its_tensors_are(layers.residual_norm)
rotate_store = _where_its_tensors_are(layers.rotate_store)
row_product = _where_its_tensors_are(layers.row_product)

__all__ = [
    "ancestors",
    "attend",
    "best_words",
    "expand",
    "gate",
    "inherit",
    "residual_norm",
    "rotate_store",
    "row_product",
]
