"""Which guesses of a tree are kept. That the output is exact is decided here and nowhere else.

Beside it, what verifying as a CUDA graph needs (see `graphs.py`): draws that never ask the host,
and the recording itself.

Legend: B batch rows, N tree nodes, P places of a path, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.generation import logits_process as hf

from headstart.model.tree import Tree

from .sampling import NOT_DRAWN, Sampler

WARM_UPS = 3  # calls before a capture, as torch asks for
# Processors that read nothing but logits and never wait for the device.
CAPTURED: tuple[type, ...] = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.LogitNormalization,
)


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every row, and what it emits.

    path_BP: nodes from the root down; the first counts_B[b] >= 1 are real, the rest is 0.
    tokens_BP: the token drawn at each of them, which is what follows it in the output: place i
    holds the token of node path[i + 1], and the last real place the token that no node guessed.
    """

    path_BP: Tensor
    counts_B: Tensor
    tokens_BP: Tensor

    @property
    def next_B(self) -> Tensor:
        """The token after the accepted path: the root of the next tree."""
        return self.tokens_BP.gather(1, self.counts_B[:, None] - 1)[:, 0]

    def first(self, places: int) -> Accepted:
        """The same with the padding cut or filled up to `places`, no fewer than any row's count."""
        more = max(0, places - self.path_BP.shape[1])
        path_BP = pad(self.path_BP[:, :places], (0, more))
        return Accepted(path_BP, self.counts_B, pad(self.tokens_BP[:, :places], (0, more)))


def accept(tree: Tree, draws_BN: Tensor) -> Accepted:
    """Walk from the root to the child that matches the draw, as far as it goes.

    draws_BN: for each node one draw from the target's distribution after it (`Sampler.draw`; greedy
    decoding draws the likeliest token), -1 where the walk cannot come by. Pure. P is N.

    The token emitted after a node is always the target's own draw there, whatever the tree holds: a
    tree can be bad, never wrong. A child is met with the target's probability of it, which no
    lossless rule can beat for a tree that was fixed without looking at the draws. Nodes of one
    depth share their noise, because only one of them is ever on the path; so the tokens equal
    those of plain decoding with the same noise.

    Drafts that are themselves *sampled* (not the likeliest tokens but draws from the draft's
    distribution q) may be accepted more often than this. That needs q of each parent (N x V, after
    the same temperature and top-p as the target, both from an fp32 softmax), uniform noise per
    node, children drawn without replacement, and rejection: accept child c with probability
    min(1, p(c) / q(c)), else p <- norm(max(p - q, 0)), q(c) <- 0, q <- norm(q), and try its next
    sibling (SpecInfer, arXiv 2305.09781). How many nodes are verified must then not depend on
    their values.
    """
    if tree.nodes == 1:
        zeros_B1 = torch.zeros_like(draws_BN)
        return Accepted(zeros_B1, zeros_B1[:, 0] + 1, draws_BN)
    drawn_BN = draws_BN.gather(1, tree.parents_BN.clamp(min=0))  # what the parent drew
    missed_BN = (tree.tokens_BN != drawn_BN) | (tree.parents_BN < 0)
    missed_BN[:, 0] = False
    accepted_BN = ~(tree.ancestors_BNN & missed_BN[:, None]).any(-1)
    deepest_B1 = torch.where(accepted_BN, tree.depths_BN, -1).argmax(1, keepdim=True)
    index_B1N = deepest_B1[..., None].expand(-1, -1, tree.nodes)
    on_path_BN = tree.ancestors_BNN.gather(1, index_B1N)[:, 0]
    counts_B = on_path_BN.sum(1)
    # A parent precedes its child, so the path in index order is the path from the root down.
    order_BN = (~on_path_BN).to(torch.uint8).argsort(dim=1, stable=True)
    places_N = torch.arange(tree.nodes, device=order_BN.device)
    path_BN = order_BN.masked_fill(places_N >= counts_B[:, None], 0)
    return Accepted(path_BN, counts_B, draws_BN.gather(1, path_BN))


def walk(
    tree: Tree, logits_BNV: Tensor, sampler: Sampler, places: int, noise_BPV: Tensor | None
) -> Tensor:
    """The draws of `Sampler.draw`, of fixed shape and without asking the host how far a row comes.

    places: of the longest possible path. noise_BPV: `Sampler.noise` of the tokens after the root
    and on, for a sampler that samples. The sampler's processors must read nothing but logits.
    """
    if not sampler.processors and not sampler.sample:
        return logits_BNV.argmax(-1)
    draws_BN = torch.full_like(tree.tokens_BN, NOT_DRAWN)
    at_B1 = torch.zeros_like(tree.tokens_BN[:, :1])
    walking_B1 = torch.ones_like(at_B1, dtype=torch.bool)
    for place in range(min(tree.nodes, places)):
        index_B1V = at_B1[..., None].expand(-1, -1, logits_BNV.shape[-1])
        logits_BV = logits_BNV.gather(1, index_B1V)[:, 0]
        scores_BV = sampler.scores(logits_BV, [], range(len(logits_BV)))
        if noise_BPV is not None:
            scores_BV = scores_BV + noise_BPV[:, place]
        drawn_B1 = scores_BV.argmax(-1, keepdim=True)
        kept_B1 = torch.where(walking_B1, drawn_B1, draws_BN.gather(1, at_B1))
        draws_BN = draws_BN.scatter(1, at_B1, kept_B1)
        met_BN = (tree.tokens_BN == drawn_B1) & (tree.parents_BN == at_B1)
        walking_B1 = walking_B1 & met_BN.any(1, keepdim=True)
        at_B1 = torch.where(walking_B1, met_BN.int().argmax(1, keepdim=True), at_B1)
    return draws_BN


class Replay:
    """A function without arguments that reads and writes tensors which stay where they are.

    On CUDA it is captured at the first call, and played back from then on; elsewhere it is called.
    pool: memory that graphs share (`torch.cuda.graph_pool_handle`), so nothing in it outlasts a
    replay. rewind: what the function both reads and changes; it is put back after each call that
    only prepares the capture. A function that waits for the device cannot be captured: it is called
    each time, and a warning says so.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        pool: Any,
        rewind: Sequence[Tensor] = (),
    ):
        self.function, self.device = function, device
        self.pool, self.rewind = pool, rewind
        self.graph: torch.cuda.CUDAGraph | None = None
        self._waits = device.type != "cuda"

    def __call__(self) -> None:
        if self.graph is None and not self._waits:
            with torch.cuda.device(self.device):
                self._capture()
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()

    def _capture(self) -> None:
        side, main = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            reason = self._warm_up()
        main.wait_stream(side)
        if reason is not None:
            self._waits = True
            warnings.warn(
                f"A part of decoding is not captured as a CUDA graph, because it waits for the "
                f"device ({reason}). It runs as it is, which is slower.",
                stacklevel=2,
            )
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; only this one is recorded.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=side, capture_error_mode="thread_local"
        ):
            self.function()
        self.graph = graph

    def _warm_up(self) -> str | None:
        """Call it a few times. Why it cannot be captured, or None."""
        self._rehearse()  # makes what is made once and kept, and may wait for it
        try:
            with _no_waiting():
                for _ in range(WARM_UPS - 1):
                    self._rehearse()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return str(error)
        return None

    def _rehearse(self) -> None:
        before = [tensor.clone() for tensor in self.rewind]
        try:
            self.function()
        finally:
            for tensor, values in zip(self.rewind, before, strict=True):
                tensor.copy_(values)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within it, an operation that waits for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
