"""A tree of draft tokens. Knows no model and no cache.

Legend: B sequences, N tree nodes, M selected nodes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .ops import TORCH_TREE_OPS, TreeOps

NO_PARENT = -1


@dataclass(frozen=True)
class Tree:
    """Draft tokens behind the last committed token, which is node 0.

    tokens_BN: token of each node.
    parents_BN: index of each node's parent, which precedes it; -1 for the root and for padding.
    scores_BN: log-probability of the path to the node under the draft head; 0 for the root, -inf
        for padding.
    ops: the tree functions of the device.
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    scores_BN: Tensor
    ops: TreeOps = field(default=TORCH_TREE_OPS, compare=False, repr=False)

    @staticmethod
    def root(tokens_B: Tensor, ops: TreeOps = TORCH_TREE_OPS) -> Tree:
        """The tree of autoregressive decoding: no draft tokens."""
        tokens_BN = tokens_B[:, None]
        zeros = torch.zeros_like(tokens_BN)
        return Tree(tokens_BN, zeros + NO_PARENT, zeros.float(), ops)

    @property
    def nodes(self) -> int:
        return self.tokens_BN.shape[1]

    @cached_property
    def valid_BN(self) -> Tensor:
        """True for the root and for nodes that are not padding."""
        valid_BN = self.parents_BN >= 0
        valid_BN[:, 0] = True
        return valid_BN

    @cached_property
    def ancestors_BNN(self) -> Tensor:
        """[b, n, m] is True where node m is node n itself or one of its ancestors."""
        if self.nodes == 1:
            return torch.ones_like(self.tokens_BN, dtype=torch.bool)[..., None]
        return self.ops.ancestors(self.parents_BN)

    @cached_property
    def depths_BN(self) -> Tensor:
        """0 for the root, 1 for its children, and so on (0 for padding)."""
        if self.nodes == 1:
            return torch.zeros_like(self.tokens_BN)
        return self.ancestors_BNN.sum(-1) - 1

    def cut(self, nodes: int) -> Tree:
        """Keep the `nodes` nodes with the highest scores, root included.

        No node scores higher than its parent, so the result is a tree.
        """
        if nodes >= self.nodes:
            return self
        order_BN = self.scores_BN.sort(dim=1, descending=True, stable=True).indices
        return self._select(order_BN[:, :nodes].sort(dim=1).values)  # parents stay in front

    def chain_first(self) -> Tree:
        """The same tree with its top-1 chain in front: from each node to its best child.

        Where that chain is accepted, its keys are in their final cache slots already.
        """
        if self.nodes <= 2:
            return self
        parents_BN = self.parents_BN.clamp(min=0)
        none_BN = torch.full_like(self.scores_BN, -torch.inf)
        inner_BN = torch.where(self.parents_BN >= 0, self.scores_BN, -torch.inf)
        best_BN = none_BN.scatter_reduce(1, parents_BN, inner_BN, "amax")
        later_BN = (inner_BN < best_BN.gather(1, parents_BN)) | ~self.valid_BN
        later_BN[:, 0] = False
        off_BN = (self.ancestors_BNN & later_BN[:, None]).any(-1)
        return self._select(off_BN.to(torch.uint8).argsort(dim=1, stable=True))

    def top1_chain(self) -> Tree:
        """The chain from each node to its best child alone. B = 1; copies the tree to the host."""
        tree = self.chain_first()
        (parents,) = tree.parents_BN.tolist()
        length = next((n for n, parent in enumerate(parents) if parent != n - 1), len(parents))
        tokens_BN, parents_BN, scores_BN = tree.tokens_BN, tree.parents_BN, tree.scores_BN
        return Tree(tokens_BN[:, :length], parents_BN[:, :length], scores_BN[:, :length], self.ops)

    def _select(self, kept_BM: Tensor) -> Tree:
        """The nodes `kept_BM` in that order, which must hold each node's parent in front of it."""
        new_BN = torch.full_like(self.tokens_BN, NO_PARENT)
        order_BM = torch.arange(kept_BM.shape[1], device=kept_BM.device).expand_as(kept_BM)
        new_BN.scatter_(1, kept_BM, order_BM)
        parents_BM = self.parents_BN.gather(1, kept_BM)
        moved_BM = new_BN.gather(1, parents_BM.clamp(min=0))
        return Tree(
            self.tokens_BN.gather(1, kept_BM),
            torch.where(parents_BM >= 0, moved_BM, parents_BM),
            self.scores_BN.gather(1, kept_BM),
            self.ops,
        )
