"""Rounds of fixed shape for CUDA: recorded once as CUDA graphs, then played back as one.

Starting the thousands of kernels of a round takes longer than running them. A graph knows its
tensors by address and cannot ask the host anything, so a round has two parts that never change:

    draft    the head takes in what was accepted last, and guesses a tree of some depth
    verify   the target reads the likeliest nodes of it; a path is accepted and committed

and the host waits once, for the numbers of `Plan.report`. What differs from the loop of `decode`:

- A round reads one of a few counts of nodes, each a graph of its own, as each depth of drafting
  is. A budget chooses by the scores of the tree before: those of the new one are not on the host
  yet.
- A complete row stays in the batch, as one whose text is empty. Nothing that it says is used.
- Where a tree would run past the context, or no row has room for it, a round is a plain step.
- Draws are made step by step along the path, from noise that is laid out beforehand.
- There are no looked up guesses and no processors that read the text: see `supports_cuda_graphs`.

Elsewhere the same functions are called as they are. Tests compare that with plain decoding.

Legend: B batch rows, N tree nodes, P places of a path, T prompt positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import RLock

import torch
from torch import Tensor

from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.inference.tree_policy.cost_model import Costs
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .draft import read_prompts
from .sampler import Sampler
from .sequence import SequenceState, StopCriteria, draws
from .stats import Stats
from .step_graphs import CAPACITY, Begun, Graphs, Plan, Setup

AHEAD = 256  # tokens that a new cache has room for, unless the answers are shorter
ROUNDS = RLock()  # one at a time: while one is recorded, nobody may wait for the device


class GraphLoop:
    """One batch on its way, as `decode._Loop`. graphs: plans of earlier runs."""

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        rows: list[SequenceState],
        sampler: Sampler,
        stop: StopCriteria,
        shape: TreeShape,
        costs: Costs | None,
        stats: Stats,
        graphs: Graphs,
    ):
        self.target, self.head, self.sampler, self.stop = target, head, sampler, stop
        self.rows, self.shape, self.stats, self.graphs = rows, shape, stats, graphs
        self.going = len(rows)  # rows that are not complete, as far as the plan knows
        self.policy = None if costs is None or head is None else AdaptivePolicy(costs)
        self.begun: Begun | None = None  # until the first round
        self.plan: Plan | None = None
        self.scores: dict[int, list[float]] = {}  # of the last tree, by row number

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens_BT: Tensor, lengths_B: Tensor) -> Iterator[list[list[int]]]:
        self.stats.begin(len(self.rows), self.target.device)
        with ROUNDS:
            emitted = self._take(self._prompt(tokens_BT, lengths_B), None)
        try:
            while True:
                self.stats.lap("host")
                yield emitted
                self.stats.pause()
                alive = [row for row in self.rows if row.remaining_tokens]
                if not alive:
                    return
                with ROUNDS:
                    emitted = self._take(*self._round(alive))
        finally:
            if self.plan is not None:
                self.graphs.give_back(self.plan)

    def _prompt(self, tokens_BT: Tensor, lengths_B: Tensor) -> dict[int, list[int]]:
        """Read the prompts and draw the first token of each answer, by row number."""
        head, batch = self.head, len(self.rows)
        cache, layers = self.target.new_cache(batch), () if head is None else head.taps
        read = read_prompts(self.target, cache, layers, tokens_BT, lengths_B, self._draw)
        cache.commit(None, lengths_B)
        state = None
        if head is not None:
            state = head.advance(head.start(batch), read.output, read.next_BP, lengths_B)
        first_B1 = read.root_B[:, None]
        self.begun = Begun(cache, state, read.output.gather(lengths_B[:, None] - 1), first_B1)
        self.stats.lap("prefill")
        return {row.number: one for row, one in zip(self.rows, first_B1.tolist(), strict=True)}

    def _draw(self, tree: Tree, logits_BNV: Tensor) -> Tensor:
        return draws(self.sampler, self.rows, tree, logits_BNV)

    def _take(
        self, drawn: dict[int, list[int]], depth: int | None, drafted: int = 0
    ) -> list[list[int]]:
        """Add what was drawn to the answers; the part of it that belongs there, by row."""
        emitted: list[list[int]] = [[] for _ in self.rows]
        for number, tokens in drawn.items():
            emitted[number] = self.rows[number].append_tokens(tokens, self.stop)
        counts = [len(emitted[number]) for number in drawn]
        self.stats.count(counts, [len(tokens) for tokens in drawn.values()], depth, drafted)
        return emitted

    def _round(self, alive: Sequence[SequenceState]) -> tuple[dict[int, list[int]], int, int]:
        """What was drawn, by row number, the depth of the tree, and how many guesses were read."""
        plan = self._roomy(alive)
        if len(alive) < self.going:
            plan.retire([row.remaining_tokens > 0 for row in self.rows])
            self.going = len(alive)
        depth, nodes = self._wanted(plan, alive)
        if self.head is not None:
            plan.draft(depth)
            self.stats.lap("draft")
        plan.make_noise(self.sampler, self.rows)
        plan.verify(nodes)
        report = plan.report.tolist()
        self.stats.lap("verify")
        drawn, read = {}, max(int(report[row.number][1]) for row in alive)
        for row in alive:
            count, _, *numbers = report[row.number]
            drawn[row.number] = [int(token) for token in numbers[: int(count)]]
            self.scores[row.number] = numbers[plan.places :]
        if self.policy is not None:
            emitted = sum(map(len, drawn.values()))
            self.policy.update(len(alive), emitted, nodes, depth, verified_depth=read)
        return drawn, read, len(alive) * (nodes - 1)

    def _roomy(self, alive: Sequence[SequenceState]) -> Plan:
        """A plan with room for one more round."""
        needed = max(row.length for row in alive) + _spare(self.shape)
        before, begun = self.plan, self.begun
        if before is not None and needed <= before.capacity:
            return before
        capacity = CAPACITY
        while capacity < needed + min(AHEAD, max(row.remaining_tokens for row in alive)):
            capacity *= 2
        setup = Setup(self.target, self.head, self.shape, self.sampler)
        if before is not None:
            self.plan = self.graphs.borrow(setup, before.seen, capacity)
            self.plan.follow(before)
            self.graphs.give_back(before)
        else:
            assert begun is not None
            self.plan, self.begun = self.graphs.borrow(setup, begun.ends, capacity), None
            self.plan.begin(begun)
        return self.plan

    def _wanted(self, plan: Plan, alive: Sequence[SequenceState]) -> tuple[int, int]:
        """How deep a tree the head drafts (0: none), and how many nodes of it are read."""
        limit = self.target.context_limit
        fits = limit is None or all(row.length + self.shape.depth <= limit for row in alive)
        if self.head is None or not fits or max(row.remaining_tokens for row in alive) == 1:
            return 0, 1
        if self.policy is None:
            return plan.depths[-1], plan.buckets[-1]
        if not self.policy.uses_head(0.0, len(alive)):
            return 0, 1
        nodes = plan.buckets[-1]
        if self.scores:
            scores_BN = torch.tensor([self.scores[row.number] for row in alive])
            pays = self.policy.num_nodes(scores_BN)
            nodes = next(count for count in plan.buckets if count >= pays)
        pays = self.policy.depth(plan.depths[-1], len(alive))
        depth = next(depth for depth in plan.depths if depth >= pays)
        return depth, min(nodes, plan.count(depth))


def _spare(shape: TreeShape) -> int:
    """Columns that a round may need behind a text: of the tree, of the head's nodes, of a path."""
    return max(shape.nodes, shape.width * shape.depth) + shape.depth + 1
