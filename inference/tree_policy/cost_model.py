"""What a round of decoding costs on this machine, measured once and kept.

Which tree is the best depends on how much longer a read of many nodes takes than one of a single
token: nearly nothing on a large GPU, a fifth of a step per node on many CPUs. So it is timed, in a
few seconds, for the very target and head, and kept in the user's cache folder.

Legend: B batch rows, N tree nodes.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.step_graphs import CAPACITY, Begun, Graphs, Setup, suits
from headstart.inference.engine.verify import accept
from headstart.model.backends.select import kernel_hash
from headstart.model.checkpoint.atomic import replace_text
from headstart.model.heads.common.base import DraftHead
from headstart.model.paths import cache_folder
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .defaults import WIDEST_TREE, fitting

CONTEXT = 256  # tokens in front of what is timed
SHORT_CONTEXT = 32  # in front of the plain steps that tell whether kept costs still hold
BUSY = 1.5
NODES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DEAREST = 4.0  # plain steps; larger trees than that are not timed, they never pay
WIDTH = 3  # of the drafted trees that are timed
REPEATS = 4


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a round, of one text.

    verify[i]: reading a tree of nodes[i] nodes, the first is 1 (a plain step). advance: the head
    takes in a path and makes its first guesses. deepen: one depth more. rest: what a speculative
    round takes besides (choosing nodes, accepting, moving keys).
    """

    nodes: tuple[int, ...]
    verify: tuple[float, ...]
    advance: float
    deepen: float
    rest: float

    def read(self, nodes: int) -> float:
        """Seconds to read so many nodes: between the measured ones in proportion; past the last as
        the last ones grew, or all but the first where that is more: several texts together are
        many nodes, and a GPU on which 64 cost no more than 32 is busy with 512."""
        high = min(max(bisect_left(self.nodes, nodes), 1), len(self.nodes) - 1)
        left, right = self.nodes[high - 1], self.nodes[high]
        low_cost, high_cost = self.verify[high - 1], self.verify[high]
        slope = (high_cost - low_cost) / (right - left)
        if nodes > right > self.nodes[1]:
            slope = max(slope, (high_cost - self.verify[1]) / (right - self.nodes[1]))
        return high_cost + slope * (nodes - right)

    def round(self, nodes: int, depth: int, rows: int = 1) -> float:
        """Seconds of a round with a drafted tree of so many nodes, over `rows` texts together, and
        so many depths; depth 0: drafted by nobody.

        Drafting is timed for one text. For more it is taken to grow as plain steps do.
        """
        seconds = self.read(nodes)
        if nodes > rows or depth:
            drafting = self.advance + (depth - 1) * self.deepen if depth else 0.0
            seconds += (drafting + self.rest) * self.read(rows) / self.read(1)
        return seconds

    @staticmethod
    def known(target: Target, head: DraftHead) -> bool:
        """Whether an earlier run has measured them."""
        return _path(target, head).is_file()

    @staticmethod
    def of(target: Target, head: DraftHead) -> Costs:
        """Measured on this machine, or kept from an earlier run."""
        path = _path(target, head)
        if path.is_file():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))["costs"]
                costs = Costs(tuple(kept.pop("nodes")), tuple(kept.pop("verify")), **kept)
                if not _was_busy(costs, target, head):
                    return costs
            except (ValueError, KeyError, TypeError):
                pass  # written by another version, or damaged: measure again
        replayed = suits(target, head, Sampler())
        costs = (measure_replayed if replayed else measure_costs)(target, head)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"about": _about(target, head), "costs": asdict(costs)}))
        return costs


def _was_busy(costs: Costs, target: Target, head: DraftHead) -> bool:
    """Whether costs were measured while a CPU had other work: a plain step takes much less now.

    What such a moment says of the larger reads and of drafting would be wrong for good.
    """
    if target.device.type != "cpu":
        return False
    timed = _Timer(target, head, SHORT_CONTEXT)
    return costs.read(1) > BUSY * min(timed.read(1) for _ in range(REPEATS))


def measure_costs(target: Target, head: DraftHead) -> Costs:
    """Time the reads and the drafts behind a text of `CONTEXT` tokens; takes seconds."""
    timed = _Timer(target, head)
    counts: list[int] = []
    for nodes in NODES:
        counts.append(nodes)
        if timed.read(nodes) > DEAREST * timed.best[1]:
            break
    for _ in range(REPEATS - 1):  # in turn, so that a busy moment does not hit one count alone
        for nodes in counts:
            timed.read(nodes)
    # Whatever else the machine does only makes a read longer, and more nodes never make it shorter.
    verify = [min(timed.best[more] for more in counts[place:]) for place in range(len(counts))]
    advance, deepen = timed.draft()
    return Costs(tuple(counts), tuple(verify), advance, deepen, timed.rest())


@torch.inference_mode(False)
@torch.no_grad()
def measure_replayed(target: Target, head: DraftHead) -> Costs:
    """Time the parts of a plan, as the host sees them."""
    text, shape = _Timer(target, head), fitting(WIDEST_TREE, head)
    begun = Begun(text.cache, text.state, text.ends, text.ids_1T[:, :1])
    plan = Graphs.of(target).borrow(Setup(target, head, shape, Sampler()), begun.ends, CAPACITY)

    def seconds(part: Callable[[], None]) -> float:
        best = math.inf
        for _ in range(REPEATS + 1):  # the first one records
            plan.begin(begun)
            text.wait()
            start = time.perf_counter()
            part()
            plan.report.tolist()
            best = min(best, time.perf_counter() - start)
        return best

    counts = plan.buckets
    deepest = plan.depths[-1]
    plan.begin(begun)
    plan.draft(deepest)
    read = [seconds(partial(plan.verify, nodes)) for nodes in counts]
    verify = [min(read[place:]) for place in range(len(counts))]
    nothing = seconds(lambda: None)
    first, last = (seconds(partial(plan.draft, depth)) - nothing for depth in (1, deepest))
    Graphs.of(target).give_back(plan)
    deepen = max(last - first, 0.0) / max(deepest - 1, 1)
    return Costs(counts, tuple(verify), first, deepen, rest=0.0)


class _Timer:
    """A text in the caches of a target and a head, and what happens behind it by the clock."""

    @torch.no_grad()
    def __init__(self, target: Target, head: DraftHead, context: int = CONTEXT):
        self.target, self.head = target, head
        known = target.context_limit or context + NODES[-1]
        length = max(1, min(context, known - NODES[-1]))
        steps_T = torch.arange(length, device=target.device)
        self.ids_1T = (steps_T * 31 % target.vocab_size)[None]
        self.cache = target.new_cache(1)
        seen = target.forward(self.ids_1T, self.cache, taps=head.taps, logits=False)
        counts_B = torch.tensor([length], device=target.device)
        self.cache.commit(None, counts_B)
        self.state = head.advance(head.start(1), seen, self.ids_1T, counts_B)
        self.ends = seen.gather(counts_B[:, None] - 1)
        self.best: dict[int, float] = {}

    @torch.no_grad()
    def read(self, nodes: int) -> float:
        """Seconds of a read of so many nodes; `best` keeps the shortest."""
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
        """Seconds to take in two tokens and guess once, and of one depth more."""
        two_B = torch.tensor([2], device=self.target.device)
        ids_12 = self.ids_1T[:, :2] if self.ids_1T.shape[1] > 1 else self.ids_1T.expand(-1, 2)
        seen = self.target.forward(ids_12, self.cache, taps=self.head.taps, logits=False)

        def advance() -> None:
            self.state = self.head.advance(self.state, seen, ids_12, two_B)
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
        """Seconds to accept a path of a tree and to keep its keys, where none lies in place."""
        tree = _comb(self.ids_1T[:, 0], 8)
        draws_BN = tree.tokens_BN.roll(-1, 1)
        counts_B = torch.tensor([2], device=self.target.device)
        path_BP = torch.tensor([[0, 2]], device=self.target.device)

        def after() -> None:
            accept(tree.cut(7).chain_first(), draws_BN[:, :7]).tokens_BP.tolist()
            if not self.target.recurrent:  # where nothing is moved
                self.cache.reserve(8)
                self.cache.commit(path_BP, counts_B)

        return self._time(after)

    def _time(self, run: Callable[[], Any], repeats: int = REPEATS) -> float:
        """The shortest of a few."""
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


def _comb(root_B: torch.Tensor, nodes: int, bare: bool = False) -> Tree:
    """A chain with a leaf beside each link; bare: without leaves."""
    leafy = [-1, *(max(0, (node - 1) // 2 * 2 - 1) for node in range(1, nodes))]
    parents = list(range(-1, nodes - 1)) if bare else leafy
    parents_BN = torch.tensor([parents], device=root_B.device)
    return Tree(root_B[:, None].expand(-1, nodes), parents_BN, torch.zeros_like(parents_BN).float())


def _path(target: Target, head: DraftHead) -> Path:
    about = json.dumps(_about(target, head), sort_keys=True)
    return cache_folder() / "costs" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def _about(target: Target, head: DraftHead) -> dict[str, Any]:
    """Everything that the costs depend on, as far as it is known."""
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
    """The accelerator, or the CPU and what speeds up its matrix products."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
