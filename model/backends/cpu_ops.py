"""Operations of a CPU: matrix products, and what lies between them in C (kernels/cpu/).

A layer of a small model is four products and some thirty small operations, and on a CPU it is those
that a step waits for: 8-bit SmolLM2-135M spends 5 of 22 ms in its products. The kernels do the rest
in five passes. The residual stream is float32 and changes in place; products of bfloat16 targets
read 16 bits; heads draft in float32 or 8-bit integers.

Legend: as in ops.py.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.model.cache.kv_cache import KVLayer

from .kernels.cpu import functions
from .kernels.cpu.functions import ActivationFormat, Activations, CpuKernels, KeysValues
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
from .torch_ops import TORCH_OPS, TorchOps, exact_attention, grouped_attention
from .visibility import AdditiveMask

MAX_NEW = 64  # new positions of a sequence; of more, torch's attention is faster


class CpuOps(TorchOps):
    """Computes with kernels in C. Those have no gradients."""

    def __init__(self, kernels: CpuKernels):
        self._kernels = kernels

    def __reduce__(self) -> tuple[Any, ...]:
        return cpu_ops, ()

    def residual_stream(self, embedded_RD: Tensor) -> Tensor:
        return embedded_RD.float()

    def norm_linear(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights, linear: FusedLinear
    ) -> tuple[Tensor, Tensor]:
        normed = self._add_norm(hidden_RD, added_RD, norm, linear.format)
        return hidden_RD, _product(normed, linear)

    def linear_add(self, input_R: Tensor, linear: FusedLinear, hidden_RD: Tensor) -> Tensor | None:
        if linear.format is ActivationFormat.FLOAT32:
            return linear.wide(input_R)
        converted = Activations(input_R.shape[:-1], input_R.shape[-1], linear.format)
        self._kernels.convert(input_R, converted)
        return _product(converted, linear)

    def gated_linear_add(
        self, gate_up_RF: Tensor, activation: Activation, linear: FusedLinear, hidden_RD: Tensor
    ) -> Tensor | None:
        return _product(self._gate(gate_up_RF, activation, linear.format), linear)

    def add_norm(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights
    ) -> tuple[Tensor, Tensor]:
        normed = self._add_norm(hidden_RD, added_RD, norm, ActivationFormat.FLOAT32)
        return hidden_RD, normed.values

    def begin(
        self,
        visibility: CacheVisibility,
        cos_sin: CosSin,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> AttentionContext:
        masks: AdditiveMask | None = None
        if not visibility.all_visible:
            masks = visibility.additive(torch.float32)
            if isinstance(masks, dict):
                masks = {kind: mask[:, 0].contiguous() for kind, mask in masks.items()}
            else:
                masks = masks[:, 0].contiguous()
        cos, sin = cos_sin
        slots_BN = visibility.cache.new_slots(shape[1])
        shared = cos.contiguous(), sin.contiguous()
        return AttentionContext(visibility, shared, shape, dtype, masks, slots_BN)

    def attend(
        self, qkv_RE: Tensor, spec: AttentionSpec, context: AttentionContext, kv_layer: KVLayer
    ) -> Tensor:
        assert context.slots_BN is not None, "begun by other ops"
        batch, new = context.shape
        empty = _empty(batch, spec.kv_heads, spec.head_dim, context.dtype)
        keys, values = kv_layer.allocate(empty, empty)
        assert keys.dtype == context.dtype, "the cache was filled by another backend"
        cache = KeysValues(keys, values)
        queries_BNHC = self._kernels.rotate_store(
            qkv_RE, *spec.norms(wide=True), context.cos_sin, context.slots_BN, cache
        )
        visible, mask_BNS = context.visibility.cache.slots, context.mask(spec.kind)
        exact = spec.exact or keys.dtype == torch.bfloat16
        if new > MAX_NEW:
            attention = exact_attention if exact else grouped_attention
            read = keys[:, :, :visible].float(), values[:, :, :visible].float()
            mask = None if mask_BNS is None else mask_BNS[:, None]
            attended = attention(queries_BNHC.transpose(1, 2), *read, mask, scale=spec.scale)
            return attended.transpose(1, 2).reshape(*qkv_RE.shape[:-1], -1)
        out_RE = torch.empty((*qkv_RE.shape[:-1], spec.heads * spec.head_dim))
        return self._kernels.attend(
            queries_BNHC, cache, visible, mask_BNS, spec.scale, out_RE, exact
        )

    def cached_attention(
        self, queries_BHNC: Tensor, keys: Tensor, values: Tensor, visibility: CacheVisibility
    ) -> Tensor:
        floats = all(one.dtype == torch.float32 for one in (queries_BHNC, keys, values))
        alike = keys.shape == values.shape and keys.stride() == values.stride()
        known = floats and alike and queries_BHNC.shape[2] <= MAX_NEW
        if not known or torch.is_grad_enabled():
            return super().cached_attention(queries_BHNC, keys, values, visibility)
        mask = visibility.additive(torch.float32)
        assert isinstance(mask, Tensor), "a head has one kind of attention"
        queries_BNHC = queries_BHNC.transpose(1, 2).contiguous()
        scale, visible = queries_BHNC.shape[-1] ** -0.5, keys.shape[2]
        mask_BNS = mask[:, 0].contiguous()
        attended_BNHC = self._kernels.attend(
            queries_BNHC, KeysValues(keys, values), visible, mask_BNS, scale,
            torch.empty_like(queries_BNHC),
        )  # fmt: skip
        return attended_BNHC.transpose(1, 2)

    def rms_norm(self, hidden_RD: Tensor, norm: NormWeights) -> Tensor:
        refuse_gradients(hidden_RD)
        hidden_RD = hidden_RD.contiguous()
        return self._add_norm(hidden_RD, None, norm, ActivationFormat.FLOAT32).values

    def linear(self, input_R: Tensor, linear: FusedLinear) -> Tensor:
        refuse_gradients(input_R)
        return linear(input_R)

    def gate(self, gate_up_RF: Tensor, activation: Activation) -> Tensor:
        return self._gate(gate_up_RF, activation, ActivationFormat.FLOAT32).values

    def rope(self, rotary: Rotary, positions_BN: Tensor, like: Tensor) -> CosSin:
        return rotary.from_tables(positions_BN.expand(like.shape[:2]))

    def rotate(
        self, qkv_BNE: Tensor, spec: AttentionSpec, cos_sin: CosSin
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, new, _ = qkv_BNE.shape
        keys, values = torch.empty(2, batch, spec.kv_heads, new, spec.head_dim)
        slots_BN = torch.arange(new).expand(batch, -1).contiguous()
        queries_BNHC = self._kernels.rotate_store(
            qkv_BNE, *spec.norms(wide=True), cos_sin, slots_BN, KeysValues(keys, values)
        )
        return queries_BNHC.transpose(1, 2), keys, values

    def argmax(self, scores_RV: Tensor) -> Tensor:
        """As the reference, but a NaN is not the largest. Torch compares one number after the
        other: 332 us for 8 rows of 49,152."""
        if scores_RV.dtype not in (torch.float32, torch.bfloat16):
            return scores_RV.argmax(-1)
        return self._kernels.argmax(scores_RV.float().contiguous())

    def _add_norm(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights, to: ActivationFormat
    ) -> Activations:
        out = Activations(hidden_RD.shape[:-1], hidden_RD.shape[-1], to)
        self._kernels.residual_norm(hidden_RD, added_RD, norm.wide, norm.eps, out)
        return out

    def _gate(
        self, gate_up_RF: Tensor, activation: Activation, to: ActivationFormat
    ) -> Activations:
        assert activation is F.silu, "the kernel knows SwiGLU alone"
        out = Activations(gate_up_RF.shape[:-1], gate_up_RF.shape[-1] // 2, to)
        self._kernels.gate(gate_up_RF, out)
        return out


def cpu_ops() -> TorchOps:
    """The operations of this CPU: the reference where the kernels cannot be built."""
    kernels = functions.load_kernels()
    return TORCH_OPS if kernels is None else _ops_of(kernels)


@cache
def _ops_of(kernels: CpuKernels) -> CpuOps:
    return CpuOps(kernels)


@lru_cache(maxsize=64)
def _empty(batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """No keys, which only say what a cache has to hold."""
    with torch.inference_mode(False):
        return torch.empty(batch, kv_heads, 0, head_dim, dtype=dtype)


def _product(input: Activations, linear: FusedLinear) -> Tensor:
    if input.format is ActivationFormat.INT8:
        return linear.integers.product(input)
    return linear.wide(input.values).contiguous()
