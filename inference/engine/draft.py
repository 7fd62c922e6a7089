"""Where the guesses of a round come from, and how many of them are read.

Two sources: the head, and the text itself (`lookup`). Their nodes are merged into one tree, the
budget says how many pay, and the likeliest chain goes to the front. On text that the head does not
know the budget sends it away for a while; what was read meanwhile waits here, and the head takes it
in at once when it is asked again.

Legend: B batch rows, N tree nodes, P places of a path, T prompt positions, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from headstart.inference.ngram import NgramDraft, alone, merge
from headstart.inference.tree_policy.adaptive import AdaptivePolicy
from headstart.inference.tree_policy.cost_model import Costs
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

from .sequence import SequenceState
from .stats import Stats

CHAINS = 2  # continuations that are looked up per row


@dataclass(frozen=True)
class AcceptedStep:
    """Positions that became part of the text: where they lie in the last read, what was seen at
    them, and the token that follows each."""

    path_BP: Tensor
    counts_B: Tensor
    output: TargetOutput
    next_BP: Tensor

    @property
    def root_B(self) -> Tensor:
        """The last token, which no position holds yet."""
        return self.next_BP.gather(1, self.counts_B[:, None] - 1)[:, 0]

    def select_rows(self, rows: Tensor) -> AcceptedStep:
        hidden = {layer: values[rows] for layer, values in self.output.hidden_states.items()}
        seen = TargetOutput(None, self.output.lm_head_input_BTD[rows], hidden)
        return AcceptedStep(self.path_BP[rows], self.counts_B[rows], seen, self.next_BP[rows])

    @staticmethod
    def joined(reads: Sequence[AcceptedStep]) -> AcceptedStep:
        """The positions of all of them, one after the other."""
        if len(reads) == 1:
            return reads[0]
        counts = [read.counts_B.tolist() for read in reads]

        def join(pick: Callable[[AcceptedStep], Tensor]) -> Tensor:
            rows = [
                torch.cat([pick(read)[b, : n[b]] for read, n in zip(reads, counts, strict=True)])
                for b in range(len(counts[0]))
            ]
            return pad_sequence(rows, batch_first=True)

        hidden = {
            layer: join(lambda read, layer=layer: read.output.hidden_states[layer])  # type: ignore[misc]
            for layer in reads[0].output.hidden_states
        }
        seen = TargetOutput(None, join(lambda read: read.output.lm_head_input_BTD), hidden)
        counts_B = torch.stack([read.counts_B for read in reads]).sum(0)
        return AcceptedStep(reads[-1].path_BP, counts_B, seen, join(lambda read: read.next_BP))


def read_prompts(
    target: Target,
    cache: KVCache,
    layers: tuple[int, ...],
    tokens_BT: Tensor,
    lengths_B: Tensor,
    draw: Callable[[Tree, Tensor], Tensor],
) -> AcceptedStep:
    """Read the prompts and draw the first token of each answer, which is the `root_B` of the next
    tree. draw: from a tree and its logits."""
    # Logits of a whole prompt would be large, and only the last ones are needed.
    seen = target.forward(tokens_BT, cache, lengths_B=lengths_B, taps=layers, logits=False)
    last_B1 = lengths_B[:, None] - 1
    logits_B1V = target.unembed(seen.gather(last_B1).lm_head_input_BTD)
    first_B1 = draw(Tree.root(tokens_BT.gather(1, last_B1)[:, 0]), logits_B1V)
    path_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    next_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B1, first_B1)
    return AcceptedStep(path_BT, lengths_B, seen, next_BT)


class Drafter:
    """The guesses of one run. head None: only what is looked up, if that. chain: of all guesses
    only the likeliest chain is read."""

    def __init__(
        self,
        head: DraftHead | None,
        shape: TreeShape,
        costs: Costs | None,
        rows: int,
        stats: Stats,
        chain: bool = False,
    ):
        self.head, self.shape, self.stats, self.chain = head, shape, stats, chain
        self.state: Any = None if head is None else head.start(rows)
        self.policy = None if costs is None else AdaptivePolicy(costs)
        self.behind: list[AcceptedStep] = []  # not yet taken in by the head
        self.asked, self.depth = False, 0

    @property
    def taps(self) -> tuple[int, ...]:
        return () if self.head is None else self.head.taps

    def select_rows(self, rows: Tensor) -> None:
        """Only these batch rows go on."""
        if self.head is not None:
            self.state = self.head.select_rows(self.state, rows)
            self.behind = [read.select_rows(rows) for read in self.behind]

    def tree(self, read: AcceptedStep, rows: Sequence[SequenceState], depth: int) -> Tree:
        """Guess on behind what was just read, at most `depth` tokens."""
        candidates: list[list[NgramDraft]] = []
        if self.policy is None or self.policy.searches_ngrams(len(rows)):
            candidates = [
                row.lookup.candidates(depth, CHAINS) for row in rows if row.lookup is not None
            ]
        tree = self._asked_head(read, candidates, depth)
        if tree is None and self.policy is not None:
            promised = sum(math.exp(logp) for row in candidates for one in row for logp in one.logp)
            if not self.policy.could_pay(promised, len(rows)):
                return Tree.root(read.root_B)
        if candidates:
            tree = alone(read.root_B, candidates) if tree is None else merge(tree, candidates)
        if tree is None:
            return Tree.root(read.root_B)
        if self.chain and candidates:
            tree = tree.top1_chain()
        nodes = self.shape.nodes
        if self.policy is not None:
            nodes = min(nodes, self.policy.num_nodes(tree.scores_BN))
        return Tree.root(read.root_B) if nodes == 1 else tree.cut(nodes).chain_first()

    def update_policy(self, tree: Tree, emitted: int) -> None:
        """What the tree was good for: tokens emitted in all rows."""
        if self.policy is not None:
            rows, nodes = tree.tokens_BN.shape
            hoped = float(tree.scores_BN.exp().sum()) - rows
            self.policy.update(rows, emitted, nodes, self.depth if self.asked else 0, hoped)

    def _asked_head(
        self, read: AcceptedStep, candidates: Sequence[Sequence[NgramDraft]], depth: int
    ) -> Tree | None:
        """The head's tree, or None where it is not asked."""
        self.asked = False
        if self.head is None:
            return None
        self.behind.append(read)
        known, rows = _expected(candidates), len(read.counts_B)
        if self.policy is not None and not self.policy.uses_head(known, rows):
            return None
        self.stats.lap("host")
        read, self.behind, self.asked = AcceptedStep.joined(self.behind), [], True
        self.state = self.head.advance(self.state, read.output, read.next_BP, read.counts_B)
        self.depth = 0
        tree = self.head.draft(self.state, self.shape.limited(depth), self._goes_on)
        self.stats.lap("draft")
        return tree

    def _goes_on(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
        self.depth += 1
        return self.policy is None or self.policy.should_deepen(scores_BN, deepest_BM)


def _expected(candidates: Sequence[Sequence[NgramDraft]]) -> float:
    """Tokens per row that the likeliest looked up continuations will give."""
    best = [max((sum(map(math.exp, one.logp)) for one in row), default=0.0) for row in candidates]
    return sum(best) / max(len(best), 1)
