"""Decode steps that are captured once as CUDA graphs and then replayed.

Launching the thousands of kernels of a step takes longer than running them. A graph knows its
tensors by address and cannot ask the host anything, so a step has two parts that never change:

    draft    the head processes what was accepted last, and drafts a tree of some depth
    verify   the target processes the likeliest nodes of it; a path is accepted and committed

and the host waits once, for the numbers of `StepGraphs.report`. Differences from `EagerRunner`:

- A step verifies one of a few numbers of nodes, each a graph of its own, as each depth of drafting
  is. The policy chooses by the scores of the tree before: those of the new one are not on the host
  yet.
- A finished sequence stays in the batch, with empty caches. Its tokens are ignored.
- Where a tree would exceed the context, or no response has room for it, a step is autoregressive.
- Tokens are sampled node by node along the path, from noise that is filled in beforehand.
- There are no n-gram drafts and no processors that read the prefix: see `supports_cuda_graphs`.

Without CUDA the same functions are called eagerly, which the tests compare with `EagerRunner`.

Legend: B sequences, N tree nodes, T prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

from .cuda_graph import CAPTURABLE, CAPTURE_LOCK
from .graph_pool import GraphPool
from .sampler import Sampler
from .sequence import SequenceState
from .stats import Stats
from .step_graphs import PrefillState, StepGraphs
from .step_runner import DraftLimits, StepOutput, prefill

MIN_CAPACITY = 512  # slots of the smallest cache; each larger one has twice as many
HEADROOM = 256  # tokens that a new cache has room for, unless the responses are shorter


def supports_cuda_graphs(
    target: Target, head: DraftHead | None, sampler: Sampler, ngram: bool = False
) -> bool:
    """Whether a `GraphRunner` can decode this; an `EagerRunner` can decode anything."""
    if ngram or target.recurrent or target.device.type != "cuda":
        return False
    one_device = len({parameter.device for parameter in target.model.parameters()}) == 1
    capturable = all(type(processor) in CAPTURABLE for processor in sampler.processors)
    state = () if head is None else vars(head.start(1)).values()
    return one_device and capturable and all(isinstance(one, KVCache | None) for one in state)


class GraphRunner:
    """A `StepRunner` that replays CUDA graphs.

    pool: graphs of earlier runs.
    """

    def __init__(
        self,
        target: Target,
        head: DraftHead | None,
        shape: TreeShape,
        sampler: Sampler,
        sequences: Sequence[SequenceState],
        policy: AdaptivePolicy | None,
        stats: Stats,
        pool: GraphPool,
    ):
        self.target, self.head, self.shape, self.sampler = target, head, shape, sampler
        self.sequences, self.policy, self.stats, self.pool = sequences, policy, stats, pool
        self.prefilled: PrefillState | None = None  # until the first step
        self.graphs: StepGraphs | None = None
        self.active = list(sequences)
        self.depth, self.nodes = 0, 1  # of the step that was drafted
        self.scores: dict[int, list[float]] = {}  # of the last tree, by sequence number

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> StepOutput:
        head, batch = self.head, len(self.sequences)
        with CAPTURE_LOCK:
            cache, taps = self.target.new_cache(batch), () if head is None else head.taps
            step = prefill(
                self.target, cache, taps, tokens_BT, lengths_B, self.sampler, self.sequences
            )
            cache.commit(None, lengths_B)
            state = None
            if head is not None:
                state = head.advance(head.start(batch), step.output, step.next_tokens_BP, lengths_B)
            first_B1, last = step.root_B[:, None], step.output.gather(lengths_B[:, None] - 1)
            self.prefilled = PrefillState(cache, state, last, first_B1)
            first = first_B1.tolist()
        self.stats.lap("prefill")
        return StepOutput(self.sequences, first)

    def draft(self, limits: DraftLimits) -> None:
        active = [one for one in self.sequences if one.remaining_tokens]
        with CAPTURE_LOCK:
            graphs = self._graphs_with_room(active)
            if len(active) < len(self.active):
                graphs.mask_finished([one.remaining_tokens > 0 for one in self.sequences])
            self.active = active
            self.depth, self.nodes = self._choose_size(graphs, limits)
            if self.head is not None:
                graphs.draft(self.depth)
                self.stats.lap("draft")

    def verify(self) -> StepOutput:
        graphs = self.graphs
        assert graphs is not None, "draft comes first"
        with CAPTURE_LOCK:
            graphs.fill_noise(self.sampler, self.sequences)
            graphs.verify(self.nodes)
            report = graphs.report.tolist()
        self.stats.lap("verify")
        tokens: list[list[int]] = []
        for one in self.active:
            count, _, *numbers = report[one.number]
            tokens.append([int(token) for token in numbers[: int(count)]])
            self.scores[one.number] = numbers[graphs.max_path :]
        tree_depth = max(int(report[one.number][1]) for one in self.active)
        return StepOutput(
            self.active,
            tokens,
            num_nodes=self.nodes,
            num_draft_tokens=len(self.active) * (self.nodes - 1),
            tree_depth=tree_depth,
            drafted_depth=self.depth,
            full_depth=tree_depth,
        )

    def close(self) -> None:
        if self.graphs is not None:
            self.pool.release(self.graphs)
            self.graphs = None

    def _graphs_with_room(self, active: Sequence[SequenceState]) -> StepGraphs:
        """Graphs whose caches have room for one more step."""
        before, prefilled = self.graphs, self.prefilled
        needed = max(one.length for one in active) + _slots_per_step(self.shape)
        if before is not None and needed <= before.capacity:
            return before
        capacity = MIN_CAPACITY
        while capacity < needed + min(HEADROOM, max(one.remaining_tokens for one in active)):
            capacity *= 2
        made_for = (self.target, self.head, self.shape, self.sampler)
        if before is not None:
            self.graphs = self.pool.acquire(*made_for, before.output, capacity)
            self.graphs.migrate_from(before)
            self.pool.release(before)
        else:
            assert prefilled is not None, "prefill comes first"
            self.graphs = self.pool.acquire(*made_for, prefilled.last_output, capacity)
            self.graphs.start(prefilled)
            self.prefilled = None
        return self.graphs

    def _choose_size(self, graphs: StepGraphs, limits: DraftLimits) -> tuple[int, int]:
        """The depth that the head drafts (0: it does not), and how many nodes are verified."""
        fits = limits.context is None or self.shape.depth <= limits.context
        if self.head is None or not fits or limits.remaining == 0:
            return 0, 1
        if self.policy is None:
            return graphs.depths[-1], graphs.node_counts[-1]
        if not self.policy.uses_head(0.0, len(self.active)):
            return 0, 1
        nodes = graphs.node_counts[-1]
        if self.scores:
            scores_BN = torch.tensor([self.scores[one.number] for one in self.active])
            pays = self.policy.num_nodes(scores_BN)
            nodes = next(count for count in graphs.node_counts if count >= pays)
        pays = self.policy.depth(graphs.depths[-1], len(self.active))
        depth = next(depth for depth in graphs.depths if depth >= pays)
        return depth, min(nodes, graphs.count_for(depth))


def _slots_per_step(shape: TreeShape) -> int:
    """Cache slots that a step may need after a sequence: the tree, the head's nodes, a path."""
    return max(shape.nodes, shape.width * shape.depth) + shape.depth + 1
