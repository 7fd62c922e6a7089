"""Rotary position embeddings (arXiv 2104.09864), half-split as in Llama.

Legend: B sequences, N positions, H heads, C head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Cosines and sines, each B x N x C. The ops of a GPU also take frequencies (C / 2) and positions
# (B x N), from which the kernel computes them: see `Ops.rope`.
CosSin = tuple[Tensor, Tensor]


class Rotary:
    """Cosines and sines of one base and head dimension, with tables that grow with the sequence."""

    def __init__(self, head_dim: int, theta: float):
        self.head_dim, self.theta = head_dim, theta
        self._tables: CosSin | None = None
        self._frequencies: Tensor | None = None

    def cos_sin(self, positions_BN: Tensor, dtype: torch.dtype) -> CosSin:
        """Compute cosines and sines B x N x C, from angles in float32 at least: they need the
        precision of the positions, whatever the type of the states."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        half_BNC = angles(positions_BN, self.head_dim, self.theta, wide)
        cos, sin = half_BNC.cos().to(dtype), half_BNC.sin().to(dtype)
        return torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)

    def from_tables(self, positions_BN: Tensor) -> CosSin:
        """Look up cosines and sines B x N x C, in float32 on the CPU."""
        needed = int(positions_BN.max()) + 1
        if self._tables is None or needed > len(self._tables[0]):
            self._tables = self.cos_sin(torch.arange(1 << needed.bit_length()), torch.float32)
        cos_PC, sin_PC = self._tables
        return cos_PC[positions_BN], sin_PC[positions_BN]

    def frequencies(self, device: torch.device) -> Tensor:
        """Angle per position of half the head dimension, C / 2, in float32."""
        if self._frequencies is None or self._frequencies.device != device:
            one_1 = torch.ones(1, device=device)
            self._frequencies = angles(one_1, self.head_dim, self.theta, torch.float32)[0]
        return self._frequencies


def angles(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Compute rotary angles of half the head dimension, in the given type."""
    half = head_dim // 2
    steps = torch.arange(half, dtype=dtype, device=positions.device) / half
    return positions[..., None].to(dtype) * theta**-steps


def rotate(states_BHNC: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotate queries or keys by the angles of their positions."""
    cos_BNC, sin_BNC = cos_sin
    left, right = states_BHNC.chunk(2, -1)
    rotated = torch.cat([-right, left], -1)
    return states_BHNC * cos_BNC[:, None] + rotated * sin_BNC[:, None]
