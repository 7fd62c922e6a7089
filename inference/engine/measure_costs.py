"""Measure what a decode step costs on this machine, once per target and head.

Takes a few seconds; the numbers stay in the user's cache folder. `tree_policy.cost_model` says what
they mean.

Legend: B sequences, P positions of a path, T prompt positions.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.inference.tree_policy.cost_model import Costs
from headstart.inference.tree_policy.defaults import WIDEST_TREE, clamp_to_head
from headstart.model.backends.select import kernel_hash, select_ops
from headstart.model.checkpoint.atomic import replace_text
from headstart.model.heads.common.base import DraftHead
from headstart.model.paths import cache_folder
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .cuda_graph import CAPTURE_LOCK
from .graph_pool import graph_pool
from .graph_runner import MIN_CAPACITY, supports_cuda_graphs
from .sampler import Sampler
from .step_graphs import PrefillState, StepGraphs
from .verify import accept

CONTEXT = 256  # tokens before what is timed
SHORT_CONTEXT = 32  # tokens before the steps that check whether stored costs still hold
BUSY_RATIO = 1.5  # of a stored to a new time, above which the machine was busy when it was stored
NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MAX_COST = 4.0  # autoregressive steps; larger trees than that are not timed, they never pay
WIDTH = 3  # of the drafted trees that are timed
REPEATS = 4


def measured_costs(target: Target, head: DraftHead) -> Costs:
    """The costs of this target and head on this machine: stored by an earlier run, or measured
    now."""
    path = _path(target, head)
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))["costs"]
            costs = Costs(tuple(stored.pop("nodes")), tuple(stored.pop("verify")), **stored)
            if not _was_busy(costs, target, head):
                return costs
        except (ValueError, KeyError, TypeError):
            pass  # written by another version, or damaged: measure again
    captured = supports_cuda_graphs(target, head, Sampler())
    costs = (measure_graphs if captured else measure_eager)(target, head)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = costs_key(target, head)
    replace_text(path, json.dumps({"about": about, "costs": asdict(costs)}))
    return costs


def are_measured(target: Target, head: DraftHead) -> bool:
    """Whether an earlier run has stored the costs."""
    return _path(target, head).is_file()


def _was_busy(costs: Costs, target: Target, head: DraftHead) -> bool:
    """Whether a CPU had other work when costs were measured: an autoregressive step takes much less
    time now. Costs of larger trees and of drafting would then be wrong for good."""
    if target.device.type != "cpu":
        return False
    timer = _Timer(target, head, SHORT_CONTEXT)
    now = min(timer.verify(1) for _ in range(REPEATS))
    return costs.verify_seconds(1) > BUSY_RATIO * now


def measure_eager(target: Target, head: DraftHead) -> Costs:
    """Time verifying and drafting after `CONTEXT` tokens; takes seconds."""
    timer = _Timer(target, head)
    counts: list[int] = []
    for nodes in NODES:
        counts.append(nodes)
        if timer.verify(nodes) > MAX_COST * timer.best[1]:
            break
    for _ in range(REPEATS - 1):  # in turn, so that a busy moment does not hit one count alone
        for nodes in counts:
            timer.verify(nodes)
    # Other work on the machine only makes a pass longer, and more nodes never make it shorter.
    verify = [min(timer.best[more] for more in counts[place:]) for place in range(len(counts))]
    advance, deepen = timer.draft()
    return Costs(tuple(counts), tuple(verify), advance, deepen, timer.rest())


@torch.inference_mode(False)
@torch.no_grad()
def measure_graphs(target: Target, head: DraftHead) -> Costs:
    """Time the captured parts of a step, as the host sees them."""
    with CAPTURE_LOCK:
        timer, shape = _Timer(target, head), clamp_to_head(WIDEST_TREE, head)
        start = PrefillState(timer.cache, timer.state, timer.last_output, timer.ids_1T[:, :1])
        pool = graph_pool(target)
        graphs = pool.acquire(target, head, shape, Sampler(), start.last_output, MIN_CAPACITY)
        costs = _time_graphs(graphs, start, timer)
        pool.release(graphs)
        return costs


def _time_graphs(graphs: StepGraphs, start: PrefillState, timer: _Timer) -> Costs:
    def seconds(part: Callable[[], None]) -> float:
        best = math.inf
        for _ in range(REPEATS + 1):  # the first one captures
            graphs.start(start)
            timer.wait()
            begin = time.perf_counter()
            part()
            graphs.report.tolist()
            best = min(best, time.perf_counter() - begin)
        return best

    counts, deepest = graphs.node_counts, graphs.depths[-1]
    graphs.start(start)
    graphs.draft(deepest)
    by_count = [seconds(partial(graphs.verify, nodes)) for nodes in counts]
    verify = [min(by_count[place:]) for place in range(len(counts))]
    nothing = seconds(lambda: None)
    first, last = (seconds(partial(graphs.draft, depth)) - nothing for depth in (1, deepest))
    deepen = max(last - first, 0.0) / max(deepest - 1, 1)
    return Costs(counts, tuple(verify), first, deepen, rest=0.0)


class _Timer:
    """Times steps after a context that is in the caches of a target and a head.

    best: by node count, the shortest time of a verify pass.
    """

    @torch.no_grad()
    def __init__(self, target: Target, head: DraftHead, context: int = CONTEXT):
        self.target, self.head = target, head
        limit = target.context_limit or context + NODES[-1]
        length = max(1, min(context, limit - NODES[-1]))
        steps_T = torch.arange(length, device=target.device)
        self.ids_1T = (steps_T * 31 % target.vocab_size)[None]
        self.cache = target.new_cache(1)
        output = target.forward(self.ids_1T, self.cache, taps=head.taps, logits=False)
        counts_B = torch.tensor([length], device=target.device)
        self.cache.commit(None, counts_B)
        self.state = head.advance(head.start(1), output, self.ids_1T, counts_B)
        self.last_output = output.gather(counts_B[:, None] - 1)
        self.best: dict[int, float] = {}

    @torch.no_grad()
    def verify(self, nodes: int) -> float:
        """Seconds of a forward pass over a tree of so many nodes; `best` keeps the shortest."""
        root_B = self.ids_1T[:, 0]
        tree = Tree.root(root_B) if nodes == 1 else _comb(root_B, nodes, self.target.recurrent)
        repeats = 1 if nodes in self.best else 2  # the first packs weights
        seconds = self._time(
            lambda: self.target.forward(tree, self.cache, taps=self.head.taps), repeats
        )
        self.best[nodes] = min(seconds, self.best.get(nodes, seconds))
        return seconds

    @torch.no_grad()
    def draft(self) -> tuple[float, float]:
        """Seconds to process two tokens and draft one depth, and of one depth more."""
        two_B = torch.tensor([2], device=self.target.device)
        ids_12 = self.ids_1T[:, :2] if self.ids_1T.shape[1] > 1 else self.ids_1T.expand(-1, 2)
        output = self.target.forward(ids_12, self.cache, taps=self.head.taps, logits=False)

        def advance() -> None:
            self.state = self.head.advance(self.state, output, ids_12, two_B)
            self.head.draft(self.state, TreeShape.dynamic(NODES[-1], 1, WIDTH))

        first = self._time(advance)
        deepest = min(3, self.head.max_depth or 3)
        if deepest == 1:
            return first, 0.0
        by_depth = [
            self._time(lambda depth=depth: self._grow(depth))  # type: ignore[misc]
            for depth in (1, deepest)
        ]
        return first, max(0.0, by_depth[1] - by_depth[0]) / (deepest - 1)

    def _grow(self, depth: int) -> None:
        self.head.draft(self.state, TreeShape.dynamic(NODES[-1], depth, WIDTH))

    @torch.no_grad()
    def rest(self) -> float:
        """Seconds to accept a path of a tree and to move its keys."""
        tree = _comb(self.ids_1T[:, 0], 8)
        sampled_BN = tree.tokens_BN.roll(-1, 1)
        counts_B = torch.tensor([2], device=self.target.device)
        path_BP = torch.tensor([[0, 2]], device=self.target.device)

        def after() -> None:
            accept(tree.cut(7).chain_first(), sampled_BN[:, :7]).sampled_tokens_BP.tolist()
            if not self.target.recurrent:  # whose chains are in place
                self.cache.reserve(8)
                self.cache.commit(path_BP, counts_B)

        return self._time(after)

    def _time(self, run: Callable[[], Any], repeats: int = REPEATS) -> float:
        """The shortest time of a few."""
        seconds: list[float] = []
        for _ in range(repeats):
            self.wait()
            begin = time.perf_counter()
            run()
            self.wait()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def wait(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)


def _comb(root_B: Tensor, nodes: int, is_chain: bool = False) -> Tree:
    """A chain with a leaf beside each node; or a bare chain."""
    leafy = [-1, *(max(0, (node - 1) // 2 * 2 - 1) for node in range(1, nodes))]
    parents = list(range(-1, nodes - 1)) if is_chain else leafy
    parents_BN = torch.tensor([parents], device=root_B.device)
    tokens_BN, scores_BN = root_B[:, None].expand(-1, nodes), torch.zeros_like(parents_BN).float()
    return Tree(tokens_BN, parents_BN, scores_BN, select_ops(root_B.device))


def _path(target: Target, head: DraftHead) -> Path:
    about = json.dumps(costs_key(target, head), sort_keys=True)
    return cache_folder() / "costs" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def costs_key(target: Target, head: DraftHead) -> dict[str, Any]:
    """What stored costs depend on."""
    return {
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "dtype": target.quantized or str(target.dtype),
        "target": target.config.to_json_string(),
        "head": head.config.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers", "headstart")},
        "nodes": NODES,
        "kernels": kernel_hash(target.device),
    }


def device_name(device: torch.device) -> str:
    """The accelerator, or the CPU with the instruction set that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
