"""A tree of guessed tokens, and how one grows. Knows no model and no cache.

Legend: B batch rows, N tree nodes, M nodes of one depth or chosen ones, F frontier nodes (those
expanded at one depth), W children per node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headstart.model.backends import cuda_ops as accelerated

NO_PARENT = -1


@dataclass(frozen=True)
class Tree:
    """Guesses for what follows the last committed token, which is node 0.

    tokens_BN: token of each node. parents_BN: index of each node's parent, which precedes it; -1
    for the root and for padding. scores_BN: log of the draft's probability of the path to the
    node (0 for the root, -inf for padding).
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    scores_BN: Tensor

    @staticmethod
    def root(tokens_B: Tensor) -> Tree:
        """The tree of plain decoding: no guess at all."""
        tokens_BN = tokens_B[:, None]
        zeros = torch.zeros_like(tokens_BN)
        return Tree(tokens_BN, zeros + NO_PARENT, zeros.float())

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
        nodes, on_a_gpu = self.nodes, accelerated.functions(self.tokens_BN.device)
        if on_a_gpu is not None:
            ancestors: Tensor = on_a_gpu.ancestors(self.parents_BN)
            return ancestors
        own_N = torch.arange(nodes, device=self.tokens_BN.device)
        ancestors_BNN = (own_N[:, None] == own_N).repeat(self.tokens_BN.shape[0], 1, 1)
        # Take over what the node `reach` levels up sees, and double the reach: log2(nodes) rounds.
        up_BN = torch.where(self.parents_BN >= 0, self.parents_BN, own_N)
        reach = 1
        while reach < nodes:
            inherited_BNN = ancestors_BNN.gather(1, up_BN[..., None].expand(-1, -1, nodes))
            ancestors_BNN = ancestors_BNN | inherited_BNN
            up_BN = up_BN.gather(1, up_BN)
            reach *= 2
        return ancestors_BNN

    @cached_property
    def depths_BN(self) -> Tensor:
        """0 for the root, 1 for its children, and so on (0 for padding)."""
        if self.nodes == 1:
            return torch.zeros_like(self.tokens_BN)
        return self.ancestors_BNN.sum(-1) - 1

    def cut(self, nodes: int) -> Tree:
        """The likeliest `nodes` nodes, root included: a parent never scores below its child."""
        if nodes >= self.nodes:
            return self
        order_BN = self.scores_BN.sort(dim=1, descending=True, stable=True).indices
        return self._taken(order_BN[:, :nodes].sort(dim=1).values)  # parents stay in front

    def chain_first(self) -> Tree:
        """The same tree with its likeliest chain in front: from each node to its likeliest child.

        When that chain is what the target says, its keys lie where they belong already.
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
        return self._taken(off_BN.to(torch.uint8).argsort(dim=1, stable=True))

    def likeliest_chain(self) -> Tree:
        """Only the chain from each node to its likeliest child, of a single row. Reads the tree on
        the host."""
        tree = self.chain_first()
        (parents,) = tree.parents_BN.tolist()
        length = next((n for n, parent in enumerate(parents) if parent != n - 1), len(parents))
        return Tree(
            tree.tokens_BN[:, :length], tree.parents_BN[:, :length], tree.scores_BN[:, :length]
        )

    def _taken(self, kept_BM: Tensor) -> Tree:
        """The nodes kept_BM in that order; with each node comes its parent, before it."""
        rank_BN = torch.full_like(self.tokens_BN, NO_PARENT)
        places_BM = torch.arange(kept_BM.shape[1], device=kept_BM.device).expand_as(kept_BM)
        rank_BN.scatter_(1, kept_BM, places_BM)
        parents_BM = self.parents_BN.gather(1, kept_BM)
        moved_BM = rank_BN.gather(1, parents_BM.clamp(min=0))
        return Tree(
            self.tokens_BN.gather(1, kept_BM),
            torch.where(parents_BM >= 0, moved_BM, parents_BM),
            self.scores_BN.gather(1, kept_BM),
        )
