"""Medusa (arXiv 2401.10774): independent residual heads on the last hidden state.

    head k:  z = h + SiLU(W_k h + b_k)      p(x[t+2+k]) = softmax(lm_head(z))

The LM head is the target's own, shared by all heads, which keeps the file small; W starts at zero,
so every head starts as the LM head. The heads do not see each other's drafts, so all nodes of one
depth have the same children.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from headstart.model.heads.common.base import DraftHead, HeadConfig
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.tree.grow import Children, Frontier, ShouldDeepen, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree


class Config(HeadConfig):
    num_heads: int = Field(default=4, ge=1, description="Heads: draft tokens ahead.")
    num_layers: int = Field(default=1, ge=1, description="Residual blocks per head.")


@dataclass(frozen=True)
class State:
    """The hidden state before the root, and the root token."""

    last_B1D: Tensor | None = None
    root_B: Tensor | None = None


class ResidualBlock(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class Head(DraftHead):
    kind = "medusa"

    def __init__(self, config: Config):
        super().__init__(config)
        size = config.hidden_size
        self.max_depth = config.num_heads
        self.heads = nn.ModuleList(
            nn.Sequential(*[ResidualBlock(size) for _ in range(config.num_layers)])
            for _ in range(config.num_heads)
        )

    @classmethod
    def defaults(cls, target: Target) -> dict[str, Any]:
        return {}

    def init_from_target(self) -> None:
        """Nothing to do: zero blocks already make every head the target's LM head."""

    def unroll(self, seen: TargetOutput, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        if steps > len(self.heads):
            raise ValueError(
                f"Medusa has {len(self.heads)} heads and cannot be trained for {steps} steps. "
                "Raise head.num_heads or lower loss.steps."
            )
        lm_head_input_BTD = self._feature(seen)
        return [head(lm_head_input_BTD) for head in self.heads[:steps]]

    def start(self, batch_size: int) -> State:
        return State()

    def select_rows(self, state: State, rows: Tensor) -> State:
        assert state.last_B1D is not None and state.root_B is not None
        return State(state.last_B1D[rows], state.root_B[rows])

    @torch.no_grad()
    def advance(
        self, state: State, seen: TargetOutput, next_tokens_BP: Tensor, counts_B: Tensor
    ) -> State:
        last_B1 = (counts_B - 1)[:, None]
        return State(self._feature(seen.gather(last_B1)), next_tokens_BP.gather(1, last_B1)[:, 0])

    @torch.no_grad()
    def draft(
        self, state: State, shape: TreeShape, should_deepen: ShouldDeepen | None = None
    ) -> Tree:
        assert state.last_B1D is not None and state.root_B is not None
        last_B1D = state.last_B1D
        shape = shape.limited(len(self.heads))

        def at_depth(depth: int) -> Children:
            return self.candidates(self.heads[depth](last_B1D), shape.width, depth)

        def step(frontier: Frontier) -> Children:
            logp_B1W, tokens_B1W = at_depth(frontier.depth)
            nodes = frontier.tokens_BF.shape[1]
            return logp_B1W.expand(-1, nodes, -1), tokens_B1W.expand(-1, nodes, -1)

        return grow(state.root_B, at_depth(0), step, shape, should_deepen, ops=self.ops)

    def _feature(self, seen: TargetOutput) -> Tensor:
        dtype = next(self.parameters()).dtype
        return seen.lm_head_input_BTD.to(dtype)
