"""Operations of a GPU: matrix products, and what lies between them in Triton (kernels/triton/).

A step over one token is so short there that starting kernels and going over the same few rows
again and again takes longer than reading the weights. A layer takes ten kernels here, and seven for
a single row, where its modules need some thirty-five, and its attention reads the cache once for
all nodes of a tree.

Legend: as in ops.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.model.cache.kv_cache import KVLayer
from headstart.model.tree.ops import Pool

from .linear import FusedLinear
from .ops import (
    Activation,
    AttentionContext,
    AttentionSpec,
    CacheVisibility,
    NormWeights,
    refuse_gradients,
)
from .rotary import CosSin, Rotary
from .torch_ops import TORCH_OPS, TorchOps, grouped_attention

MAX_K = 16  # tokens that the kernel finds one after the other


class TritonOps(TorchOps):
    """Computes with kernels in Triton. Those have no gradients.

    The residual stream has the weights' dtype and changes in place. Norms, gates and sums of a
    single row are parts of its matrix products.
    """

    def __init__(self, kernels: ModuleType):
        self._kernels = kernels

    def __reduce__(self) -> tuple[Any, ...]:
        return triton_ops, (torch.device("cuda"),)

    def residual_stream(self, embedded_RD: Tensor) -> Tensor:
        return embedded_RD.clone()

    def norm_linear(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights, linear: FusedLinear
    ) -> tuple[Tensor, Tensor]:
        if added_RD is None and _one_row(hidden_RD):
            weights = norm.weight, norm.eps
            return hidden_RD, self._kernels.row_product(hidden_RD, linear.joined, norm=weights)
        hidden_RD, normed_RD = self.add_norm(hidden_RD, added_RD, norm)
        return hidden_RD, F.linear(normed_RD, *linear.joined)

    def linear_add(self, input_R: Tensor, linear: FusedLinear, hidden_RD: Tensor) -> Tensor | None:
        if not _one_row(hidden_RD):
            return F.linear(input_R, *linear.joined)
        self._kernels.row_product(input_R, linear.joined, into=hidden_RD)
        return None

    def gated_linear_add(
        self, gate_up_RF: Tensor, activation: Activation, linear: FusedLinear, hidden_RD: Tensor
    ) -> Tensor | None:
        if not _one_row(hidden_RD):
            return F.linear(self.gate(gate_up_RF, activation), *linear.joined)
        assert activation is F.silu, "the kernel knows SwiGLU alone"
        self._kernels.row_product(gate_up_RF, linear.joined, gated=True, into=hidden_RD)
        return None

    def add_norm(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights
    ) -> tuple[Tensor, Tensor]:
        normed_RD = self._kernels.residual_norm(hidden_RD, added_RD, norm.weight, norm.eps)
        return hidden_RD, normed_RD

    def begin(
        self,
        visibility: CacheVisibility,
        cos_sin: CosSin,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> AttentionContext:
        masks = visibility.additive(dtype) if visibility.windowed else None
        return AttentionContext(visibility, cos_sin, shape, dtype, masks)

    def attend(
        self, qkv_RE: Tensor, spec: AttentionSpec, context: AttentionContext, kv_layer: KVLayer
    ) -> Tensor:
        refuse_gradients(qkv_RE)
        qkv_BNE = qkv_RE.view(*context.shape, -1)
        visibility, cache = context.visibility, context.visibility.cache
        empty = qkv_BNE.new_empty(len(qkv_BNE), spec.kv_heads, 0, spec.head_dim)
        keys, values = kv_layer.allocate(empty, empty)
        queries_BNHC = self._kernels.rotate_store(
            qkv_BNE,
            context.cos_sin,
            *spec.norms(wide=False),
            (keys, values),
            cache.lengths_B,
            cache.pending_before,
        )
        if visibility.windowed:
            visible = keys[:, :, : cache.slots], values[:, :, : cache.slots]
            mask = context.mask(spec.kind)
            queries = queries_BNHC.transpose(1, 2)
            attended = grouped_attention(queries, *visible, mask, scale=spec.scale)
            return attended.transpose(1, 2).reshape(*qkv_RE.shape[:-1], -1)
        attended_BNHC: Tensor = self._kernels.attend(
            queries_BNHC, (keys, values), cache.lengths_B, visibility.pending_BNM, spec.scale,
            cache.slots,
        )  # fmt: skip
        return attended_BNHC.view(*qkv_RE.shape[:-1], -1)

    def cached_attention(
        self, queries_BHNC: Tensor, keys: Tensor, values: Tensor, visibility: CacheVisibility
    ) -> Tensor:
        alike = queries_BHNC.dtype == keys.dtype and keys.shape[-1] == values.shape[-1]
        if visibility.windowed or not alike or torch.is_grad_enabled():
            return super().cached_attention(queries_BHNC, keys, values, visibility)
        cache, scale = visibility.cache, queries_BHNC.shape[-1] ** -0.5
        attended_BNHC: Tensor = self._kernels.attend(
            queries_BHNC.transpose(1, 2), (keys, values), cache.lengths_B, visibility.pending_BNM,
            scale, cache.slots,
        )  # fmt: skip
        return attended_BNHC.transpose(1, 2)

    def prepare(self, linear: FusedLinear) -> None:
        linear.join()

    def linear(self, input_R: Tensor, linear: FusedLinear) -> Tensor:
        refuse_gradients(input_R)
        return F.linear(input_R, *linear.joined)

    def gate(self, gate_up_RF: Tensor, activation: Activation) -> Tensor:
        refuse_gradients(gate_up_RF)
        assert activation is F.silu, "the kernel knows SwiGLU alone"
        gated: Tensor = self._kernels.gate(gate_up_RF)
        return gated

    def rope(self, rotary: Rotary, positions_BN: Tensor, like: Tensor) -> CosSin:
        """Frequencies and positions, of which the kernel makes cosines and sines."""
        return rotary.frequencies(like.device), positions_BN.expand(like.shape[:2])

    def rotate(
        self, qkv_BNE: Tensor, spec: AttentionSpec, cos_sin: CosSin
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, new, _ = qkv_BNE.shape
        keys, values = qkv_BNE.new_empty(2, batch, spec.kv_heads, new, spec.head_dim)
        lengths_B = torch.zeros(batch, dtype=torch.int64, device=qkv_BNE.device)
        queries_BNHC = self._kernels.rotate_store(
            qkv_BNE, cos_sin, *spec.norms(wide=False), (keys, values), lengths_B, 0
        )
        return queries_BNHC.transpose(1, 2), keys, values

    def topk_logprobs(self, logits_RV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        if k > MAX_K:
            return super().topk_logprobs(logits_RV, k, temperature)
        *lead, vocabulary = logits_RV.shape
        flat_RV = logits_RV.reshape(-1, vocabulary)
        logp_RK, ids_RK = self._kernels.topk_logprobs(flat_RV, k, temperature)
        return logp_RK.view(*lead, k), ids_RK.view(*lead, k)

    def ancestors(self, parents_BN: Tensor) -> Tensor:
        ancestors_BNN: Tensor = self._kernels.ancestors(parents_BN)
        return ancestors_BNN

    def inherit(self, before_BGM: Tensor | None, parents_BF: Tensor) -> Tensor:
        visible_BFM: Tensor = self._kernels.inherit(before_BGM, parents_BF)
        return visible_BFM

    def expand(
        self,
        pool: Pool,
        used: int,
        frontier_BF: Tensor,
        children: tuple[Tensor, Tensor],
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        frontier: tuple[Tensor, Tensor, Tensor] = self._kernels.expand(
            pool, used, frontier_BF, children, width
        )
        return frontier


def triton_ops(device: torch.device) -> TorchOps:
    """The operations of a GPU: the reference where Triton does not run there."""
    kernels = load_kernels(device)
    return TORCH_OPS if kernels is None else _ops_of(kernels)


@cache
def _ops_of(kernels: ModuleType) -> TritonOps:
    return TritonOps(kernels)


@cache
def load_kernels(device: torch.device) -> ModuleType | None:
    """The kernels in Triton. None, with a warning if there should be any, where they do not run."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from headstart.model.backends.kernels import triton as kernels

        kernels.ancestors(torch.full((1, 1), -1, device=device))
    except Exception as error:  # of Triton, of the compiler that it calls, of the driver
        warnings.warn(
            f"Triton cannot be used here ({str(error).strip()[:200]}), so decoding is slower. It "
            "needs a C compiler and a GPU that it knows.",
            stacklevel=3,
        )
        return None
    return kernels


def kernel_hash() -> str:
    """Hash of the sources and of the version of Triton that compiles them."""
    files = sorted((Path(__file__).parent / "kernels" / "triton").glob("*.py"))
    parts = [version("triton").encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _one_row(hidden_RD: Tensor) -> bool:
    return hidden_RD.numel() == hidden_RD.shape[-1]
