"""The two parts of a decode step as CUDA graphs, with the tensors that they share.

Legend: B sequences, N tree nodes, P positions of a path, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.model.backends.select import select_ops
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import NO_PARENT, Tree

from .cuda_graph import CapturedFunction, sample_along_path
from .sampler import Sampler
from .sequence import SequenceState
from .verify import accept_on_device

NODE_COUNTS = (1, 4, 8, 16, 32, 48, 64, 96, 128)  # that are captured; the whole tree is one more
DEPTHS = (1, 2, 4, 6, 8)  # of drafts that are captured; the full depth is one more


@dataclass(frozen=True)
class PrefillState:
    """A batch after its prefill, in caches that grow.

    cache: of the target.
    head_state: after all positions of the prompts; None: no head.
    last_output: of the target at the last position of each prompt.
    first_B1: the tokens that follow.
    """

    cache: KVCache
    head_state: Any
    last_output: TargetOutput
    first_B1: Tensor


class StepGraphs:
    """`draft` and `verify` of one batch size and cache capacity.

    output, next_tokens_BP, num_accepted_B: what was accepted last, as `DraftHead.advance` takes it.
    tree_parts: tokens, parents and scores of the last draft tree.
    active_B: 0 for finished sequences.
    noise_BPV: of the next tokens; None: greedy.
    report: per sequence the number of emitted tokens, the depth of the verified tree, P emitted
        tokens, and the scores of all drafted nodes.
    max_path: nodes of the longest path.
    node_counts: that `verify` can take, ascending; the first is 1.

    like: output of the target at some position of each sequence.
    The head must keep only KV caches between steps.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        shape: TreeShape,
        sampler: Sampler,
        like: TargetOutput,
        capacity: int,
        mempool: Any,
    ):
        self.attach(target, head)
        self.shape, self.sampler, self.capacity = shape, sampler, capacity
        self.batch, self.mempool = len(like.lm_head_input_BTD), mempool
        self.cache = target.new_cache(self.batch)
        self.state = None if head is None else head.start(self.batch)
        self.caches = [self.cache, *_caches(self.state)]
        for cache in self.caches:
            cache.preallocate(capacity)
        self.max_path, nodes = (1, 1) if head is None else (shape.depth + 1, _drafted_nodes(shape))
        self.node_counts = (*(count for count in NODE_COUNTS if count < nodes), nodes)
        self._allocate(like, nodes)
        self.advance = self._capture(self._advance)
        self.draft_graphs: dict[int, CapturedFunction] = {}  # by depth
        self.verify_graphs: dict[int, CapturedFunction] = {}  # by number of nodes

    def _allocate(self, like: TargetOutput, nodes: int) -> None:
        self.num_accepted_B = torch.ones_like(self.cache.lengths_B)
        self.active_B = torch.ones_like(self.num_accepted_B)
        self.next_tokens_BP = self.num_accepted_B.new_zeros(self.batch, self.max_path)
        self.output = like.gather(self.next_tokens_BP)  # of the right size
        tokens_BN = self.num_accepted_B.new_zeros(self.batch, nodes)
        self.tree_parts = (tokens_BN, tokens_BN + NO_PARENT, tokens_BN.float())
        width = 2 + self.max_path + nodes
        self.report = tokens_BN.new_zeros(self.batch, width, dtype=torch.float64)
        self.noise_BPV: Tensor | None = None
        if self.sampler.sample:
            size = (self.batch, self.max_path, self.target.vocab_size)
            self.noise_BPV = tokens_BN.new_zeros(size, dtype=torch.float32)
        self.noise_from: Tensor | None = None  # for each sequence, the position of the first noise

    @property
    def target(self) -> Target:
        assert self._target is not None, "attach comes first"
        return self._target

    def attach(self, target: Target, head: DraftHead | None) -> None:
        """Use the graphs for a run. Their target and head must be those they were made for."""
        self._target: Target | None = target
        self.head = head

    def detach(self) -> None:
        """Drop target and head, so that graphs which are kept do not keep them in memory."""
        self._target, self.head = None, None

    def start(self, prefilled: PrefillState) -> None:
        """Start with a new batch."""
        self._copy_caches([prefilled.cache, *_caches(prefilled.head_state)])
        for cache in self.caches[1:]:
            cache.lengths_B -= 1  # the head processes the last position with the first step
        last = _tensors(prefilled.last_output)
        for ours, theirs in zip(_tensors(self.output), last, strict=True):
            ours[:, :1] = theirs
        self.next_tokens_BP[:, :1] = prefilled.first_B1
        self.num_accepted_B.fill_(1)
        self.active_B.fill_(1)
        self.noise_from = None  # of another run

    def migrate_from(self, other: StepGraphs) -> None:
        """Continue a batch of graphs with a smaller capacity."""
        self._copy_caches(other.caches)
        for ours, theirs in zip(self.carried(), other.carried(), strict=True):
            ours.copy_(theirs)
        self.active_B.copy_(other.active_B)
        self.noise_from = None

    def close(self) -> None:
        """Free memory now: graphs refer to this object, which refers to them."""
        self.detach()
        self.caches, self.draft_graphs, self.verify_graphs = [], {}, {}
        del self.cache, self.state, self.advance

    def mask_finished(self, active: Sequence[bool]) -> None:
        """Mark which sequences are not finished."""
        self.active_B.copy_(torch.tensor(active))

    def fill_noise(self, sampler: Sampler, sequences: Sequence[SequenceState]) -> None:
        """Fill in the noise of the next tokens. What is there for tokens that the last step did not
        reach is kept: drawing it takes a kernel for each token."""
        if self.noise_BPV is None:
            return
        now = torch.tensor([one.length for one in sequences])
        before = now - self.max_path if self.noise_from is None else self.noise_from
        self.noise_from = now
        from_BP = (now - before)[:, None] + torch.arange(self.max_path)
        index_BP1 = from_BP.clamp(max=self.max_path - 1)[..., None].to(self.noise_BPV.device)
        noise_BPV = self.noise_BPV.gather(1, index_BP1.expand_as(self.noise_BPV))
        rows_M, places_M = (from_BP >= self.max_path).nonzero(as_tuple=True)
        if len(rows_M):
            numbers = [sequences[row].number for row in rows_M.tolist()]
            positions = (now[rows_M] + places_M).tolist()
            place = rows_M.to(noise_BPV.device), places_M.to(noise_BPV.device)
            like_MV = noise_BPV.new_empty(len(positions), noise_BPV.shape[-1])
            noise_BPV[place] = sampler.noise(numbers, positions, like_MV)
        self.noise_BPV.copy_(noise_BPV)

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths that `draft` can take, ascending."""
        if self.head is None:
            return (0,)
        return (*(depth for depth in DEPTHS if depth < self.shape.depth), self.shape.depth)

    def count_for(self, depth: int) -> int:
        """The least of `node_counts` that holds a drafted tree of this depth."""
        nodes = _drafted_nodes(self.shape.limited(depth)) if depth else 1
        return next(count for count in self.node_counts if count >= nodes)

    def draft(self, depth: int) -> None:
        """Draft a tree of one of `depths`. 0: the head only processes what was accepted."""
        if depth == 0:
            self.advance()
            return
        if depth not in self.draft_graphs:
            self.draft_graphs[depth] = self._capture(lambda: self._draft(depth))
        self.draft_graphs[depth]()

    def verify(self, nodes: int) -> None:
        """Verify the likeliest nodes, as many as one of `node_counts`, and accept a path."""
        if nodes not in self.verify_graphs:
            self.verify_graphs[nodes] = self._capture(lambda: self._verify(nodes))
        self.verify_graphs[nodes]()

    def carried(self) -> list[Tensor]:
        """What the next step takes over from this one."""
        return [*_tensors(self.output), self.next_tokens_BP, self.num_accepted_B]

    def _capture(self, function: Callable[[], object]) -> CapturedFunction:
        lengths = [cache.lengths_B for cache in self.caches]
        in_place = [*lengths, *self.carried()]
        return CapturedFunction(function, self.target.device, self.mempool, in_place)

    def _copy_caches(self, sources: Sequence[KVCache]) -> None:
        for cache, source in zip(self.caches, sources, strict=True):
            cache.copy_from(source)

    def _advance(self) -> Any:
        assert self.head is not None
        self._empty_finished(self.caches[1:])
        return self.head.advance(self.state, self.output, self.next_tokens_BP, self.num_accepted_B)

    def _draft(self, depth: int) -> None:
        assert self.head is not None
        shape = self.shape.limited(depth)
        tree = self.head.draft(self._advance(), shape)
        assert tree.nodes == _drafted_nodes(shape), "the head drafts another number of nodes"
        more = (0, self.node_counts[-1] - tree.nodes)  # where the tree is less deep
        self.tree_parts[0].copy_(pad(tree.tokens_BN, more))
        self.tree_parts[1].copy_(pad(tree.parents_BN, more, value=NO_PARENT))
        self.tree_parts[2].copy_(pad(tree.scores_BN, more, value=-torch.inf))

    def _verify(self, nodes: int) -> None:
        self._empty_finished(self.caches[:1])
        if nodes == 1:
            last_B1 = self.num_accepted_B[:, None] - 1
            tree = Tree.root(self.next_tokens_BP.gather(1, last_B1)[:, 0])
        else:
            ops = select_ops(self.tree_parts[0].device)
            # No chain in front: the whole path is moved.
            tree = Tree(*self.tree_parts, ops=ops).cut(nodes)
        taps = () if self.head is None else self.head.taps
        output = self.target.forward(tree, self.cache, taps=taps)
        assert output.logits_BTV is not None
        sampled_BN = sample_along_path(
            tree, output.logits_BTV, self.sampler, self.max_path, self.noise_BPV
        )
        accepted = accept_on_device(tree, sampled_BN).padded(self.max_path)
        self.cache.commit(accepted.accepted_path_BP, accepted.num_accepted_B)
        hidden = _tensors(output.gather(accepted.accepted_path_BP))
        now = [*hidden, accepted.sampled_tokens_BP, accepted.num_accepted_B]
        for ours, new in zip(self.carried(), now, strict=True):
            ours.copy_(new)
        depth_B1 = tree.depths_BN.amax(1, keepdim=True)
        counts_B1 = accepted.num_accepted_B[:, None]
        parts = [counts_B1, depth_B1, self.next_tokens_BP, self.tree_parts[2]]
        self.report.copy_(torch.cat([part.double() for part in parts], 1))

    def _empty_finished(self, caches: Sequence[KVCache]) -> None:
        """Finished sequences start again with empty caches, so that they never outgrow them."""
        for cache in caches:
            cache.lengths_B *= self.active_B


def _caches(state: object) -> list[KVCache]:
    """What a head's state keeps from one step to the next."""
    kept = () if state is None else vars(state).values()
    return [value for value in kept if isinstance(value, KVCache)]


def _tensors(output: TargetOutput) -> list[Tensor]:
    return [output.lm_head_input_BTD, *output.hidden_states.values()]


def _drafted_nodes(shape: TreeShape) -> int:
    """How many nodes a drafted tree of this shape has, the root included."""
    width = shape.width
    most = 1 + width + (shape.depth - 1) * width * width  # as `grow` finds them
    return min(shape.nodes, most) if shape.ranks is None else shape.nodes
