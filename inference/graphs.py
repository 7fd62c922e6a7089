"""Rounds of fixed shape for CUDA: recorded once as CUDA graphs, then played back as one.

Starting the thousands of kernels of a round takes longer than running them. A graph knows its
tensors by address and cannot ask the host anything, so a round has two parts that never change:

    draft    the head takes in what was accepted last, and guesses a tree of the full depth
    verify   the target reads the likeliest nodes of it; a path is accepted and committed

and the host waits once, for the numbers of `Plan.report`. What differs from the loop of `decode`:

- A round reads one of a few counts of nodes, each a graph of its own. A budget chooses by the
  scores of the tree before: those of the new one are not on the host yet.
- A complete row stays in the batch, as one whose text is empty. Nothing that it says is used.
- Where a tree would run past the context, or no row has room for it, a round is a plain step.
- Draws are made step by step along the path, from noise that is laid out beforehand.
- There are no looked up guesses and no processors that read the text: see `suits`.

Elsewhere the same functions are called as they are. Tests compare that with plain decoding.

Legend: B batch rows, N tree nodes, P places of a path, T prompt positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.model.cache import KVCache
from headstart.model.head import DraftHead
from headstart.model.seen import Seen
from headstart.model.target import Target
from headstart.model.tree import NO_PARENT, Tree, TreeShape

from .budget import Budget
from .drafting import read_prompts
from .replay import CAPTURED, Replay, walk
from .rows import Row, Stop, draws
from .sampling import Sampler
from .stats import Stats
from .verify import accept_on_device

BUCKETS = (1, 4, 8, 16, 32, 48, 64, 96, 128)  # node counts; the whole tree is one more
CAPACITY = 512  # columns of the smallest cache; each larger one has twice as many
AHEAD = 256  # tokens that a new cache has room for, unless the answers are shorter


def suits(target: Target, head: DraftHead | None, sampler: Sampler, lookup: bool = False) -> bool:
    """Whether a run can be decoded this way. Others take the loop of `decode`."""
    if lookup or target.device.type != "cuda":
        return False
    one_device = len({parameter.device for parameter in target.model.parameters()}) == 1
    known = all(type(processor) in CAPTURED for processor in sampler.processors)
    state = () if head is None else vars(head.start(1)).values()
    return one_device and known and all(isinstance(one, KVCache | None) for one in state)


@dataclass(frozen=True)
class Setup:
    """What a plan is made for. head None: plain steps."""

    target: Target
    head: DraftHead | None
    shape: TreeShape
    sampler: Sampler

    def key(self, *sizes: int) -> tuple[Any, ...]:
        """All that a plan depends on. It holds target and head, so their ids stay theirs."""
        settings = [(type(one), *vars(one).values()) for one in self.sampler.processors]
        head, sample = self.head, self.sampler.sample
        temperatures = None if head is None else head.temperatures
        return id(self.target), id(head), temperatures, self.shape, sample, *settings, *sizes


@dataclass(frozen=True)
class Begun:
    """A batch whose prompts are read, in caches that grow.

    state: of the head, all of them taken in. ends: what was seen last. first_B1: the tokens after.
    """

    cache: KVCache
    state: Any
    ends: Seen
    first_B1: Tensor


class Plan:
    """The parts of a round, and the tensors that they pass on, for one batch size and capacity.

    seen, next_BP, counts_B: what was accepted last, as `DraftHead.advance` takes it in. drafted:
    the last tree, as its three tensors. alive_B: 0 for complete rows. noise_BPV: of the next draws.
    report: per row the number of tokens emitted, the depth of the tree that was read, P emitted
    tokens, and the scores of all nodes that were drafted.

    like: what is seen of some position of each row. The head keeps only KVCaches between rounds.
    """

    def __init__(self, setup: Setup, like: Seen, capacity: int, pool: Any):
        target, head, shape, sampler = setup.target, setup.head, setup.shape, setup.sampler
        self.target, self.head, self.shape, self.sampler = target, head, shape, sampler
        self.batch, self.capacity, self.pool = len(like.last_BTD), capacity, pool
        self.key = setup.key(self.batch, capacity)
        self.cache = target.new_cache(self.batch)
        self.state = None if head is None else head.start(self.batch)
        self.caches = [self.cache, *_caches(self.state)]
        for cache in self.caches:
            cache.fix(capacity)
        self.places, nodes = (1, 1) if head is None else (shape.depth + 1, _drafted(shape))
        self.buckets = (*(count for count in BUCKETS if count < nodes), nodes)
        self.counts_B = torch.ones_like(self.cache.lengths_B)
        self.alive_B = torch.ones_like(self.counts_B)
        self.next_BP = self.counts_B.new_zeros(self.batch, self.places)
        self.seen = like.at(self.next_BP)  # that is, of the right size
        tokens_BN = self.counts_B.new_zeros(self.batch, nodes)
        self.drafted = (tokens_BN, tokens_BN + NO_PARENT, tokens_BN.float())
        self.report = tokens_BN.new_zeros(self.batch, 2 + self.places + nodes, dtype=torch.float64)
        self.noise_BPV: Tensor | None = None
        if sampler.sample:
            size = (self.batch, self.places, target.vocab_size)
            self.noise_BPV = tokens_BN.new_zeros(size, dtype=torch.float32)
        self.advance, self.draft = self._replay(self._advance), self._replay(self._draft)
        self._verifies: dict[int, Replay] = {}

    def begin(self, begun: Begun) -> None:
        """Start with a batch whose prompts are read."""
        self._take([begun.cache, *_caches(begun.state)])
        for cache in self.caches[1:]:
            cache.lengths_B -= 1  # the head takes in the last position with the first round
        for ours, theirs in zip(_tensors(self.seen), _tensors(begun.ends), strict=True):
            ours[:, :1] = theirs
        self.next_BP[:, :1] = begun.first_B1
        self.counts_B.fill_(1)
        self.alive_B.fill_(1)

    def follow(self, other: Plan) -> None:
        """Go on where a plan of a smaller capacity stands."""
        self._take(other.caches)
        for ours, theirs in zip(self._passed(), other._passed(), strict=True):
            ours.copy_(theirs)
        self.alive_B.copy_(other.alive_B)

    def retire(self, alive: Sequence[bool]) -> None:
        """Which rows are still wanted."""
        self.alive_B.copy_(torch.tensor(alive))

    def make_noise(self, sampler: Sampler, rows: Sequence[Row]) -> None:
        """Lay out the noise of the next tokens of all rows."""
        if self.noise_BPV is not None:
            places = range(self.places)
            numbers = [row.number for row in rows for _ in places]
            positions = [row.length + place for row in rows for place in places]
            flat_MV = self.noise_BPV.flatten(0, 1)
            flat_MV.copy_(sampler.noise(numbers, positions, flat_MV))

    def verify(self, nodes: int) -> None:
        """Read the likeliest nodes (a count of `buckets`), and keep a path. 1: a plain step."""
        if nodes not in self._verifies:
            self._verifies[nodes] = self._replay(lambda: self._verify(nodes))
        self._verifies[nodes]()

    def _replay(self, function: Callable[[], object]) -> Replay:
        lengths = [cache.lengths_B for cache in self.caches]
        return Replay(function, self.target.device, self.pool, [*lengths, *self._passed()])

    def _passed(self) -> list[Tensor]:
        """What the next round takes in of this one."""
        return [*_tensors(self.seen), self.next_BP, self.counts_B]

    def _take(self, sources: Sequence[KVCache]) -> None:
        for cache, source in zip(self.caches, sources, strict=True):
            cache.take(source)

    def _advance(self) -> Any:
        assert self.head is not None
        self._empty(self.caches[1:])
        return self.head.advance(self.state, self.seen, self.next_BP, self.counts_B)

    def _draft(self) -> None:
        assert self.head is not None
        tree = self.head.draft(self._advance(), self.shape)
        assert tree.nodes == self.buckets[-1], "the head drafts other counts than its shape has"
        now = (tree.tokens_BN, tree.parents_BN, tree.scores_BN)
        for ours, new in zip(self.drafted, now, strict=True):
            ours.copy_(new)

    def _verify(self, nodes: int) -> None:
        self._empty(self.caches[:1])
        if nodes == 1:
            tree = Tree.root(self.next_BP.gather(1, self.counts_B[:, None] - 1)[:, 0])
        else:
            tree = Tree(*self.drafted).cut(nodes)  # no chain in front: all of a path is moved
        layers = () if self.head is None else self.head.layers
        seen = self.target.read(tree, self.cache, layers=layers)
        assert seen.logits_BTV is not None
        draws_BN = walk(tree, seen.logits_BTV, self.sampler, self.places, self.noise_BPV)
        accepted = accept_on_device(tree, draws_BN).first(self.places)
        self.cache.commit(accepted.path_BP, accepted.counts_B)
        now = [*_tensors(seen.at(accepted.path_BP)), accepted.tokens_BP, accepted.counts_B]
        for ours, read in zip(self._passed(), now, strict=True):
            ours.copy_(read)
        depth_B1 = tree.depths_BN.amax(1, keepdim=True)
        parts = [accepted.counts_B[:, None], depth_B1, self.next_BP, self.drafted[2]]
        self.report.copy_(torch.cat([part.double() for part in parts], 1))

    def _empty(self, caches: Sequence[KVCache]) -> None:
        """Complete rows start again with nothing, so that they never outgrow a cache."""
        for cache in caches:
            cache.lengths_B *= self.alive_B


class Graphs:
    """Plans that are kept from one run to the next, so that nothing is captured twice; a new one is
    needed after weights were replaced.

    plans: how many at most; each has a cache of its own, and the one used longest ago goes first.
    """

    def __init__(self, plans: int = 4):
        self.plans = plans
        self.kept: dict[tuple[Any, ...], Plan] = {}

    def borrow(self, setup: Setup, like: Seen, capacity: int) -> Plan:
        """A plan that no other run uses until it is given back. Arguments as of `Plan`."""
        key = setup.key(len(like.last_BTD), capacity)
        if key in self.kept:
            return self.kept.pop(key)
        pool = torch.cuda.graph_pool_handle() if setup.target.device.type == "cuda" else None
        return Plan(setup, like, capacity, pool)

    def give_back(self, plan: Plan) -> None:
        self.kept[plan.key] = plan
        while len(self.kept) > self.plans:
            del self.kept[next(iter(self.kept))]


class GraphLoop:
    """One batch on its way, as `decode._Loop`. graphs: plans of earlier runs."""

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        rows: list[Row],
        sampler: Sampler,
        stop: Stop,
        shape: TreeShape,
        budget: Budget | None,
        stats: Stats,
        graphs: Graphs,
    ):
        self.target, self.head, self.sampler, self.stop = target, head, sampler, stop
        self.rows, self.shape, self.stats, self.graphs = rows, shape, stats, graphs
        self.going = len(rows)  # rows that are not complete, as far as the plan knows
        self.spending = None if budget is None or head is None else budget.start()
        self.begun: Begun | None = None  # until the first round
        self.plan: Plan | None = None
        self.scores: dict[int, list[float]] = {}  # of the last tree, by row number

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, tokens_BT: Tensor, lengths_B: Tensor) -> Iterator[list[list[int]]]:
        self.stats.begin(len(self.rows), self.target.device)
        emitted = self._take(self._prompt(tokens_BT, lengths_B), None)
        try:
            while True:
                self.stats.lap("host")
                yield emitted
                self.stats.pause()
                alive = [row for row in self.rows if row.room]
                if not alive:
                    return
                emitted = self._take(*self._round(alive))
        finally:
            if self.plan is not None:
                self.graphs.give_back(self.plan)

    def _prompt(self, tokens_BT: Tensor, lengths_B: Tensor) -> dict[int, list[int]]:
        """Read the prompts and draw the first token of each answer, by row number."""
        head, batch = self.head, len(self.rows)
        cache, layers = self.target.new_cache(batch), () if head is None else head.layers
        read = read_prompts(self.target, cache, layers, tokens_BT, lengths_B, self._draw)
        cache.commit(None, lengths_B)
        state = None
        if head is not None:
            state = head.advance(head.start(batch), read.seen, read.next_BP, lengths_B)
        first_B1 = read.root_B[:, None]
        self.begun = Begun(cache, state, read.seen.at(lengths_B[:, None] - 1), first_B1)
        self.stats.lap("prefill")
        return {row.number: one for row, one in zip(self.rows, first_B1.tolist(), strict=True)}

    def _draw(self, tree: Tree, logits_BNV: Tensor) -> Tensor:
        return draws(self.sampler, self.rows, tree, logits_BNV)

    def _take(self, drawn: dict[int, list[int]], depth: int | None) -> list[list[int]]:
        """Add what was drawn to the answers; the part of it that belongs there, by row."""
        emitted: list[list[int]] = [[] for _ in self.rows]
        for number, tokens in drawn.items():
            emitted[number] = self.rows[number].take(tokens, self.stop)
        counts = [len(emitted[number]) for number in drawn]
        self.stats.count(counts, [len(tokens) for tokens in drawn.values()], depth)
        return emitted

    def _round(self, alive: Sequence[Row]) -> tuple[dict[int, list[int]], int]:
        """What was drawn, by row number, and the depth of the tree."""
        plan = self._roomy(alive)
        if len(alive) < self.going:
            plan.retire([row.room > 0 for row in self.rows])
            self.going = len(alive)
        asked, nodes = self._wanted(plan, alive)
        if self.head is not None:
            (plan.draft if asked else plan.advance)()
            self.stats.lap("draft")
        plan.make_noise(self.sampler, self.rows)
        plan.verify(nodes)
        report = plan.report.tolist()
        self.stats.lap("verify")
        drawn = {}
        for row in alive:
            count, _, *numbers = report[row.number]
            drawn[row.number] = [int(token) for token in numbers[: int(count)]]
            self.scores[row.number] = numbers[plan.places :]
        if self.spending is not None:
            emitted = sum(map(len, drawn.values()))
            self.spending.learn(len(alive), emitted, nodes, self.shape.depth if asked else 0)
        return drawn, max(int(report[row.number][1]) for row in alive)

    def _roomy(self, alive: Sequence[Row]) -> Plan:
        """A plan with room for one more round."""
        needed = max(row.length for row in alive) + _spare(self.shape)
        before, begun = self.plan, self.begun
        if before is not None and needed <= before.capacity:
            return before
        capacity = CAPACITY
        while capacity < needed + min(AHEAD, max(row.room for row in alive)):
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

    def _wanted(self, plan: Plan, alive: Sequence[Row]) -> tuple[bool, int]:
        """Whether the head is asked for a tree, and how many nodes of it are read."""
        limit = self.target.context_limit
        fits = limit is None or all(row.length + self.shape.depth <= limit for row in alive)
        if self.head is None or not fits or max(row.room for row in alive) == 1:
            return False, 1
        if self.spending is None:
            return True, plan.buckets[-1]
        if not self.spending.asks_head(0.0, len(alive)):
            return False, 1
        nodes = plan.buckets[-1]
        if self.scores:
            scores_BN = torch.tensor([self.scores[row.number] for row in alive])
            pays = self.spending.nodes(scores_BN)
            nodes = next(count for count in plan.buckets if count >= pays)
        return True, nodes


def _caches(state: object) -> list[KVCache]:
    """What a head's state keeps from one round to the next."""
    kept = () if state is None else vars(state).values()
    return [value for value in kept if isinstance(value, KVCache)]


def _tensors(seen: Seen) -> list[Tensor]:
    return [seen.last_BTD, *seen.hidden.values()]


def _drafted(shape: TreeShape) -> int:
    """How many nodes a tree of this shape has, the root included."""
    width = shape.width
    most = 1 + width + (shape.depth - 1) * width * width  # as `grow` finds them
    return min(shape.nodes, most) if shape.ranks is None else shape.nodes


def _spare(shape: TreeShape) -> int:
    """Columns that a round may need behind a text: of the tree, of the head's nodes, of a path."""
    return max(shape.nodes, shape.width * shape.depth) + shape.depth + 1
