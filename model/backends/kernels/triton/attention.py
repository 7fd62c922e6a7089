# mypy: disable-error-code="no-untyped-def"
"""The attention of a tree.

All its nodes see the committed columns, whose cost is that of reading them once; who sees whom
among the pending columns is a matrix of N x M bytes, never one of the text's length. The columns
are split between many programs, as one row of a batch alone would leave a GPU idle, and the parts
are merged by their log-sum-exp (arXiv 2311.01282). Numbers of columns are read on the device, so
that a CUDA graph stays right as the text grows.

Legend: B batch rows, N new rows, H query heads, G key/value heads, C head channels, S columns of a
cache, M pending columns, P parts of the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 128  # columns that are worth a program of their own
MOST_PARTS = 64
ENOUGH = 2048  # programs that keep any GPU busy; each part takes memory for its sums
ROWS = 16  # queries of a program, which is a matrix unit's least
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_part(
    queries, keys, values, lengths, pending, sums, tops, weights, scale,
    new, pending_count, heads, groups, channels, key_row, key_group, value_row, value_group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    block, text = tl.program_id(0), (tl.program_id(1) // groups).to(tl.int64)
    group, part, parts = tl.program_id(1) % groups, tl.program_id(2), tl.num_programs(2)
    shared = heads // groups
    length = tl.load(lengths + text)
    end = length + pending_count
    size = tl.cdiv(tl.cdiv(end, parts), COLUMNS) * COLUMNS
    begin = part * size
    end = tl.minimum(end, begin + size)
    row, at = block * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    real, inside = row < shared * new, at < channels
    node = row % new
    query = (text * new + node) * heads + group * shared + row // new
    both = real[:, None] & inside[None, :]
    q = tl.load(queries + query[:, None] * channels + at[None, :], mask=both, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    keys += text * key_row + group.to(tl.int64) * key_group
    values += text * value_row + group.to(tl.int64) * value_group
    bits = pending + (text * new + node)[:, None] * pending_count
    for first in range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        known, behind = column < end, column - length
        place, there = column[:, None] * channels + at[None, :], known[:, None] & inside[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        v = tl.load(values + place, mask=there, other=0.0)
        if EXACT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        else:
            scores = tl.dot(q, tl.trans(k)) * scale
        asked = real[:, None] & (known & (behind >= 0))[None, :]
        bit = tl.load(bits + behind[None, :], mask=asked, other=0)
        seen = known[None, :] & ((behind < 0)[None, :] | (bit != 0))
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - base)
        share = tl.exp2(scores - base[:, None])
        weight = weight * shrink + tl.sum(share, 1)
        if EXACT:
            more = tl.dot(share, v, input_precision="ieee")
        else:
            more = tl.dot(share.to(v.dtype), v)
        total = total * shrink[:, None] + more
        top = higher
    slot = query * parts + part
    tl.store(sums + slot[:, None] * channels + at[None, :], total, mask=both)
    tl.store(tops + slot, top, mask=real)
    tl.store(weights + slot, weight, mask=real)


@triton.jit
def _merge(sums, tops, weights, out, channels, parts, PARTS: tl.constexpr, SIZE: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS), tl.arange(0, SIZE)
    slot, inside = query * parts + part, at < channels
    top = tl.load(tops + slot, mask=part < parts, other=-float("inf"))
    share = tl.exp2(top - tl.max(top, 0))  # a node sees itself at least
    weight = tl.sum(tl.load(weights + slot, mask=part < parts, other=0.0) * share, 0)
    both = (part < parts)[:, None] & inside[None, :]
    total = tl.load(sums + slot[:, None] * channels + at[None, :], mask=both, other=0.0)
    result = tl.sum(total * share[:, None], 0) / weight
    tl.store(out + query * channels + at, result.to(out.dtype.element_ty), mask=inside)


def most_at_once(channels: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and columns of a step of `attend` that registers of an H100 hold."""
    if dtype == torch.float32:
        return ROWS, 32 if channels <= 128 else 16
    return (64, 64) if channels <= 64 else (32, 64) if channels <= 128 else (16, 32)


def attend(
    queries_BNHC: Tensor,
    columns: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    pending_BNM: Tensor,
    scale: float,
    seen: int,
) -> Tensor:
    """Softmax attention B x N x H x C over the committed columns of each text and those pending
    ones that `pending_BNM` (True: may see) says. columns: keys and values of a cache, B x G x S x
    C. seen: columns that are in use at most."""
    keys, values = columns
    batch, new, heads, channels = queries_BNHC.shape
    groups, pending = keys.shape[1], pending_BNM.shape[2]
    assert keys.shape == values.shape and channels == keys.shape[3], "keys and values differ"
    assert keys.stride()[2:] == values.stride()[2:] == (channels, 1), "columns are not in a row"
    queries_BNHC = queries_BNHC.contiguous()
    rows = new * heads // groups
    most, at_once = most_at_once(channels, queries_BNHC.dtype)
    block = min(max(triton.next_power_of_2(rows), ROWS), most)
    programs = triton.cdiv(rows, block) * batch * groups  # of one part
    parts = max(min(triton.cdiv(seen, PART), MOST_PARTS, ENOUGH // programs), 1)
    sums = queries_BNHC.new_empty(batch, new, heads, parts, channels, dtype=torch.float32)
    tops, weights = sums.new_empty(2, batch, new, heads, parts)
    size, exact = triton.next_power_of_2(channels), queries_BNHC.dtype == torch.float32
    _attend_part[(triton.cdiv(rows, block), batch * groups, parts)](
        queries_BNHC, keys, values, lengths_B, pending_BNM.contiguous().view(torch.uint8), sums,
        tops, weights, scale * LOG2_E, new, pending, heads, groups, channels,
        *keys.stride()[:2], *values.stride()[:2],
        ROWS=block, COLUMNS=at_once, SIZE=max(size, 16), EXACT=exact, num_warps=4,
    )  # fmt: skip
    out_BNHC = torch.empty_like(queries_BNHC)
    _merge[(batch * new * heads,)](
        sums, tops, weights, out_BNHC, channels, parts,
        PARTS=triton.next_power_of_2(parts), SIZE=size, num_warps=2,
    )  # fmt: skip
    return out_BNHC
