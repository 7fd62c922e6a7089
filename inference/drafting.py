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

from headstart.model.cache import KVCache
from headstart.model.head import DraftHead
from headstart.model.seen import Seen
from headstart.model.target import Target
from headstart.model.tree import Tree, TreeShape

from .budget import Budget
from .lookup import Guess, alone, merge
from .rows import Row
from .stats import Stats

CHAINS = 2  # continuations that are looked up per row


@dataclass(frozen=True)
class Read:
    """Positions that became part of the text: where they lie in the last read, what was seen at
    them, and the token that follows each."""

    path_BP: Tensor
    counts_B: Tensor
    seen: Seen
    next_BP: Tensor

    @property
    def root_B(self) -> Tensor:
        """The last token, which no position holds yet."""
        return self.next_BP.gather(1, self.counts_B[:, None] - 1)[:, 0]

    def keep(self, rows: Tensor) -> Read:
        hidden = {layer: values[rows] for layer, values in self.seen.hidden.items()}
        seen = Seen(None, self.seen.last_BTD[rows], hidden)
        return Read(self.path_BP[rows], self.counts_B[rows], seen, self.next_BP[rows])

    @staticmethod
    def joined(reads: Sequence[Read]) -> Read:
        """The positions of all of them, one after the other."""
        if len(reads) == 1:
            return reads[0]
        counts = [read.counts_B.tolist() for read in reads]

        def join(pick: Callable[[Read], Tensor]) -> Tensor:
            rows = [
                torch.cat([pick(read)[b, : n[b]] for read, n in zip(reads, counts, strict=True)])
                for b in range(len(counts[0]))
            ]
            return pad_sequence(rows, batch_first=True)

        hidden = {
            layer: join(lambda read, layer=layer: read.seen.hidden[layer])  # type: ignore[misc]
            for layer in reads[0].seen.hidden
        }
        seen = Seen(None, join(lambda read: read.seen.last_BTD), hidden)
        counts_B = torch.stack([read.counts_B for read in reads]).sum(0)
        return Read(reads[-1].path_BP, counts_B, seen, join(lambda read: read.next_BP))


def read_prompts(
    target: Target,
    cache: KVCache,
    layers: tuple[int, ...],
    tokens_BT: Tensor,
    lengths_B: Tensor,
    draw: Callable[[Tree, Tensor], Tensor],
) -> Read:
    """Read the prompts and draw the first token of each answer, which is the `root_B` of the next
    tree. draw: from a tree and its logits."""
    # Logits of a whole prompt would be large, and only the last ones are needed.
    seen = target.read(tokens_BT, cache, lengths_B=lengths_B, layers=layers, logits=False)
    last_B1 = lengths_B[:, None] - 1
    logits_B1V = target.unembed(seen.at(last_B1).last_BTD)
    first_B1 = draw(Tree.root(tokens_BT.gather(1, last_B1)[:, 0]), logits_B1V)
    path_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    next_BT = tokens_BT.roll(-1, dims=1).scatter(1, last_B1, first_B1)
    return Read(path_BT, lengths_B, seen, next_BT)


class Drafter:
    """The guesses of one run. head None: only what is looked up, if that. chain: of all guesses
    only the likeliest chain is read."""

    def __init__(
        self,
        head: DraftHead | None,
        shape: TreeShape,
        budget: Budget | None,
        rows: int,
        stats: Stats,
        chain: bool = False,
    ):
        self.head, self.shape, self.stats, self.chain = head, shape, stats, chain
        self.state: Any = None if head is None else head.start(rows)
        self.spending = None if budget is None else budget.start()
        self.behind: list[Read] = []  # not yet taken in by the head
        self.asked, self.depth = False, 0

    @property
    def layers(self) -> tuple[int, ...]:
        return () if self.head is None else self.head.layers

    def keep(self, rows: Tensor) -> None:
        """Only these batch rows go on."""
        if self.head is not None:
            self.state = self.head.keep(self.state, rows)
            self.behind = [read.keep(rows) for read in self.behind]

    def tree(self, read: Read, rows: Sequence[Row], depth: int) -> Tree:
        """Guess on behind what was just read, at most `depth` tokens."""
        guesses: list[list[Guess]] = []
        if self.spending is None or self.spending.looks_up(len(rows)):
            guesses = [row.lookup.guesses(depth, CHAINS) for row in rows if row.lookup is not None]
        tree = self._asked_head(read, guesses, depth)
        if tree is None and self.spending is not None:
            promised = sum(math.exp(logp) for row in guesses for one in row for logp in one.logp)
            if not self.spending.could_pay(promised, len(rows)):
                return Tree.root(read.root_B)
        if guesses:
            tree = alone(read.root_B, guesses) if tree is None else merge(tree, guesses)
        if tree is None:
            return Tree.root(read.root_B)
        if self.chain and guesses:
            tree = tree.likeliest_chain()
        nodes = self.shape.nodes
        if self.spending is not None:
            nodes = min(nodes, self.spending.nodes(tree.scores_BN))
        return Tree.root(read.root_B) if nodes == 1 else tree.cut(nodes).chain_first()

    def learn(self, tree: Tree, emitted: int) -> None:
        """What the tree was good for: tokens emitted in all rows."""
        if self.spending is not None:
            rows, nodes = tree.tokens_BN.shape
            hoped = float(tree.scores_BN.exp().sum()) - rows
            self.spending.learn(rows, emitted, nodes, self.depth if self.asked else 0, hoped)

    def _asked_head(
        self, read: Read, guesses: Sequence[Sequence[Guess]], depth: int
    ) -> Tree | None:
        """The head's tree, or None where it is not asked."""
        self.asked = False
        if self.head is None:
            return None
        self.behind.append(read)
        known, rows = _expected(guesses), len(read.counts_B)
        if self.spending is not None and not self.spending.asks_head(known, rows):
            return None
        self.stats.lap("host")
        read, self.behind, self.asked = Read.joined(self.behind), [], True
        self.state = self.head.advance(self.state, read.seen, read.next_BP, read.counts_B)
        self.depth = 0
        tree = self.head.draft(self.state, self.shape.limited(depth), self._goes_on)
        self.stats.lap("draft")
        return tree

    def _goes_on(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
        self.depth += 1
        return self.spending is None or self.spending.goes_on(scores_BN, deepest_BM)


def _expected(guesses: Sequence[Sequence[Guess]]) -> float:
    """Tokens per row that the likeliest looked up continuations will give."""
    best = [max((sum(map(math.exp, one.logp)) for one in row), default=0.0) for row in guesses]
    return sum(best) / max(len(best), 1)
