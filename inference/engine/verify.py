"""Which guesses of a tree are kept. That the output is exact is decided here and nowhere else.

Legend: B batch rows, N tree nodes, P places of a path, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.model.tree.tree import Tree


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every row, and what it emits.

    path_BP: nodes from the root down; the first counts_B[b] >= 1 are real, the rest is 0.
    tokens_BP: the token drawn at each of them, which is what follows it in the output: place i
    holds the token of node path[i + 1], and the last real place the token that no node guessed.
    """

    path_BP: Tensor
    counts_B: Tensor
    tokens_BP: Tensor

    def first(self, places: int) -> Accepted:
        """The same with the padding cut or filled up to `places`, no fewer than any row's count."""
        if places == self.path_BP.shape[1]:
            return self
        more = max(0, places - self.path_BP.shape[1])
        path_BP = pad(self.path_BP[:, :places], (0, more))
        return Accepted(path_BP, self.counts_B, pad(self.tokens_BP[:, :places], (0, more)))


def accept(tree: Tree, draws_BN: Tensor) -> Accepted:
    """Walk from the root to the child that matches the draw, as far as it goes.

    draws_BN: for each node one draw from the target's distribution after it (`Sampler.draw`; greedy
    decoding draws the likeliest token), -1 where the walk cannot come by. Pure. P is N.

    The token emitted after a node is always the target's own draw there, whatever the tree holds: a
    tree can be bad, never wrong. A child is met with the target's probability of it, which no
    lossless rule can beat for a tree that was fixed without looking at the draws. Nodes of one
    depth share their noise, because only one of them is ever on the path; so the tokens equal
    those of plain decoding with the same noise.

    Drafts that are themselves *sampled* (not the likeliest tokens but draws from the draft's
    distribution q) may be accepted more often than this. That needs q of each parent (N x V, after
    the same temperature and top-p as the target, both from an fp32 softmax), uniform noise per
    node, children drawn without replacement, and rejection: accept child c with probability
    min(1, p(c) / q(c)), else p <- norm(max(p - q, 0)), q(c) <- 0, q <- norm(q), and try its next
    sibling (SpecInfer, arXiv 2305.09781). How many nodes are verified must then not depend on
    their values.
    """
    return accept_on_host(tree, draws_BN) if draws_BN.is_cpu else accept_on_device(tree, draws_BN)


def accept_on_host(tree: Tree, draws_BN: Tensor) -> Accepted:
    """`accept` by a walk in Python: on a CPU it takes a tenth of the time of small operations."""
    paths: list[list[int]] = []
    rows = zip(tree.tokens_BN.tolist(), tree.parents_BN.tolist(), draws_BN.tolist(), strict=True)
    for tokens, parents, draws in rows:
        path = [0]
        for node in range(1, len(tokens)):  # a parent precedes its child
            if parents[node] == path[-1] and tokens[node] == draws[path[-1]]:
                path.append(node)
        paths.append(path)
    path_BN = torch.tensor([path + [0] * (tree.nodes - len(path)) for path in paths])
    counts_B = torch.tensor([len(path) for path in paths])
    return Accepted(path_BN, counts_B, draws_BN.gather(1, path_BN))


def accept_on_device(tree: Tree, draws_BN: Tensor) -> Accepted:
    """`accept` without asking the host."""
    if tree.nodes == 1:
        zeros_B1 = torch.zeros_like(draws_BN)
        return Accepted(zeros_B1, zeros_B1[:, 0] + 1, draws_BN)
    drawn_BN = draws_BN.gather(1, tree.parents_BN.clamp(min=0))  # what the parent drew
    missed_BN = (tree.tokens_BN != drawn_BN) | (tree.parents_BN < 0)
    missed_BN[:, 0] = False
    accepted_BN = ~(tree.ancestors_BNN & missed_BN[:, None]).any(-1)
    deepest_B1 = torch.where(accepted_BN, tree.depths_BN, -1).argmax(1, keepdim=True)
    index_B1N = deepest_B1[..., None].expand(-1, -1, tree.nodes)
    on_path_BN = tree.ancestors_BNN.gather(1, index_B1N)[:, 0]
    counts_B = on_path_BN.sum(1)
    # A parent precedes its child, so the path in index order is the path from the root down.
    order_BN = (~on_path_BN).to(torch.uint8).argsort(dim=1, stable=True)
    places_N = torch.arange(tree.nodes, device=order_BN.device)
    path_BN = order_BN.masked_fill(places_N >= counts_B[:, None], 0)
    return Accepted(path_BN, counts_B, draws_BN.gather(1, path_BN))
