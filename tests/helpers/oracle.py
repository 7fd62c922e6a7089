"""A head for tests that knows the answer and is wrong on purpose.

Random heads are almost never right, so a decoder under them never walks deep, never takes a side
branch and never moves keys. This one proposes the true continuation with corruptions at random
depths, and puts the true token at a random rank among its siblings.

Legend: B batch rows, F frontier nodes, W children per node.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstart.model.heads.common.base import DraftHead, HeadConfig
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.grow import Children, Frontier, ShouldDeepen, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree


@dataclass(frozen=True)
class Known:
    """rows: places in the batch at the start. told: tokens of each answer that are committed, the
    root included."""

    rows: list[int]
    told: list[int]


class Oracle(DraftHead):
    """answers: the true continuation of every prompt. right: probability that a node on the true
    path has the true child at all. first: probability that it is then the likeliest child.

    side_branches counts true children of a lower rank that were then accepted.
    """

    kind = "oracle"

    def __init__(
        self, target: Target, answers: list[list[int]], right: float = 0.8, first: float = 0.6
    ):
        sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
        super().__init__(HeadConfig(kind="oracle", **sizes))
        self.taps = (0,)
        self.bind(target)
        self.answers, self.right, self.first = answers, right, first
        self.side_branches = 0
        self._random = random.Random(0)
        self._ranks: dict[int, int] = {}

    @classmethod
    def defaults(cls, target: Target) -> dict[str, Any]:
        return {}

    def init_from_target(self) -> None:
        pass

    def unroll(self, seen: TargetOutput, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        raise NotImplementedError("an oracle is not trained")

    def start(self, batch_size: int) -> Known:
        return Known(list(range(batch_size)), [0] * batch_size)

    def select_rows(self, state: Known, rows: Tensor) -> Known:
        kept = rows.tolist()
        return Known([state.rows[row] for row in kept], [state.told[row] for row in kept])

    def advance(
        self, state: Known, seen: TargetOutput, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> Known:
        """Checks on the way that what it is told is the answer, and that features fit."""
        assert (
            seen.hidden_states[0].shape[:2]
            == seen.lm_head_input_BTD.shape[:2]
            == next_tokens_BP.shape
        )
        told = []
        for place, (row, before) in enumerate(zip(state.rows, state.told, strict=True)):
            count = int(counts_B[place])
            new = next_tokens_BP[place, :count].tolist()
            new = new[-1:] if before == 0 else new  # the prompt's tokens are not the answer's
            assert new == self.answers[row][before : before + len(new)]
            self.side_branches += before > 0 and count > 1 and self._ranks.get(row, 0) > 0
            told.append(before + len(new))
        return replace(state, told=told)

    def draft(
        self, state: Known, shape: TreeShape, should_deepen: ShouldDeepen | None = None
    ) -> Tree:
        roots_B = torch.tensor(
            [self.answers[row][told - 1] for row, told in zip(state.rows, state.told, strict=True)]
        )
        self._ranks = {}
        true_BF = torch.ones(len(roots_B), 1, dtype=torch.bool)

        def children(depth: int) -> Children:
            lists = [
                [self._children(row, told, depth, on, shape.width) for on in trues]
                for row, told, trues in zip(state.rows, state.told, true_BF.tolist(), strict=True)
            ]
            tokens_BFW = torch.tensor(lists)
            logp_BFW = torch.rand(tokens_BFW.shape).mul(-2).sort(-1, descending=True).values
            return logp_BFW - 0.1, tokens_BFW

        def step(frontier: Frontier) -> Children:
            nonlocal true_BF
            truth_B1 = torch.tensor(
                [
                    [(self.answers[row] + [-1] * 99)[told + frontier.depth - 1]]
                    for row, told in zip(state.rows, state.told, strict=True)
                ]
            )
            true_BF = true_BF.gather(1, frontier.parents_BF) & (frontier.tokens_BF == truth_B1)
            return children(frontier.depth)

        return grow(roots_B, children(0), step, shape, should_deepen)

    def _children(self, row: int, told: int, depth: int, on_path: bool, width: int) -> list[int]:
        """Distinct tokens for a node at a depth, perhaps with the true one among them."""
        answer, place = self.answers[row], told + depth
        truth = answer[place] if on_path and place < len(answer) else None
        wrong = [token for token in range(self.config.vocab_size) if token != truth]
        tokens = self._random.sample(wrong, width)
        if truth is not None and self._random.random() < self.right:
            rank = 0 if self._random.random() < self.first else self._random.randrange(width)
            tokens[rank] = truth
            if depth == 0:
                self._ranks[row] = rank
        return tokens
