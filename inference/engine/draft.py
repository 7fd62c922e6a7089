"""Draft the trees of a decode step, from the head and from n-grams of the sequence.

The nodes of both are merged into one tree, the policy decides how many of them pay, and the
likeliest chain moves to the front. While the policy pauses the head, accepted positions wait here;
the head processes them at once when it drafts again.

Legend: B sequences, N tree nodes, M nodes of the deepest level, P positions of a path, D hidden
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headstart.inference.ngram import NgramDraft, merge_ngrams, ngram_tree
from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .sequence import SequenceState
from .stats import Stats

NGRAM_DRAFTS = 2  # n-gram drafts per sequence


@dataclass(frozen=True)
class AcceptedStep:
    """Positions that the last step added to the sequences.

    accepted_path_BP: their nodes in the verified tree (or positions in the prompt).
    num_accepted_B: how many of them are real; the rest is padding.
    output: of the target, at these positions.
    next_tokens_BP: the token that follows each of them.
    """

    accepted_path_BP: Tensor
    num_accepted_B: Tensor
    output: TargetOutput
    next_tokens_BP: Tensor

    @property
    def root_B(self) -> Tensor:
        """The last token of each sequence, which the target has not processed yet."""
        return self.next_tokens_BP.gather(1, self.num_accepted_B[:, None] - 1)[:, 0]

    def select_rows(self, rows: Tensor) -> AcceptedStep:
        hidden = {layer: values[rows] for layer, values in self.output.hidden_states.items()}
        output = TargetOutput(None, self.output.lm_head_input_BTD[rows], hidden)
        path_BP, next_tokens_BP = self.accepted_path_BP[rows], self.next_tokens_BP[rows]
        return AcceptedStep(path_BP, self.num_accepted_B[rows], output, next_tokens_BP)

    @staticmethod
    def concatenated(steps: Sequence[AcceptedStep]) -> AcceptedStep:
        """The positions of all steps, one after the other. Only the last one's path is kept."""
        if len(steps) == 1:
            return steps[0]
        counts = [step.num_accepted_B.tolist() for step in steps]

        def join(pick: Callable[[AcceptedStep], Tensor]) -> Tensor:
            rows = [
                torch.cat([pick(step)[b, : n[b]] for step, n in zip(steps, counts, strict=True)])
                for b in range(len(counts[0]))
            ]
            return pad_sequence(rows, batch_first=True)

        hidden = {
            layer: join(lambda step, layer=layer: step.output.hidden_states[layer])  # type: ignore[misc]
            for layer in steps[0].output.hidden_states
        }
        output = TargetOutput(None, join(lambda step: step.output.lm_head_input_BTD), hidden)
        num_accepted_B = torch.stack([step.num_accepted_B for step in steps]).sum(0)
        path_BP = steps[-1].accepted_path_BP
        return AcceptedStep(path_BP, num_accepted_B, output, join(lambda one: one.next_tokens_BP))


class Drafter:
    """Drafts the trees of one run.

    head: None: only n-gram drafts, if the sequences have any.
    shape: of the trees; with a policy the largest one.
    chain_only: verify only the likeliest chain of all drafts.
    drafted_depth: that the head drafted in the last step; 0: it did not.
    """

    def __init__(
        self,
        head: DraftHead | None,
        shape: TreeShape,
        policy: AdaptivePolicy | None,
        batch: int,
        stats: Stats,
        chain_only: bool = False,
    ):
        self.head, self.shape, self.policy = head, shape, policy
        self.stats, self.chain_only = stats, chain_only
        self.state: Any = None if head is None else head.start(batch)
        self.pending_inputs: list[AcceptedStep] = []  # not yet processed by the head
        self.drafted_depth = 0

    @property
    def taps(self) -> tuple[int, ...]:
        return () if self.head is None else self.head.taps

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these sequences of the batch."""
        if self.head is not None:
            self.state = self.head.select_rows(self.state, rows)
            self.pending_inputs = [step.select_rows(rows) for step in self.pending_inputs]

    def draft(self, step: AcceptedStep, sequences: Sequence[SequenceState], depth: int) -> Tree:
        """The trees to verify next.

        step: positions that were accepted last.
        depth: maximum depth of the drafts; 0: the trees are roots.
        """
        self.drafted_depth = 0
        if depth == 0:
            return Tree.root(step.root_B)
        ngrams = self._ngram_drafts(sequences, depth)
        tree = self._head_tree(step, ngrams, depth)
        if tree is None and self.policy is not None:
            expected = sum(math.exp(logp) for row in ngrams for one in row for logp in one.logp)
            if not self.policy.could_pay(expected, len(sequences)):
                return Tree.root(step.root_B)
        if ngrams:
            tree = ngram_tree(step.root_B, ngrams) if tree is None else merge_ngrams(tree, ngrams)
        if tree is None:
            return Tree.root(step.root_B)
        if self.chain_only and ngrams:
            tree = tree.top1_chain()
        nodes = self.shape.nodes
        if self.policy is not None:
            nodes = min(nodes, self.policy.num_nodes(tree.scores_BN))
        return Tree.root(step.root_B) if nodes == 1 else tree.cut(nodes).chain_first()

    def _ngram_drafts(
        self, sequences: Sequence[SequenceState], depth: int
    ) -> list[list[NgramDraft]]:
        if self.policy is not None and not self.policy.searches_ngrams(len(sequences)):
            return []
        return [
            sequence.ngrams.drafts(depth, NGRAM_DRAFTS)
            for sequence in sequences
            if sequence.ngrams is not None
        ]

    def _head_tree(
        self, step: AcceptedStep, ngrams: Sequence[Sequence[NgramDraft]], depth: int
    ) -> Tree | None:
        """The head's tree, or None where it does not draft."""
        if self.head is None:
            return None
        self.pending_inputs.append(step)
        if self.policy is not None:
            if not self.policy.uses_head(_expected(ngrams), len(step.num_accepted_B)):
                return None
        self.stats.lap("host")
        step, self.pending_inputs = AcceptedStep.concatenated(self.pending_inputs), []
        self.state = self.head.advance(
            self.state, step.output, step.next_tokens_BP, step.num_accepted_B
        )
        tree = self.head.draft(self.state, self.shape.limited(depth), self._should_deepen)
        self.stats.lap("draft")
        return tree

    def _should_deepen(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
        self.drafted_depth += 1
        return self.policy is None or self.policy.should_deepen(scores_BN, deepest_BM)


def _expected(ngrams: Sequence[Sequence[NgramDraft]]) -> float:
    """Accepted tokens per sequence to expect from its likeliest n-gram draft."""
    best = [max((sum(map(math.exp, one.logp)) for one in row), default=0.0) for row in ngrams]
    return sum(best) / max(len(best), 1)
