"""Functions in Triton for GPUs, as the folder c/ has them for CPUs.

Imported where they are used (accelerated.py): Triton is no part of installations without a GPU.
With TRITON_INTERPRET=1 the same code runs on a CPU, which is how tests compare it with PyTorch's
operations.
"""

from .attention import attend
from .layers import gate, residual_norm, rotate_store, row_product
from .trees import ancestors, best_words, expand, inherit

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
