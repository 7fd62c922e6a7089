"""The parts of a round of fixed shape, and the tensors that they pass on: see graphs.py.

Legend: B batch rows, N tree nodes, P places of a path, T prompt positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.model.backends.linear import weight_version
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import NO_PARENT, Tree

from .cuda_graph import CAPTURED, Replay, walk
from .sampler import Sampler
from .sequence import SequenceState
from .verify import accept_on_device

BUCKETS = (1, 4, 8, 16, 32, 48, 64, 96, 128)  # node counts; the whole tree is one more
DEPTHS = (1, 2, 4, 6, 8)  # that are drafted; the full depth is one more
CAPACITY = 512  # columns of the smallest cache; each larger one has twice as many


def supports_cuda_graphs(
    target: Target, head: DraftHead | None, sampler: Sampler, ngram: bool = False
) -> bool:
    """Whether a run can be decoded this way. Others take the loop of `decode`."""
    if ngram or target.recurrent or target.device.type != "cuda":
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
        """All that a plan depends on: whose weights were replaced or written to is another one. A
        plan holds target and head, so their ids stay theirs."""
        settings = [(type(one), *vars(one).values()) for one in self.sampler.processors]
        head, sample = self.head, self.sampler.sample
        weights = [weight_version(weight) for weight in self.target.model.parameters()]
        if head is not None:
            weights += [weight_version(weight) for weight in head.parameters()]
        temperatures = None if head is None else head.temperatures
        known = id(self.target), id(head), hash(tuple(weights)), temperatures, self.shape
        return *known, sample, *settings, *sizes


@dataclass(frozen=True)
class Begun:
    """A batch whose prompts are read, in caches that grow.

    state: of the head, all of them taken in. ends: what was seen last. first_B1: the tokens after.
    """

    cache: KVCache
    state: Any
    ends: TargetOutput
    first_B1: Tensor


class Plan:
    """The parts of a round, and the tensors that they pass on, for one batch size and capacity.

    seen, next_BP, counts_B: what was accepted last, as `DraftHead.advance` takes it in. drafted:
    the last tree, as its three tensors. alive_B: 0 for complete rows. noise_BPV: of the next draws.
    report: per row the number of tokens emitted, the depth of the tree that was read, P emitted
    tokens, and the scores of all nodes that were drafted.

    like: what is seen of some position of each row. The head keeps only KVCaches between rounds.
    """

    def __init__(self, setup: Setup, like: TargetOutput, capacity: int, pool: Any):
        target, head, shape, sampler = setup.target, setup.head, setup.shape, setup.sampler
        self.setup, self.target, self.head, self.sampler = setup, target, head, sampler
        self.batch, self.capacity, self.pool = len(like.lm_head_input_BTD), capacity, pool
        self.cache = target.new_cache(self.batch)
        self.state = None if head is None else head.start(self.batch)
        self.caches = [self.cache, *_caches(self.state)]
        for cache in self.caches:
            cache.preallocate(capacity)
        self.places, nodes = (1, 1) if head is None else (shape.depth + 1, _drafted(shape))
        self.buckets = (*(count for count in BUCKETS if count < nodes), nodes)
        self.counts_B = torch.ones_like(self.cache.lengths_B)
        self.alive_B = torch.ones_like(self.counts_B)
        self.next_BP = self.counts_B.new_zeros(self.batch, self.places)
        self.seen = like.gather(self.next_BP)  # that is, of the right size
        tokens_BN = self.counts_B.new_zeros(self.batch, nodes)
        self.drafted = (tokens_BN, tokens_BN + NO_PARENT, tokens_BN.float())
        self.report = tokens_BN.new_zeros(self.batch, 2 + self.places + nodes, dtype=torch.float64)
        self.noise_BPV: Tensor | None = None
        if sampler.sample:
            size = (self.batch, self.places, target.vocab_size)
            self.noise_BPV = tokens_BN.new_zeros(size, dtype=torch.float32)
        self.noise_from: Tensor | None = None  # of each row, the position of the first noise
        self.advance = self._replay(self._advance)
        self.drafts: dict[int, Replay] = {}  # by depth
        self.verifies: dict[int, Replay] = {}  # by count of nodes

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
        self.noise_from = None  # another run's

    def follow(self, other: Plan) -> None:
        """Go on where a plan of a smaller capacity stands."""
        self._take(other.caches)
        for ours, theirs in zip(self._passed(), other._passed(), strict=True):
            ours.copy_(theirs)
        self.alive_B.copy_(other.alive_B)
        self.noise_from = None

    def close(self) -> None:
        """Let go of all that takes memory: graphs refer to their plan, which refers to them."""
        self.caches, self.drafts, self.verifies = [], {}, {}
        del self.cache, self.state, self.advance

    def retire(self, alive: Sequence[bool]) -> None:
        """Which rows are still wanted."""
        self.alive_B.copy_(torch.tensor(alive))

    def make_noise(self, sampler: Sampler, rows: Sequence[SequenceState]) -> None:
        """Lay out the noise of the next tokens of all rows. What is there already, for tokens that
        the last round did not come to, is kept: drawing it takes a kernel for each token."""
        if self.noise_BPV is None:
            return
        now = torch.tensor([row.length for row in rows])
        before = now - self.places if self.noise_from is None else self.noise_from
        self.noise_from = now
        from_BP = (now - before)[:, None] + torch.arange(self.places)
        index_BP1 = from_BP.clamp(max=self.places - 1)[..., None].to(self.noise_BPV.device)
        noise_BPV = self.noise_BPV.gather(1, index_BP1.expand_as(self.noise_BPV))
        rows_M, places_M = (from_BP >= self.places).nonzero(as_tuple=True)
        if len(rows_M):
            numbers = [rows[row].number for row in rows_M.tolist()]
            positions = (now[rows_M] + places_M).tolist()
            place = rows_M.to(noise_BPV.device), places_M.to(noise_BPV.device)
            like_MV = noise_BPV.new_empty(len(positions), noise_BPV.shape[-1])
            noise_BPV[place] = sampler.noise(numbers, positions, like_MV)
        self.noise_BPV.copy_(noise_BPV)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.setup.key(self.batch, self.capacity)

    @property
    def depths(self) -> tuple[int, ...]:
        """That trees can have, the greatest last. Each is a graph of its own, so only a few."""
        if self.head is None:
            return (0,)
        deepest = self.setup.shape.depth
        return (*(depth for depth in DEPTHS if depth < deepest), deepest)

    def count(self, depth: int) -> int:
        """How many nodes a tree of one of `depths` has, rounded up to one of `buckets`."""
        nodes = _drafted(self.setup.shape.limited(depth)) if depth else 1
        return next(count for count in self.buckets if count >= nodes)

    def draft(self, depth: int) -> None:
        """Guess a tree of one of `depths`. 0: the head takes in what was accepted, and guesses
        none."""
        if depth == 0:
            self.advance()
            return
        if depth not in self.drafts:
            self.drafts[depth] = self._replay(lambda: self._draft(depth))
        self.drafts[depth]()

    def verify(self, nodes: int) -> None:
        """Read the likeliest nodes (a count of `buckets`), and keep a path. 1: a plain step."""
        if nodes not in self.verifies:
            self.verifies[nodes] = self._replay(lambda: self._verify(nodes))
        self.verifies[nodes]()

    def _replay(self, function: Callable[[], object]) -> Replay:
        lengths = [cache.lengths_B for cache in self.caches]
        return Replay(function, self.target.device, self.pool, [*lengths, *self._passed()])

    def _passed(self) -> list[Tensor]:
        """What the next round takes in of this one."""
        return [*_tensors(self.seen), self.next_BP, self.counts_B]

    def _take(self, sources: Sequence[KVCache]) -> None:
        for cache, source in zip(self.caches, sources, strict=True):
            cache.copy_from(source)

    def _advance(self) -> Any:
        assert self.head is not None
        self._empty(self.caches[1:])
        return self.head.advance(self.state, self.seen, self.next_BP, self.counts_B)

    def _draft(self, depth: int) -> None:
        assert self.head is not None
        shape = self.setup.shape.limited(depth)
        tree = self.head.draft(self._advance(), shape)
        assert tree.nodes == _drafted(shape), "the head drafts other counts than its shape has"
        more = (0, self.buckets[-1] - tree.nodes)  # of a tree that is less deep
        self.drafted[0].copy_(pad(tree.tokens_BN, more))
        self.drafted[1].copy_(pad(tree.parents_BN, more, value=NO_PARENT))
        self.drafted[2].copy_(pad(tree.scores_BN, more, value=-torch.inf))

    def _verify(self, nodes: int) -> None:
        self._empty(self.caches[:1])
        if nodes == 1:
            tree = Tree.root(self.next_BP.gather(1, self.counts_B[:, None] - 1)[:, 0])
        else:
            tree = Tree(*self.drafted).cut(nodes)  # no chain in front: all of a path is moved
        layers = () if self.head is None else self.head.taps
        seen = self.target.forward(tree, self.cache, taps=layers)
        assert seen.logits_BTV is not None
        draws_BN = walk(tree, seen.logits_BTV, self.sampler, self.places, self.noise_BPV)
        accepted = accept_on_device(tree, draws_BN).first(self.places)
        self.cache.commit(accepted.path_BP, accepted.counts_B)
        now = [*_tensors(seen.gather(accepted.path_BP)), accepted.tokens_BP, accepted.counts_B]
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
    """Plans that are kept from one run to the next, so that nothing is captured twice.

    plans, memory: how many at most, and how many bytes their caches may take; the one used longest
    ago goes first.
    """

    def __init__(self, plans: int = 16, memory: int = 4 << 30):
        self.plans, self.memory = plans, memory
        self.kept: dict[tuple[Any, ...], Plan] = {}

    @staticmethod
    def of(target: Target) -> Graphs:
        """Those of a target, which keeps them."""
        if not isinstance(target.recorded, Graphs):
            target.recorded = Graphs()
        return target.recorded

    def borrow(self, setup: Setup, like: TargetOutput, capacity: int) -> Plan:
        """A plan that no other run uses until it is given back. Arguments as of `Plan`."""
        plan = self.kept.pop(setup.key(len(like.lm_head_input_BTD), capacity), None)
        if plan is not None:
            return plan
        self._make_room(self.plans - 1)
        pool = torch.cuda.graph_pool_handle() if setup.target.device.type == "cuda" else None
        return Plan(setup, like, capacity, pool)

    def give_back(self, plan: Plan) -> None:
        self._make_room(self.plans - 1)
        self.kept[plan.key] = plan  # however large it is

    def forget(self, head: DraftHead) -> None:
        """Plans of a head that is not used any more."""
        for key in [key for key, plan in self.kept.items() if plan.head is head]:
            self.kept.pop(key).close()

    def _make_room(self, most: int) -> None:
        while self.kept and (len(self.kept) > most or self._size() > self.memory):
            self.kept.pop(next(iter(self.kept))).close()

    def _size(self) -> int:
        return sum(cache.size for plan in self.kept.values() for cache in plan.caches)


def _caches(state: object) -> list[KVCache]:
    """What a head's state keeps from one round to the next."""
    kept = () if state is None else vars(state).values()
    return [value for value in kept if isinstance(value, KVCache)]


def _tensors(seen: TargetOutput) -> list[Tensor]:
    return [seen.lm_head_input_BTD, *seen.hidden_states.values()]


def _drafted(shape: TreeShape) -> int:
    """How many nodes a tree of this shape has, the root included."""
    width = shape.width
    most = 1 + width + (shape.depth - 1) * width * width  # as `grow` finds them
    return min(shape.nodes, most) if shape.ranks is None else shape.nodes
