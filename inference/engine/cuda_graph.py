"""CUDA graphs: a captured function, and sampling without a synchronisation with the host.

Legend: B sequences, N tree nodes, P positions of a path, V vocabulary.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from headstart.model.tree.tree import Tree

from .sampler import NOT_SAMPLED, Sampler

WARM_UPS = 2  # calls before a capture: one fills caches, one checks that nothing waits
# Held during steps with CUDA graphs: while one thread captures, no other may wait for the device.
CAPTURE_LOCK = RLock()
# Processors that read only logits and never wait for the device.
CAPTURABLE: tuple[type, ...] = (
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.LogitNormalization,
)


class CapturedFunction:
    """A function without arguments, on tensors that keep their addresses.

    On CUDA the first call captures it as a CUDA graph, and later calls replay that; elsewhere it is
    called. A function that waits for the device cannot be captured: it is called each time, and a
    warning says so.

    mempool: memory that graphs share (`torch.cuda.graph_pool_handle`); nothing in it outlasts a
        replay.
    in_place: tensors that the function both reads and changes; restored after each call that only
        warms up.
    """

    def __init__(
        self,
        function: Callable[[], object],
        device: torch.device,
        mempool: Any,
        in_place: Sequence[Tensor] = (),
    ):
        self.function, self.device = function, device
        self.mempool, self.in_place = mempool, in_place
        self.graph: torch.cuda.CUDAGraph | None = None
        self._eager = device.type != "cuda"

    def __call__(self) -> None:
        if self.graph is None and not self._eager:
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
            self._eager = True
            warnings.warn(
                f"A part of decoding is not captured as a CUDA graph, because it waits for the "
                f"device ({reason}). It runs eagerly, which is slower.",
                stacklevel=2,
            )
            return
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile; only this one is captured.
        capture = torch.cuda.graph(
            graph, pool=self.mempool, stream=side, capture_error_mode="thread_local"
        )
        with _no_garbage_collection(), capture:
            self.function()
        self.graph = graph

    def _warm_up(self) -> str | None:
        """Call the function a few times; why it cannot be captured, or None."""
        self._call_and_restore()  # fills caches, and may wait for that
        try:
            with _no_waiting():
                for _ in range(WARM_UPS - 1):
                    self._call_and_restore()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return str(error)
        return None

    def _call_and_restore(self) -> None:
        before = [tensor.clone() for tensor in self.in_place]
        try:
            self.function()
        finally:
            for tensor, values in zip(self.in_place, before, strict=True):
                tensor.copy_(values)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within it, Python collects no cycles: destroying another graph would invalidate the
    capture."""
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


def sample_along_path(
    tree: Tree, logits_BNV: Tensor, sampler: Sampler, max_path: int, noise_BPV: Tensor | None
) -> Tensor:
    """`Sampler.sample_tree` with fixed shapes and without a synchronisation with the host.

    max_path: nodes of the longest possible path.
    noise_BPV: `Sampler.noise` of the tokens after the root and on; None: greedy.

    The sampler's processors must read only logits.
    """
    if not sampler.processors and not sampler.sample:
        return logits_BNV.argmax(-1)
    sampled_BN = torch.full_like(tree.tokens_BN, NOT_SAMPLED)
    node_B1 = torch.zeros_like(tree.tokens_BN[:, :1])
    on_path_B1 = torch.ones_like(node_B1, dtype=torch.bool)
    for position in range(min(tree.nodes, max_path)):
        index_B1V = node_B1[..., None].expand(-1, -1, logits_BNV.shape[-1])
        logits_BV = logits_BNV.gather(1, index_B1V)[:, 0]
        scores_BV = sampler.scores(logits_BV, [], range(len(logits_BV)))
        if noise_BPV is not None:
            scores_BV = scores_BV + noise_BPV[:, position]
        token_B1 = scores_BV.argmax(-1, keepdim=True)
        kept_B1 = torch.where(on_path_B1, token_B1, sampled_BN.gather(1, node_B1))
        sampled_BN = sampled_BN.scatter(1, node_B1, kept_B1)
        child_BN = (tree.tokens_BN == token_B1) & (tree.parents_BN == node_B1)
        on_path_B1 = on_path_B1 & child_BN.any(1, keepdim=True)
        node_B1 = torch.where(on_path_B1, child_BN.int().argmax(1, keepdim=True), node_B1)
    return sampled_BN
