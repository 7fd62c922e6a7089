# mypy: disable-error-code="no-untyped-def"
"""How a tree grows: the most likely tokens, the nodes of one more depth, and who sees whom.

Legend: B sequences, N nodes, R rows, V vocabulary, W most likely tokens, F frontier nodes, G those
of the depth before, M nodes drafted so far.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096  # logits of a program of `topk_logprobs`


@triton.jit
def _ancestors(parents, visible, nodes, SIZE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * nodes
    node, at = tl.program_id(1), tl.arange(0, SIZE)
    row = at == node
    place = tl.load(parents + first + node).to(tl.int32)
    while place >= 0:
        row = row | (at == place)
        place = tl.load(parents + first + place).to(tl.int32)
    tl.store(visible + (first + node) * nodes + at, row.to(tl.uint8), mask=at < nodes)


def ancestors(parents_BN: Tensor) -> Tensor:
    """`TorchTreeOps.ancestors`."""
    batch, nodes = parents_BN.shape
    visible_BNN = torch.empty(batch, nodes, nodes, dtype=torch.bool, device=parents_BN.device)
    _ancestors[(batch, nodes)](
        parents_BN.contiguous(), visible_BNN.view(torch.uint8), nodes,
        SIZE=triton.next_power_of_2(nodes), num_warps=1,
    )  # fmt: skip
    return visible_BNN


@triton.jit
def _best_of_chunk(
    logits, tops, weights, best, places, vocab_size, factor, chunks,
    WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    inside = at < vocab_size
    scores = tl.load(logits + row * vocab_size + at, mask=inside, other=-float("inf")).to(
        tl.float32
    )
    scores *= factor
    top = tl.max(scores, 0)
    cell = row * chunks + chunk
    tl.store(tops + cell, top)
    base = tl.where(top == -float("inf"), 0.0, top)
    tl.store(weights + cell, tl.sum(tl.where(inside, tl.exp(scores - base), 0.0), 0))
    for rank in tl.static_range(WIDTH):
        high = tl.max(scores, 0)
        place = tl.min(tl.where(scores == high, at, 2147483647), 0)
        tl.store(best + cell * WIDTH + rank, high)
        tl.store(places + cell * WIDTH + rank, place)
        scores = tl.where(at == place, -float("inf"), scores)


@triton.jit
def _best_of_all(
    tops, weights, best, places, out, ids, vocab_size, chunks,
    WIDTH: tl.constexpr, CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk, at = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
    top = tl.load(tops + row * chunks + chunk, mask=chunk < chunks, other=-float("inf"))
    highest = tl.max(top, 0)
    weight = tl.load(weights + row * chunks + chunk, mask=chunk < chunks, other=0.0)
    normal = highest + tl.log(tl.sum(tl.where(weight > 0, weight * tl.exp(top - highest), 0.0), 0))
    inside, first = at < chunks * WIDTH, row * chunks * WIDTH
    scores = tl.load(best + first + at, mask=inside, other=-float("inf"))
    place = tl.load(places + first + at, mask=inside, other=2147483647)
    for rank in tl.static_range(WIDTH):
        high = tl.max(scores, 0)
        chosen = tl.min(tl.where(scores == high, place, 2147483647), 0)
        tl.store(out + row * WIDTH + rank, high - normal)
        chosen = tl.minimum(chosen, vocab_size - 1)  # where numbers are none
        tl.store(ids + row * WIDTH + rank, chosen.to(tl.int64))
        scores = tl.where(place == chosen, -float("inf"), scores)


def topk_logprobs(logits_RV: Tensor, width: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The `width` largest log-probabilities of logits / temperature and their token ids, R x W,
    best first, the first of equals."""
    rows, vocab_size = logits_RV.shape
    chunks = triton.cdiv(vocab_size, CHUNK)
    tops, weights = logits_RV.new_empty(2, rows, chunks, dtype=torch.float32)
    best = tops.new_empty(rows, chunks, width)
    places = torch.empty_like(best, dtype=torch.int32)
    _best_of_chunk[(rows, chunks)](
        logits_RV.contiguous(), tops, weights, best, places, vocab_size, 1.0 / temperature, chunks,
        WIDTH=width, SIZE=CHUNK, num_warps=8,
    )  # fmt: skip
    out_RW = tops.new_empty(rows, width)
    ids_RW = torch.empty_like(out_RW, dtype=torch.int64)
    _best_of_all[(rows,)](
        tops, weights, best, places, out_RW, ids_RW, vocab_size, chunks,
        WIDTH=width, CHUNKS=triton.next_power_of_2(chunks),
        SIZE=triton.next_power_of_2(chunks * width), num_warps=4,
    )  # fmt: skip
    return out_RW, ids_RW


@triton.jit
def _inherit(held, parents, made, above, old, new, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    parent = row // new * above + tl.load(parents + row)
    visible = tl.load(held + parent * old + at, mask=at < old, other=0)
    visible = tl.where(at == old + row % new, 1, visible)
    tl.store(made + row * (old + new) + at, visible.to(tl.uint8), mask=at < old + new)


def inherit(before_BGM: Tensor | None, parents_BF: Tensor) -> Tensor:
    """`TorchTreeOps.inherit`."""
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
    tokens, parents, scores, room, used, frontier, logp, candidates, logp_row, logp_node, token_row,
    token_node, picked, next_tokens, next_parents, above, width, chosen, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE)
    inside = at < above * width
    parent = tl.load(frontier + row * above + at // width, mask=inside, other=0)
    score = tl.load(scores + row * room + parent, mask=inside, other=0.0)
    place = row * logp_row + at // width * logp_node + at % width
    score += tl.load(logp + place, mask=inside, other=0.0).to(tl.float32)
    place = row * token_row + at // width * token_node + at % width
    token = tl.load(candidates + place, mask=inside, other=0)
    new = row * room + used + at
    tl.store(tokens + new, token, mask=inside)
    tl.store(parents + new, parent, mask=inside)
    tl.store(scores + new, score, mask=inside)
    score = tl.where(inside, score, -float("inf"))
    left = inside
    for rank in range(0, chosen):
        high = tl.max(tl.where(left, score, -float("inf")), 0)
        best = tl.min(tl.where(left & (score == high), at, SIZE), 0)
        best = tl.minimum(best, above * width - 1)
        tl.store(picked + row * chosen + rank, (used + best).to(tl.int64))
        tl.store(next_tokens + row * chosen + rank, tl.sum(tl.where(at == best, token, 0), 0))
        tl.store(next_parents + row * chosen + rank, (best // width).to(tl.int64))
        left = left & (at != best)


def expand(
    pool: tuple[Tensor, Tensor, Tensor],
    used: int,
    frontier_BF: Tensor,
    children: tuple[Tensor, Tensor],
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`TorchTreeOps.expand`; of equal scores the first is picked."""
    tokens_BM, parents_BM, scores_BM = pool
    logp_BFW, tokens_BFW = children
    batch, above, children_each = logp_BFW.shape
    chosen = min(width, above * children_each)
    assert logp_BFW.stride(2) == tokens_BFW.stride(2) == 1 and tokens_BM.is_contiguous()
    picked_BW, next_BW, up_BW = frontier_BF.new_empty(3, batch, chosen)
    _expand[(batch,)](
        tokens_BM, parents_BM, scores_BM, tokens_BM.shape[1], used, frontier_BF.contiguous(),
        logp_BFW, tokens_BFW, *logp_BFW.stride()[:2], *tokens_BFW.stride()[:2], picked_BW, next_BW,
        up_BW, above, children_each, chosen,
        SIZE=triton.next_power_of_2(above * children_each), num_warps=1,
    )  # fmt: skip
    return picked_BW, next_BW, up_BW
