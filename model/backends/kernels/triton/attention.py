# mypy: disable-error-code="no-untyped-def"
"""The attention of a tree behind a cache.

All nodes of a tree see the committed slots, so those are read once for all of them. Which node sees
which pending slot is a matrix of N x M bytes, never one of the sequence's length. The slots are
split between many programs, as a single sequence would leave a GPU idle, and the parts are merged
by their log-sum-exp (arXiv 2311.01282). Numbers of slots are read on the device, so that a CUDA
graph stays right as the sequence grows.

Legend: B sequences, N new positions, H query heads, G key/value heads, C head dimension, S slots of
a cache, M pending slots, P parts of the slots.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 128  # slots that are worth a program of their own
MOST_PARTS = 64
ENOUGH = 2048  # programs that keep any GPU busy; each part takes memory for its sums
ROWS = 16  # queries of a program, which is a matrix unit's least
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_part(
    queries, keys, values, lengths, pending, sums, tops, weights, scale,
    new, pending_count, heads, kv_heads, head_dim, key_row, key_head, value_row, value_head,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    block, sequence = tl.program_id(0), (tl.program_id(1) // kv_heads).to(tl.int64)
    kv_head, part, parts = tl.program_id(1) % kv_heads, tl.program_id(2), tl.num_programs(2)
    shared = heads // kv_heads
    length = tl.load(lengths + sequence)
    end = length + pending_count
    size = tl.cdiv(tl.cdiv(end, parts), SLOTS) * SLOTS
    begin = part * size
    end = tl.minimum(end, begin + size)
    row, at = block * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    real, inside = row < shared * new, at < head_dim
    node = row % new
    query = (sequence * new + node) * heads + kv_head * shared + row // new
    both = real[:, None] & inside[None, :]
    q = tl.load(queries + query[:, None] * head_dim + at[None, :], mask=both, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, SIZE], tl.float32)
    keys += sequence * key_row + kv_head.to(tl.int64) * key_head
    values += sequence * value_row + kv_head.to(tl.int64) * value_head
    bits = pending + (sequence * new + node)[:, None] * pending_count
    for first in range(begin, end, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        known, behind = slot < end, slot - length
        place, there = slot[:, None] * head_dim + at[None, :], known[:, None] & inside[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        v = tl.load(values + place, mask=there, other=0.0)
        if EXACT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        else:
            scores = tl.dot(q, tl.trans(k)) * scale
        asked = real[:, None] & (known & (behind >= 0))[None, :]
        bit = tl.load(bits + behind[None, :], mask=asked, other=0)
        visible = known[None, :] & ((behind < 0)[None, :] | (bit != 0))
        scores = tl.where(visible, scores, -float("inf"))
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
    cell = query * parts + part
    tl.store(sums + cell[:, None] * head_dim + at[None, :], total, mask=both)
    tl.store(tops + cell, top, mask=real)
    tl.store(weights + cell, weight, mask=real)


@triton.jit
def _merge(sums, tops, weights, out, head_dim, parts, PARTS: tl.constexpr, SIZE: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS), tl.arange(0, SIZE)
    cell, inside = query * parts + part, at < head_dim
    top = tl.load(tops + cell, mask=part < parts, other=-float("inf"))
    share = tl.exp2(top - tl.max(top, 0))  # a node sees itself at least
    weight = tl.sum(tl.load(weights + cell, mask=part < parts, other=0.0) * share, 0)
    both = (part < parts)[:, None] & inside[None, :]
    total = tl.load(sums + cell[:, None] * head_dim + at[None, :], mask=both, other=0.0)
    result = tl.sum(total * share[:, None], 0) / weight
    tl.store(out + query * head_dim + at, result.to(out.dtype.element_ty), mask=inside)


def block_sizes(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and slots of a step of `attend` that registers of an H100 hold."""
    if dtype == torch.float32:
        return ROWS, 32 if head_dim <= 128 else 16
    return (64, 64) if head_dim <= 64 else (32, 64) if head_dim <= 128 else (16, 32)


def attend(
    queries_BNHC: Tensor,
    keys_values: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    pending_BNM: Tensor,
    scale: float,
    used: int,
) -> Tensor:
    """Softmax attention of new positions over a cache, B x N x H x C.

    keys_values: of a cache, B x G x S x C, the new ones included. used: slots in use at most.
    pending_BNM: True where a new position sees a pending slot; all see the committed ones.
    """
    keys, values = keys_values
    batch, new, heads, head_dim = queries_BNHC.shape
    kv_heads, pending = keys.shape[1], pending_BNM.shape[2]
    assert keys.shape == values.shape and head_dim == keys.shape[3], "keys and values differ"
    assert keys.stride()[2:] == values.stride()[2:] == (head_dim, 1), "slots are not contiguous"
    queries_BNHC = queries_BNHC.contiguous()
    rows = new * heads // kv_heads
    most, at_once = block_sizes(head_dim, queries_BNHC.dtype)
    block = min(max(triton.next_power_of_2(rows), ROWS), most)
    programs = triton.cdiv(rows, block) * batch * kv_heads  # of one part
    parts = max(min(triton.cdiv(used, PART), MOST_PARTS, ENOUGH // programs), 1)
    sums = queries_BNHC.new_empty(batch, new, heads, parts, head_dim, dtype=torch.float32)
    tops, weights = sums.new_empty(2, batch, new, heads, parts)
    size, exact = triton.next_power_of_2(head_dim), queries_BNHC.dtype == torch.float32
    _attend_part[(triton.cdiv(rows, block), batch * kv_heads, parts)](
        queries_BNHC, keys, values, lengths_B, pending_BNM.contiguous().view(torch.uint8), sums,
        tops, weights, scale * LOG2_E, new, pending, heads, kv_heads, head_dim,
        *keys.stride()[:2], *values.stride()[:2],
        ROWS=block, SLOTS=at_once, SIZE=max(size, 16), EXACT=exact, num_warps=4,
    )  # fmt: skip
    out_BNHC = torch.empty_like(queries_BNHC)
    _merge[(batch * new * heads,)](
        sums, tops, weights, out_BNHC, head_dim, parts,
        PARTS=triton.next_power_of_2(parts), SIZE=size, num_warps=2,
    )  # fmt: skip
    return out_BNHC
