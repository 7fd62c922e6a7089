# mypy: disable-error-code="no-untyped-def"
"""What lies between matrix products, for GPUs: of a decoder layer the same five passes as in c/, of
a tree its ancestors, of a head its likeliest words.

`attend` is the attention of a tree. All its nodes see the committed columns, whose cost is that of
reading them once; who sees whom among the pending columns is a matrix of N x M bytes, never one of
the text's length. The columns are split between many programs, as one row of a batch alone would
leave a GPU idle, and the parts are merged by their log-sum-exp (arXiv 2311.01282). Numbers of
columns are read on the device, so that a CUDA graph stays right as the text grows.

Imported where it is used: Triton is no part of installations without a GPU. With
TRITON_INTERPRET=1 the same code runs on a CPU, which is how tests compare it with PyTorch's
operations.

Legend: B batch rows, N new rows, R = B x N, D hidden size, F inner size of an MLP, H query heads,
G key/value heads, C head channels, S columns of a cache, M pending columns, P parts of the columns,
V words, W best words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 128  # columns that are worth a program of their own
MOST_PARTS = 64
ROWS = 16  # queries of a program, which is a matrix unit's least
GATED = 1024  # numbers of a program of `gate`
LONG_ROW = 4096  # numbers of a row that `row_product` goes over in larger steps
WORDS = 4096  # logits of a program of `best_words`
LOG2_E = 1.4426950408889634


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
    """Adds to the hidden rows, in place; the rows under a root mean square norm."""
    rows, width = hidden_RD.shape
    out_RD = torch.empty_like(hidden_RD)
    size = triton.next_power_of_2(width)
    _residual_norm[(rows,)](
        hidden_RD, hidden_RD if added_RD is None else added_RD, weight_D, out_RD, width, eps,
        HAS_ADDED=added_RD is not None, SIZE=size, num_warps=4 if size <= 2048 else 8,
    )  # fmt: skip
    return out_RD


@triton.jit
def _rotate_store(
    mixed, query_norm, key_norm, eps, cosines, sines, positions, lengths, queries, keys, values,
    new, heads, groups, channels, after, key_row, key_group, value_row, value_group,
    HAS_NORM: tl.constexpr, HAS_TURN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, SIZE)
    inside = at < channels
    half = channels // 2
    other = tl.where(at < half, at + half, at - half)
    source = mixed + (row * (heads + 2 * groups) + head) * channels
    own = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    text = row // new
    column = tl.load(lengths + text) + after + row % new
    if head >= heads + groups:
        group = head - heads - groups
        place = values + text * value_row + group * value_group + column * channels
        tl.store(place + at, own.to(values.dtype.element_ty), mask=inside)
    else:
        pair = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            weight = query_norm if head < heads else key_norm
            scale = 1.0 / tl.sqrt_rn(tl.sum(own * own, 0) / channels + eps)
            own *= scale * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
            pair *= scale * tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
        if HAS_TURN:
            cosine = tl.load(cosines + row * channels + at, mask=inside, other=0.0).to(tl.float32)
            sine = tl.load(sines + row * channels + at, mask=inside, other=0.0).to(tl.float32)
        else:
            position = tl.load(positions + row).to(tl.float32)
            angle = position * tl.load(cosines + at % half, mask=inside, other=0.0)
            cosine, sine = tl.cos(angle), tl.sin(angle)
        turned = own * cosine + tl.where(at < half, -pair, pair) * sine
        if head < heads:
            place = queries + (row * heads + head) * channels
            tl.store(place + at, turned.to(queries.dtype.element_ty), mask=inside)
        else:
            place = keys + text * key_row + (head - heads) * key_group + column * channels
            tl.store(place + at, turned.to(keys.dtype.element_ty), mask=inside)


def rotate_store(
    mixed_BNE: Tensor,
    turn: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    columns: tuple[Tensor, Tensor],
    lengths_B: Tensor,
    after: int,
) -> Tensor:
    """Split a joined product into queries, keys and values, norm and rotate, and put the new keys
    and values behind the text: queries B x N x H x C.

    turn: cosines and sines, both B x N x C; or frequencies (C / 2, float32) and positions (B x N).
    norms: weights of the norms of queries and keys. columns:
    keys and values of a cache, B x G x S x C. after: pending columns in front of the new ones.
    """
    keys, values = columns
    batch, new, width = mixed_BNE.shape
    groups, channels = keys.shape[1], keys.shape[3]
    assert keys.stride()[2:] == values.stride()[2:] == (channels, 1), "columns are not in a row"
    heads = width // channels - 2 * groups
    queries_BNHC = mixed_BNE.new_empty(batch, new, heads, channels)
    weights = (mixed_BNE, mixed_BNE) if norms is None else norms
    first, second = turn[0].contiguous(), turn[1].contiguous()
    known = first.dim() > 1
    angles = (first, second, lengths_B) if known else (first, first, second)
    _rotate_store[(batch * new, heads + 2 * groups)](
        mixed_BNE.contiguous(), *weights, eps, *angles, lengths_B, queries_BNHC, keys, values,
        new, heads, groups, channels, after, *keys.stride()[:2], *values.stride()[:2],
        HAS_NORM=norms is not None, HAS_TURN=known, SIZE=triton.next_power_of_2(channels),
        num_warps=1,
    )  # fmt: skip
    return queries_BNHC


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
    keys += text * key_row + group * key_group
    values += text * value_row + group * value_group
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
        return ROWS, 32
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
    parts = min(max(triton.cdiv(seen, PART), 1), MOST_PARTS)
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
    rows, width = both_RF.shape[0], both_RF.shape[1] // 2
    out_RF = both_RF.new_empty(rows, width)
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
    assert row_1K.shape == (1, 2 * inputs if gated else inputs) and weight_VK.is_contiguous()
    out_1V = row_1K.new_empty(1, outputs) if into is None else into
    norm_K, eps = (row_1K, 0.0) if norm is None else norm
    each, at_once = (4, 512) if inputs < LONG_ROW else (2, 1024)
    _row_product[(triton.cdiv(outputs, each),)](
        row_1K.contiguous(), weight_VK, weight_VK if bias_V is None else bias_V, norm_K, out_1V,
        outputs, inputs, eps, FIRST="norm" if norm else "gate" if gated else "",
        HAS_BIAS=bias_V is not None, ADDS=into is not None, OUTPUTS=each, INPUTS=at_once, STAGES=3,
        num_warps=4,
    )  # fmt: skip
    return out_1V


@triton.jit
def _ancestors(parents, seen, nodes, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * nodes
    node, at = tl.program_id(1), tl.arange(0, SIZE)
    row = at == node
    place = tl.load(parents + first + node).to(tl.int32)
    while place >= 0:
        row = row | (at == place)
        place = tl.load(parents + first + place).to(tl.int32)
    tl.store(seen + (first + node) * nodes + at, row.to(tl.uint8), mask=at < nodes)


def ancestors(parents_BN: Tensor) -> Tensor:
    """`Tree.ancestors_BNN` of its parents."""
    batch, nodes = parents_BN.shape
    seen_BNN = torch.empty(batch, nodes, nodes, dtype=torch.bool, device=parents_BN.device)
    _ancestors[(batch, nodes)](
        parents_BN.contiguous(), seen_BNN.view(torch.uint8), nodes,
        SIZE=triton.next_power_of_2(nodes), num_warps=1,
    )  # fmt: skip
    return seen_BNN


@triton.jit
def _best_of_chunk(
    logits, tops, weights, best, places, words, factor, chunks,
    WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    inside = at < words
    scores = tl.load(logits + row * words + at, mask=inside, other=-float("inf")).to(tl.float32)
    scores *= factor
    top = tl.max(scores, 0)
    slot = row * chunks + chunk
    tl.store(tops + slot, top)
    tl.store(weights + slot, tl.sum(tl.where(inside, tl.exp(scores - top), 0.0), 0))
    for rank in tl.static_range(WIDTH):
        high = tl.max(scores, 0)
        place = tl.min(tl.where(scores == high, at, 2147483647), 0)
        tl.store(best + slot * WIDTH + rank, high)
        tl.store(places + slot * WIDTH + rank, place)
        scores = tl.where(at == place, -float("inf"), scores)


@triton.jit
def _best_of_all(
    tops, weights, best, places, out, ids, chunks,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk, at = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
    top = tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    highest = tl.max(top, 0)
    weight = tl.load(weights + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    normal = highest + tl.log(tl.sum(weight * tl.exp(top - highest), 0))
    inside, first = at < chunks * WIDTH, row * chunks * WIDTH
    scores = tl.load(best + first + at, mask=inside, other=-float("inf"))
    place = tl.load(places + first + at, mask=inside, other=2147483647)
    for rank in tl.static_range(WIDTH):
        high = tl.max(scores, 0)
        chosen = tl.min(tl.where(scores == high, place, 2147483647), 0)
        tl.store(out + row * WIDTH + rank, high - normal)
        tl.store(ids + row * WIDTH + rank, chosen.to(tl.int64))
        scores = tl.where(place == chosen, -float("inf"), scores)


def best_words(logits_RV: Tensor, width: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `width` largest log-probabilities of each row of logits / temperature, and where they
    are: R x W, best first, the first of equals."""
    rows, words = logits_RV.shape
    chunks = triton.cdiv(words, WORDS)
    tops, weights = logits_RV.new_empty(2, rows, chunks, dtype=torch.float32)
    best = tops.new_empty(rows, chunks, width)
    places = torch.empty_like(best, dtype=torch.int32)
    _best_of_chunk[(rows, chunks)](
        logits_RV.contiguous(), tops, weights, best, places, words, 1.0 / temperature, chunks,
        WIDTH=width, SIZE=WORDS, num_warps=8,
    )  # fmt: skip
    out_RW = tops.new_empty(rows, width)
    ids_RW = torch.empty_like(out_RW, dtype=torch.int64)
    _best_of_all[(rows,)](
        tops, weights, best, places, out_RW, ids_RW, chunks,
        WIDTH=width, CHUNKS=triton.next_power_of_2(chunks),
        SIZE=triton.next_power_of_2(chunks * width), num_warps=4,
    )  # fmt: skip
    return out_RW, ids_RW


@triton.jit
def _inherit(held, parents, made, above, old, new, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    parent = row // new * above + tl.load(parents + row)
    seen = tl.load(held + parent * old + at, mask=at < old, other=0)
    seen = tl.where(at == old + row % new, 1, seen)
    tl.store(made + row * (old + new) + at, seen.to(tl.uint8), mask=at < old + new)


def inherit(before_BGM: Tensor | None, parents_BF: Tensor) -> Tensor:
    """Which drafted nodes those of the next depth see: what their parents saw, and themselves.

    before_BGM: of the depth before, the columns of all nodes drafted until then; None for the first
    depth. parents_BF: among those of the depth before. B x F x (M + F).
    """
    batch, new = parents_BF.shape
    above, old = (0, 0) if before_BGM is None else before_BGM.shape[1:]
    after_BFM = torch.empty(batch, new, old + new, dtype=torch.bool, device=parents_BF.device)
    before = after_BFM if before_BGM is None else before_BGM
    _inherit[(batch * new,)](
        before.view(torch.uint8), parents_BF.contiguous(), after_BFM.view(torch.uint8), above, old,
        new, SIZE=triton.next_power_of_2(old + new), num_warps=1,
    )  # fmt: skip
    return after_BFM


@triton.jit
def _expand(
    tokens, parents, scores, room, used, frontier, logp, guesses, logp_row, logp_node, guess_row,
    guess_node, picked, next_tokens, next_parents, above, width, chosen, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < above * width
    parent = tl.load(frontier + row * above + at // width, mask=inside, other=0)
    score = tl.load(scores + row * room + parent, mask=inside, other=0.0)
    place = row * logp_row + at // width * logp_node + at % width
    score += tl.load(logp + place, mask=inside, other=0.0).to(tl.float32)
    place = row * guess_row + at // width * guess_node + at % width
    word = tl.load(guesses + place, mask=inside, other=0)
    new = row * room + used + at
    tl.store(tokens + new, word, mask=inside)
    tl.store(parents + new, parent, mask=inside)
    tl.store(scores + new, score, mask=inside)
    score = tl.where(inside, score, -float("inf"))
    left = inside
    for rank in range(0, chosen):
        high = tl.max(tl.where(left, score, -float("inf")), 0)
        best = tl.min(tl.where(left & (score == high), at, SIZE), 0)
        best = tl.minimum(best, above * width - 1)
        tl.store(picked + row * chosen + rank, (used + best).to(tl.int64))
        tl.store(next_tokens + row * chosen + rank, tl.sum(tl.where(at == best, word, 0), 0))
        tl.store(next_parents + row * chosen + rank, (best // width).to(tl.int64))
        left = left & (at != best)


def expand(
    pool: tuple[Tensor, Tensor, Tensor],
    used: int,
    frontier_BF: Tensor,
    children: tuple[Tensor, Tensor],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the children of a frontier into a pool of nodes, and pick the likeliest as the next.

    pool: tokens, parents and scores, with room behind the `used` ones. frontier_BF: its nodes, as
    places in the pool. children: log-probabilities and tokens, B x F x W. Of the next frontier
    (`width` nodes or all, the first of equals): the places in the pool, the tokens, and each one's
    parent as an index into this frontier.
    """
    tokens_BM, parents_BM, scores_BM = pool
    logp_BFW, words_BFW = children
    batch, above, children_each = logp_BFW.shape
    chosen = min(width, above * children_each)
    assert logp_BFW.stride(2) == words_BFW.stride(2) == 1 and tokens_BM.is_contiguous()
    picked_BW, next_BW, up_BW = frontier_BF.new_empty(3, batch, chosen)
    _expand[(batch,)](
        tokens_BM, parents_BM, scores_BM, tokens_BM.shape[1], used, frontier_BF.contiguous(),
        logp_BFW, words_BFW, *logp_BFW.stride()[:2], *words_BFW.stride()[:2], picked_BW, next_BW,
        up_BW, above, children_each, chosen,
        SIZE=triton.next_power_of_2(above * children_each), num_warps=1,
    )  # fmt: skip
    return picked_BW, next_BW, up_BW
