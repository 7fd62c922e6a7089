"""The shortest way of reads on a GPU: matrix products, and what lies between them in Triton.

A step over one token is so short there that starting kernels and going over the same few rows
again and again takes longer than reading the weights. `Accelerated` needs ten kernels per layer,
and seven for one row, where the modules need some thirty-five, and its attention reads the text
once for all nodes of a tree (kernels/triton/). The same blocks serve the heads
(`speed_up_blocks` in swift.py).

Legend: B batch rows, N new rows, R rows of all texts together, D hidden size, M pending columns.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from headstart.model.tree.ops import TORCH_TREE_OPS, TreeOps

if TYPE_CHECKING:
    from headstart.model.cache.kv_cache import KVCache

    from .fused_decoder import Layer, Lean
    from .visibility import Visibility

MOST_ROWS = 512  # new rows of a text; longer ones are left to the model's own modules


def functions(device: torch.device) -> ModuleType | None:
    """The Triton functions, where they run."""
    return _tried(device) if device.type == "cuda" else None


def tree_ops(device: torch.device) -> TreeOps:
    """The tree functions of a device."""
    built = functions(device)
    return TORCH_TREE_OPS if built is None else cast(TreeOps, built)


@cache
def _tried(device: torch.device) -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from headstart.model.backends.kernels import triton as gpu

        gpu.ancestors(torch.full((1, 1), -1, device=device))
    except Exception as error:  # of Triton, of the compiler that it calls, of the driver
        warnings.warn(
            f"Triton cannot be used here ({str(error).strip()[:200]}), so decoding is slower. It "
            "needs a C compiler and a GPU that it knows.",
            stacklevel=3,
        )
        return None
    return gpu


def digest(device: torch.device) -> str | None:
    """Of the functions in Triton and the version that compiles them, where they run."""
    if functions(device) is None:
        return None
    files = sorted((Path(__file__).parent / "kernels" / "triton").glob("*.py"))
    parts = [version("triton").encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class Accelerated:
    """Reads as `Lean` does, with the same weights. All layers
    see the whole text."""

    def __init__(self, lean: Lean, built: ModuleType):
        self._lean, self._built = lean, built

    def accepts(self, ids_BN: Tensor, cache: KVCache) -> bool:
        """As `Lean.accepts`; long prompts are left to the model's own modules."""
        behind = cache.preallocated or cache.width > 0
        return behind and ids_BN.shape[1] <= MOST_ROWS

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache,
        visibility: Visibility,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `Lean.forward`."""
        lean, built, shape = self._lean, self._built, ids_BN.shape
        hidden_BND = lean.embed(ids_BN)
        turn = lean.rotary(hidden_BND, position_ids=positions_BN)
        hidden_RD = hidden_BND.flatten(0, 1).clone()  # of which layers change the numbers in place
        layers = self._row if len(hidden_RD) == 1 else self._rows
        kept = layers(hidden_RD, _Read(shape, turn, cache, visibility.pending_BNM, taps))
        normed_RD = built.residual_norm(hidden_RD, None, lean.norm.weight, lean.norm.eps)
        return normed_RD.view(*shape, -1), kept

    def _rows(self, hidden_RD: Tensor, read: _Read) -> dict[int, Tensor]:
        """All layers, in place; what `read` taps."""
        built, kept = self._built, dict[int, Tensor]()
        added_RD: Tensor | None = None  # by the layer before
        for index, layer in enumerate(self._lean.layers):
            first, second = layer.first, layer.second
            normed_RD = built.residual_norm(hidden_RD, added_RD, first.weight, first.eps)
            if index - 1 in read.taps:
                kept[index - 1] = hidden_RD.clone().view(*read.shape, -1)
            mixed_BNE = layer.qkv(normed_RD).view(*read.shape, -1)
            attended_RD = self._attend(layer, index, mixed_BNE, read)
            added_RD = layer.out(attended_RD)
            normed_RD = built.residual_norm(hidden_RD, added_RD, second.weight, second.eps)
            added_RD = layer.down(built.gate(layer.gate_up(normed_RD)))
        assert added_RD is not None, "no layers"
        hidden_RD += added_RD
        if index in read.taps:
            kept[index] = hidden_RD.clone().view(*read.shape, -1)
        return kept

    def _row(self, hidden_1D: Tensor, read: _Read) -> dict[int, Tensor]:
        """As `_rows`. Norms, gates and sums are parts of the products."""
        product, kept = self._built.row_product, dict[int, Tensor]()
        for index, layer in enumerate(self._lean.layers):
            first, second = layer.first, layer.second
            mixed_1E = product(hidden_1D, layer.qkv.joined, norm=(first.weight, first.eps))
            attended_1E = self._attend(layer, index, mixed_1E[None], read)
            product(attended_1E, layer.out.joined, into=hidden_1D)
            both_1F = product(hidden_1D, layer.gate_up.joined, norm=(second.weight, second.eps))
            product(both_1F, layer.down.joined, gated=True, into=hidden_1D)
            if index in read.taps:
                kept[index] = hidden_1D.clone().view(*read.shape, -1)
        return kept

    def _attend(self, layer: Layer, index: int, mixed_BNE: Tensor, read: _Read) -> Tensor:
        batch, cache = len(mixed_BNE), read.cache
        empty = mixed_BNE.new_empty(batch, layer.groups, 0, layer.channels)
        columns = cache.kv_layers[index].room(empty, empty)
        query_norm, key_norm = layer.query_norm, layer.key_norm
        norms, eps = None, 0.0
        if query_norm is not None and key_norm is not None:
            norms, eps = (query_norm.weight, key_norm.weight), query_norm.eps
        queries_BNHC = self._built.rotate_store(
            mixed_BNE, read.turn, norms, eps, columns, cache.lengths_B, cache.after
        )
        attended_BNHC = self._built.attend(
            queries_BNHC, columns, cache.lengths_B, read.pending_BNM, layer.scale, cache.columns
        )
        return attended_BNHC.view(-1, layer.heads * layer.channels)


@dataclass(frozen=True)
class _Read:
    """What all layers of a read share. shape: B x N. turn: cosines and sines."""

    shape: torch.Size
    turn: tuple[Tensor, Tensor]
    cache: KVCache
    pending_BNM: Tensor
    taps: Sequence[int]
