"""The blocks of layers.py for drafting, where many small operations cost more than the arithmetic:
joined products, and what lies between them in C on a CPU (kernels/cpu/), in Triton on a GPU.

`speed_up_blocks` gives a head's blocks these classes; they compute the same. A depth of drafting of
the shipped head takes 1.0 instead of 1.9 ms on a CPU.

Legend: B batch rows, N new positions, R rows (any leading dimensions), M pending columns, H query
heads, G key/value heads, C head channels, S columns, D hidden size.
"""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from headstart.model.backends.kernels.cpu import build as kernels
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.layers import MLP, Attend, Attention, RMSNorm, angles

from . import cuda_ops as accelerated
from .attention import grouped_attention
from .linear import Product


def speed_up_blocks(module: nn.Module) -> None:
    """Of a module whose weights do not change any more, and are float32 if it is on a CPU."""
    device = next(module.parameters()).device
    known: dict[type, type] = {}
    if accelerated.functions(device) is not None:
        known = SWIFT_ON_A_GPU
    elif device.type == "cpu" and kernels.functions() is not None:
        known = SWIFT
    for one in module.modules():
        if type(one) in known:
            one.__class__ = known[type(one)]


class _Swift(nn.Module):
    """Makes its joined products at the first call. Copies and pickles make their own."""

    _products: tuple[Product, ...] = ()

    def products(self, *joined: tuple[nn.Module, ...]) -> tuple[Product, ...]:
        if not self._products:
            self._products = tuple(Product(*linears) for linears in joined)
        return self._products

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_products"}


class SwiftNorm(RMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        out, width = torch.empty_like(hidden), hidden.shape[-1]
        into = out.data_ptr(), kernels.FLOAT32, None
        rows, weight = hidden.numel() // width, self.weight.data_ptr()
        _built(hidden).residual_norm(
            rows, width, hidden.data_ptr(), *kernels.NOTHING, weight, self.eps, *into
        )
        return out


class SwiftAttention(_Swift, Attention):
    _tables: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        config, (batch, new) = self.config, hidden_BTD.shape[:2]
        heads, groups, channels = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        (qkv,) = self.products((self.q_proj, self.k_proj, self.v_proj))
        mixed_BND = qkv(hidden_BTD).contiguous()
        cosines, sines = self._turns(positions_BT.expand(batch, new))
        columns_BN = torch.arange(new).expand(batch, -1).contiguous()
        queries_BNHC = torch.empty(batch, new, heads, channels)
        keys_BGNC, values_BGNC = torch.empty(2, batch, groups, new, channels)
        norms: tuple[int | None, int | None] = (None, None)
        if config.qk_norm:
            norms = self.q_norm.weight.data_ptr(), self.k_norm.weight.data_ptr()
        _built(hidden_BTD).rotate_store(
            batch * new, new, heads, groups, channels, mixed_BND.data_ptr(), kernels.FLOAT32,
            *norms, config.rms_norm_eps, cosines.data_ptr(), sines.data_ptr(),
            columns_BN.data_ptr(), keys_BGNC.data_ptr(), values_BGNC.data_ptr(), kernels.FLOAT32,
            *keys_BGNC.stride()[:2], queries_BNHC.data_ptr(),
        )  # fmt: skip
        attended_BHNC = attend(queries_BNHC.transpose(1, 2), keys_BGNC, values_BGNC)
        return self.o_proj(attended_BHNC.transpose(1, 2).flatten(2))

    def _turns(self, positions_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines B x N x C, from tables that grow with the text."""
        needed = int(positions_BN.max()) + 1
        if self._tables is None or needed > len(self._tables[0]):
            positions_P = torch.arange(1 << needed.bit_length())
            channels, theta = self.config.head_dim, self.config.rope_theta
            half_PC = angles(positions_P, channels, theta, torch.float32)
            self._tables = half_PC.cos().repeat(1, 2), half_PC.sin().repeat(1, 2)
        cosines_PC, sines_PC = self._tables
        return cosines_PC[positions_BN], sines_PC[positions_BN]


class SwiftMLP(_Swift, MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        (gate_up,) = self.products((self.gate_proj, self.up_proj))
        both = gate_up(hidden).contiguous()
        width = both.shape[-1] // 2
        out = torch.empty(*both.shape[:-1], width)
        into = out.data_ptr(), kernels.FLOAT32, None
        _built(hidden).gate(out.numel() // width, width, both.data_ptr(), kernels.FLOAT32, *into)
        return self.down_proj(out)


class SwiftAttentionOnAGPU(_Swift, Attention):
    _frequencies: Tensor | None = None

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        config, (batch, new) = self.config, hidden_BTD.shape[:2]
        groups, channels = config.num_key_value_heads, config.head_dim
        (qkv,) = self.products((self.q_proj, self.k_proj, self.v_proj))
        if self._frequencies is None or self._frequencies.device != hidden_BTD.device:
            one_1 = torch.ones(1, device=hidden_BTD.device)
            self._frequencies = angles(one_1, channels, config.rope_theta, torch.float32)[0]
        turn = self._frequencies, positions_BT.expand(batch, new)
        norms = (self.q_norm.weight, self.k_norm.weight) if config.qk_norm else None
        rotated = qkv(hidden_BTD), turn, norms, config.rms_norm_eps
        built = _on_a_gpu(hidden_BTD)
        if isinstance(attend, CachedAttend):  # keys and values go to their place at once
            cache = attend.cache
            empty = hidden_BTD.new_empty(batch, groups, 0, channels)
            columns = cache.kv_layers[0].room(empty, empty)
            queries_BNHC = built.rotate_store(*rotated, columns, cache.lengths_B, cache.after)
            attended_BHNC = attend.over(queries_BNHC.transpose(1, 2), *columns)
        else:
            keys, values = hidden_BTD.new_empty(2, batch, groups, new, channels)
            nothing_B = positions_BT.new_zeros(batch)
            queries_BNHC = built.rotate_store(*rotated, (keys, values), nothing_B, 0)
            attended_BHNC = attend(queries_BNHC.transpose(1, 2), keys, values)
        return self.o_proj(attended_BHNC.transpose(1, 2).flatten(2))


class SwiftMLPOnAGPU(_Swift, MLP):
    def forward(self, hidden: Tensor) -> Tensor:
        (gate_up,) = self.products((self.gate_proj, self.up_proj))
        out_RF = _on_a_gpu(hidden).gate(gate_up(hidden).flatten(0, -2))
        return self.down_proj(out_RF.view(*hidden.shape[:-1], -1))


SWIFT: dict[type, type] = {RMSNorm: SwiftNorm, Attention: SwiftAttention, MLP: SwiftMLP}
SWIFT_ON_A_GPU: dict[type, type] = {Attention: SwiftAttentionOnAGPU, MLP: SwiftMLPOnAGPU}


class CachedAttend:
    """Attention that puts the new keys into a cache; `pending_BNM` says which of the pending ones a
    query sees, `first_BN` from which column on it sees any."""

    def __init__(self, cache: KVCache, pending_BNM: Tensor, first_BN: Tensor | None = None):
        self.cache, self.pending_BNM, self.first_BN = cache, pending_BNM, first_BN

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.over(queries, *self.cache.update(keys, values, 0))

    def over(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """With the new keys and values in their place."""
        return cached_attention(queries, keys, values, self.cache, self.pending_BNM, self.first_BN)


def cached_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: KVCache,
    pending_BNM: Tensor,
    first_BN: Tensor | None = None,
) -> Tensor:
    """Softmax attention B H N C over columns of a cache, B G S C: the committed ones, and of the
    pending ones those that `pending_BNM` (True: may see) says; none before column first_BN."""
    on_a_gpu = accelerated.functions(queries.device)
    if first_BN is not None:
        mask_BNS = cache.visible(pending_BNM)
        columns_S = torch.arange(mask_BNS.shape[-1], device=mask_BNS.device)
        return _under_a_mask(queries, keys, values, mask_BNS & (columns_S >= first_BN[..., None]))
    alike = queries.dtype == keys.dtype and keys.shape[-1] == values.shape[-1]
    if on_a_gpu is not None and alike and not torch.is_grad_enabled():
        scale, lengths_B = queries.shape[-1] ** -0.5, cache.lengths_B
        attended_BNHC = on_a_gpu.attend(
            queries.transpose(1, 2), (keys, values), lengths_B, pending_BNM, scale, cache.columns
        )
        return attended_BNHC.transpose(1, 2)
    return _under_a_mask(queries, keys, values, cache.visible(pending_BNM))


def _under_a_mask(queries: Tensor, keys: Tensor, values: Tensor, mask_BNS: Tensor) -> Tensor:
    built = kernels.functions() if queries.is_cpu else None
    floats = all(one.dtype == torch.float32 for one in (queries, keys, values))
    batch, heads, new, channels = queries.shape
    small = (
        new <= kernels.LONG and values.shape[-1] == channels and keys.stride() == values.stride()
    )
    if built is None or not floats or not small or torch.is_grad_enabled():
        return grouped_attention(queries, keys, values, mask_BNS[:, None])
    queries_BNHC = queries.transpose(1, 2).contiguous()
    seen_BNS = torch.zeros(mask_BNS.shape).masked_fill_(~mask_BNS, -torch.inf)
    out_BNHC = torch.empty_like(queries_BNHC)
    built.attend(
        batch, new, heads, keys.shape[1], channels, keys.shape[2], queries_BNHC.data_ptr(),
        keys.data_ptr(), values.data_ptr(), kernels.FLOAT32, *keys.stride()[:2],
        seen_BNS.data_ptr(), channels**-0.5, out_BNHC.data_ptr(),
    )  # fmt: skip
    return out_BNHC.transpose(1, 2)


def _on_a_gpu(hidden: Tensor) -> ModuleType:
    """The functions in Triton. ValueError for rows that they do not know."""
    _no_gradients(hidden)
    built = accelerated.functions(hidden.device)
    if built is None:
        raise ValueError(
            f"This head was opened for drafting on a GPU, and is given rows on {hidden.device}. "
            "Load it again for another target."
        )
    return built


def _no_gradients(hidden: Tensor) -> None:
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise ValueError("A head that was opened for drafting has no gradients. Load it again.")


def _built(hidden: Tensor) -> ctypes.CDLL:
    """The functions in C, for rows that they know. ValueError for others."""
    _no_gradients(hidden)
    if hidden.dtype != torch.float32 or not hidden.is_cpu:
        raise ValueError(
            f"This head was opened for drafting in float32 on a CPU, and is given "
            f"{hidden.dtype} on {hidden.device}. Load it again for another target."
        )
    built = kernels.functions()
    assert built is not None
    return built
