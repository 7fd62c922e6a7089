"""What a CUDA graph needs: a function that is recorded, and draws that never ask the host.

Legend: B batch rows, N tree nodes, P places of a path, V vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from headstart.model.tree.tree import Tree

from .sampler import NOT_DRAWN, Sampler

WARM_UPS = 2  # calls before a capture: one makes what is kept, one shows that nothing waits
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
        recorded = torch.cuda.graph(
            graph, pool=self.pool, stream=side, capture_error_mode="thread_local"
        )
        with _nothing_collected(), recorded:
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
def _nothing_collected() -> Iterator[None]:
    """Within it, Python collects no cycles: a graph of an earlier plan that ended there would end
    the capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within it, an operation that waits for the device is an error."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


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
