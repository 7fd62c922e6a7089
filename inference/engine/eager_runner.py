"""Decode steps whose kernels are launched one by one, on any device.

A step drafts a tree, verifies it in one forward pass, and accepts a path. The host waits for the
device once per step, for the sampled tokens. Finished sequences leave the batch before the next
step, when the path is committed to the caches.

Legend: B sequences, N tree nodes, T prompt positions, P positions of a path, V vocabulary.
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
from headstart.model.tree.tree import Tree

from .draft import AcceptedStep, Drafter
from .sampler import Sampler
from .sequence import SequenceState, sample_tree
from .stats import Stats
from .step_runner import DraftLimits, StepOutput, prefill
from .verify import Accepted, accept


class EagerRunner:
    """A `StepRunner` for any target, head, sampler and source of drafts.

    head: None: only n-gram drafts, if the sequences have any. Other arguments as in `Drafter`.
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
    ):
        self.target, self.sampler, self.stats = target, sampler, stats
        self.sequences, self.policy = list(sequences), policy
        self.cache: KVCache = target.new_cache(len(sequences))
        self.drafter = Drafter(
            head, shape, policy, len(sequences), stats, chain_only=target.recurrent
        )
        self.accepted: AcceptedStep | None = None  # not yet committed
        self.tree: Tree | None = None

    def prefill(self, tokens_BT: Tensor, lengths_B: Tensor) -> StepOutput:
        self.accepted = prefill(
            self.target,
            self.cache,
            self.drafter.taps,
            tokens_BT,
            lengths_B,
            self.sampler,
            self.sequences,
        )
        first = self.accepted.root_B[:, None].tolist()
        self.stats.lap("prefill")
        return StepOutput(self.sequences, first)

    def draft(self, limits: DraftLimits) -> None:
        step = self._commit()
        depth = min(self.drafter.shape.depth, limits.remaining)
        if limits.context is not None:
            depth = min(depth, limits.context)
        self.tree = self.drafter.draft(step, self.sequences, depth)
        self.stats.lap("host")

    def verify(self) -> StepOutput:
        tree = self.tree
        assert tree is not None, "draft comes first"
        output = self.target.forward(tree, self.cache, taps=self.drafter.taps)
        self.stats.lap("verify")
        assert output.logits_BTV is not None
        tokens_BN = sample_tree(self.sampler, self.sequences, tree, output.logits_BTV)
        accepted = accept(tree, tokens_BN)
        tokens = _emitted_tokens(accepted)
        if self.stats.timing and tree.nodes > 1:
            self.stats.lap("host")
            _record_reliability(self.stats, tree, accepted)
            self.stats.pause()
        accepted = accepted.padded(max(map(len, tokens)))
        path_BP = accepted.accepted_path_BP
        self.accepted = AcceptedStep(
            path_BP, accepted.num_accepted_B, output.gather(path_BP), accepted.sampled_tokens_BP
        )
        return self._step_output(tree, tokens)

    def close(self) -> None:
        pass

    def _commit(self) -> AcceptedStep:
        """Commit the accepted path and drop finished sequences; the step of those that remain."""
        step = self.accepted
        assert step is not None, "prefill or verify comes first"
        self.cache.commit(step.accepted_path_BP, step.num_accepted_B)
        kept = _compacted([one.remaining_tokens > 0 for one in self.sequences])
        if len(kept) == len(self.sequences):
            return step
        self.sequences = [self.sequences[index] for index in kept]
        rows = torch.tensor(kept, device=self.target.device)
        self.cache.select_rows(rows)
        self.drafter.select_rows(rows)
        return step.select_rows(rows)

    def _step_output(self, tree: Tree, tokens: list[list[int]]) -> StepOutput:
        batch, num_draft_tokens, tree_depth = len(self.sequences), 0, 0
        if tree.nodes > 1:
            num_draft_tokens = int(tree.valid_BN.sum()) - batch
            tree_depth = int(tree.depths_BN.max())
        expected = None
        if self.policy is not None:
            expected = float(tree.scores_BN.exp().sum()) - batch
        return StepOutput(
            self.sequences,
            tokens,
            num_nodes=tree.nodes,
            num_draft_tokens=num_draft_tokens,
            tree_depth=tree_depth,
            drafted_depth=self.drafter.drafted_depth,
            full_depth=self.drafter.drafted_depth,
            expected=expected,
        )


def _record_reliability(stats: Stats, tree: Tree, accepted: Accepted) -> None:
    """Record the draft's probability of each verified node, and whether it was accepted."""
    accepted_BN = torch.zeros_like(tree.valid_BN).scatter(1, accepted.accepted_path_BP, True)
    drafted_BN = tree.valid_BN.clone()
    drafted_BN[:, 0] = False
    probabilities = tree.scores_BN.exp()[drafted_BN].tolist()
    stats.record_reliability(probabilities, accepted_BN[drafted_BN].tolist())


def _compacted(kept: Sequence[bool]) -> list[int]:
    """The kept batch rows, the last of them moved into the gaps, so that most stay in place."""
    count = sum(kept)
    last = [row for row in range(count, len(kept)) if kept[row]]
    return [row if kept[row] else last.pop() for row in range(count)]


def _emitted_tokens(accepted: Accepted) -> list[list[int]]:
    """Every sequence's sampled tokens, on the host."""
    packed_BP = torch.cat([accepted.num_accepted_B[:, None], accepted.sampled_tokens_BP], 1)
    return [numbers[1 : 1 + numbers[0]] for numbers in packed_BP.tolist()]
