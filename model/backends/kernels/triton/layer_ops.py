# mypy: disable-error-code="no-untyped-def"
"""What lies between the matrix products of a decoder layer, and products of a single row.

Legend: B sequences, N new positions, R any leading dimensions, D hidden size, F inner size of an
MLP, K inputs, V outputs, E width of queries, keys and values joined, H query heads, G key/value
heads, C head dimension, S slots of a cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

GATED = 1024  # numbers of a program of `gate`
LONG_ROW = 4096  # numbers of a row that `row_product` goes over in larger steps


@triton.jit
def _residual_norm(
    hidden, added, weight, out, width, eps, HAS_ADDED: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    at = tl.arange(0, SIZE)
    inside = at < width
    place = tl.program_id(0).to(tl.int64) * width + at
    values = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADDED:
        values += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(hidden.dtype.element_ty)
        tl.store(hidden + place, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(values * values, 0) / width + eps)
    normed = values * scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


def residual_norm(
    hidden_RD: Tensor, added_RD: Tensor | None, weight_D: Tensor, eps: float
) -> Tensor:
    """Add to the hidden states R x D, in place; their root mean square norm."""
    width = hidden_RD.shape[-1]
    rows = hidden_RD.numel() // width
    assert hidden_RD.is_contiguous() and weight_D.is_contiguous(), "states are not contiguous"
    added_RD = None if added_RD is None else added_RD.contiguous()
    out_RD = torch.empty_like(hidden_RD)
    size = triton.next_power_of_2(width)
    _residual_norm[(rows,)](
        hidden_RD, hidden_RD if added_RD is None else added_RD, weight_D, out_RD, width, eps,
        HAS_ADDED=added_RD is not None, SIZE=size, num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return out_RD


@triton.jit
def _rotate_store(
    qkv, query_norm, key_norm, eps, cosines, sines, positions, lengths, queries, keys, values,
    new, heads, kv_heads, head_dim, after, key_row, key_head, value_row, value_head,
    HAS_NORM: tl.constexpr, HAS_COS_SIN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < head_dim
    half = head_dim // 2
    other = tl.where(at < half, at + half, at - half)
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim
    own = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    sequence = row // new
    slot = tl.load(lengths + sequence) + after + row % new
    if head >= heads + kv_heads:
        kv_head = head - heads - kv_heads
        place = values + sequence * value_row + kv_head * value_head + slot * head_dim
        tl.store(place + at, own.to(values.dtype.element_ty), mask=inside)
    else:
        pair = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = query_norm if head < heads else key_norm
            scale = 1.0 / tl.sqrt_rn(tl.sum(own * own, 0) / head_dim + eps)
            own *= scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            pair *= scale * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
        if HAS_COS_SIN:
            cosine = tl.load(cosines + row * head_dim + at, mask=inside, other=0.0).to(tl.float32)
            sine = tl.load(sines + row * head_dim + at, mask=inside, other=0.0).to(tl.float32)
        else:
            position = tl.load(positions + row).to(tl.float32)
            angle = position * tl.load(cosines + at % half, mask=inside, other=0.0)
            cosine, sine = tl.cos(angle), tl.sin(angle)
        rotated = own * cosine + tl.where(at < half, -pair, pair) * sine
        if head < heads:
            place = queries + (row * heads + head) * head_dim
            tl.store(place + at, rotated.to(queries.dtype.element_ty), mask=inside)
        else:
            place = keys + sequence * key_row + (head - heads) * key_head + slot * head_dim
            tl.store(place + at, rotated.to(keys.dtype.element_ty), mask=inside)


def rotate_store(
    qkv_BNE: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys_values: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    after: int,
) -> Tensor:
    """Split into queries, keys and values, norm and rotate, and write keys and values to a cache.

    cos_sin: cosines and sines, B x N x C; or frequencies (C / 2, float32) and positions (B x N).
    norms: weights of the norms of queries and keys. keys_values: of a cache, B x G x S x C.
    after: pending slots in front of the new ones. Returns the queries B x N x H x C.
    """
    keys, values = keys_values
    batch, new, width = qkv_BNE.shape
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    assert keys.stride()[2:] == values.stride()[2:] == (head_dim, 1), "slots are not contiguous"
    heads = width // head_dim - 2 * kv_heads
    queries_BNHC = qkv_BNE.new_empty(batch, new, heads, head_dim)
    weights = (qkv_BNE, qkv_BNE) if norms is None else norms
    first, second = cos_sin[0].contiguous(), cos_sin[1].contiguous()
    known = first.dim() > 1
    if first.shape[-1] != (head_dim if known else head_dim // 2):
        raise ValueError("the kernel rotates whole heads, but the angles are for a part of one")
    angles = (first, second, lengths_B) if known else (first, first, second)
    _rotate_store[(batch * new, heads + 2 * kv_heads)](
        qkv_BNE.contiguous(), *weights, eps, *angles, lengths_B, queries_BNHC, keys, values,
        new, heads, kv_heads, head_dim, after, *keys.stride()[:2], *values.stride()[:2],
        HAS_NORM=norms is not None, HAS_COS_SIN=known, SIZE=triton.next_power_of_2(head_dim),
        num_warps=1,
    )  # fmt: skip
    return queries_BNHC


@triton.jit
def _gate(both, out, width, SIZE: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < width
    gate = tl.load(both + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + at, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=inside)


def gate(both_RF: Tensor) -> Tensor:
    """R x F of R x 2F: silu of the first half times the second (SwiGLU, arXiv 2002.05202)."""
    *lead, both = both_RF.shape
    rows, width = both_RF.numel() // both, both // 2
    out_RF = both_RF.new_empty(*lead, width)
    _gate[(rows, triton.cdiv(width, GATED))](both_RF.contiguous(), out_RF, width, SIZE=GATED)
    return out_RF


@triton.jit
def _row_product(
    row, weight, bias, norm, out, outputs, inputs, eps,
    FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    squares = tl.zeros([INPUTS], tl.float32)
    for begin in tl.range(0, inputs, INPUTS, num_stages=STAGES):
        k = begin + tl.arange(0, INPUTS)
        values = tl.load(row + k, mask=k < inputs, other=0.0).to(tl.float32)
        if FIRST == "norm":
            squares += values * values
            values *= tl.load(norm + k, mask=k < inputs, other=0.0).to(tl.float32)
        if FIRST == "gate":
            up = tl.load(row + inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
            values = values / (1.0 + tl.exp(-values)) * up
        both = (v < outputs)[:, None] & (k < inputs)[None, :]
        place = v[:, None].to(tl.int64) * inputs + k[None, :]
        total += tl.load(weight + place, mask=both, other=0.0).to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    if FIRST == "norm":
        result *= 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / inputs + eps)
    if HAS_BIAS:
        result += tl.load(bias + v, mask=v < outputs, other=0.0).to(tl.float32)
    if ADDS:
        result += tl.load(out + v, mask=v < outputs, other=0.0).to(tl.float32)
    tl.store(out + v, result.to(out.dtype.element_ty), mask=v < outputs)


def row_product(
    row_1K: Tensor,
    joined: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    into: Tensor | None = None,
) -> Tensor:
    """A product of one row 1 x V, which takes as long as reading its weights, and what comes before
    and after it. norm: weight and eps of a root mean square norm of the row. gated: the row is 1 x
    2K, as `gate` takes it. into: 1 x V that the result is added to, in place."""
    weight_VK, bias_V = joined
    outputs, inputs = weight_VK.shape
    *lead, width = row_1K.shape
    assert row_1K.numel() == width == (2 * inputs if gated else inputs), "not a single row"
    assert weight_VK.is_contiguous() and (into is None or into.numel() == outputs)
    out_1V = row_1K.new_empty(*lead, outputs) if into is None else into
    norm_K, eps = (row_1K, 0.0) if norm is None else norm
    each, at_once = (4, 512) if inputs < LONG_ROW else (2, 1024)
    _row_product[(triton.cdiv(outputs, each),)](
        row_1K.contiguous(), weight_VK, weight_VK if bias_V is None else bias_V, norm_K, out_1V,
        outputs, inputs, eps, FIRST="norm" if norm else "gate" if gated else "",
        HAS_BIAS=bias_V is not None, ADDS=into is not None, OUTPUTS=each, INPUTS=at_once, STAGES=3,
        num_warps=4,
    )  # fmt: skip
    return out_1V
