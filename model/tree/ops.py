"""The tensor operations that growing and verifying a tree needs, and their reference in torch.

A backend with kernels of its own offers the same functions: `grow` and `Tree` take them as `ops`.

Legend: B sequences, N tree nodes, F frontier nodes, G those of the depth before, M nodes drafted so
far, W children per node, K nodes of the next frontier.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

Pool = tuple[Tensor, Tensor, Tensor]  # tokens, parents and scores, each B x capacity


class TreeOps(Protocol):
    """See `TorchTreeOps` for what each function computes."""

    def ancestors(self, parents_BN: Tensor) -> Tensor: ...

    def inherit(self, before_BGM: Tensor | None, parents_BF: Tensor) -> Tensor: ...

    def expand(
        self,
        pool: Pool,
        used: int,
        frontier_BF: Tensor,
        children: tuple[Tensor, Tensor],
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class TorchTreeOps:
    """The reference: any device."""

    def ancestors(self, parents_BN: Tensor) -> Tensor:
        """Ancestor matrix B x N x N: [b, n, m] is True where m is n itself or an ancestor of n.

        parents_BN: index of each node's parent, which precedes it; negative where there is none.
        """
        batch, nodes = parents_BN.shape
        own_N = torch.arange(nodes, device=parents_BN.device)
        ancestors_BNN = (own_N[:, None] == own_N).repeat(batch, 1, 1)
        # Pointer jumping: merge the ancestors of the node `reach` levels up, then double the reach.
        up_BN = torch.where(parents_BN >= 0, parents_BN, own_N)
        reach = 1
        while reach < nodes:
            inherited_BNN = ancestors_BNN.gather(1, up_BN[..., None].expand(-1, -1, nodes))
            ancestors_BNN = ancestors_BNN | inherited_BNN
            up_BN = up_BN.gather(1, up_BN)
            reach *= 2
        return ancestors_BNN

    def inherit(self, before_BGM: Tensor | None, parents_BF: Tensor) -> Tensor:
        """Visibility among drafted nodes after one more depth, B x F x (M + F).

        A node sees what its parent saw, and itself.
        before_BGM: visibility of the depth before; None at the first depth.
        parents_BF: each new node's parent as an index into the depth before.
        """
        batch, new = parents_BF.shape
        own_BFF = torch.eye(new, dtype=torch.bool, device=parents_BF.device).expand(batch, -1, -1)
        if before_BGM is None:
            return own_BFF
        parents_BFM = parents_BF[..., None].expand(-1, -1, before_BGM.shape[-1])
        return torch.cat([before_BGM.gather(1, parents_BFM), own_BFF], -1)

    def expand(
        self,
        pool: Pool,
        used: int,
        frontier_BF: Tensor,
        children: tuple[Tensor, Tensor],
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the children of a frontier to the pool in place, and pick the next frontier.

        pool: of which `used` nodes are taken. frontier_BF: the frontier as indices into the pool.
        children: log-probabilities and tokens of the children, each B x F x W.
        width: size K of the next frontier, the children with the highest scores.
        Returns the next frontier, each B x K: indices into the pool, tokens, and each node's parent
        as an index into `frontier_BF`.
        """
        tokens_BM, parents_BM, scores_BM = pool
        logp_BFW, tokens_BFW = children
        batch, frontier, each = tokens_BFW.shape
        end = used + frontier * each
        scores_BFW = scores_BM.gather(1, frontier_BF)[..., None] + logp_BFW.float()
        new_scores_BC = scores_BFW.flatten(1)
        tokens_BM[:, used:end] = tokens_BFW.flatten(1)
        parents_BM[:, used:end] = (
            frontier_BF[..., None].expand(batch, frontier, each).reshape(batch, -1)
        )
        scores_BM[:, used:end] = new_scores_BC
        best_BK = new_scores_BC.topk(min(width, end - used), dim=1).indices
        return used + best_BK, tokens_BM[:, used:end].gather(1, best_BK), best_BK // each


TORCH_TREE_OPS = TorchTreeOps()
