"""Which path of a draft tree is accepted. The output is exact because of what is decided here.

Legend: B sequences, N tree nodes, P positions of a path, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.model.tree.tree import Tree


@dataclass(frozen=True)
class Accepted:
    """The accepted path of every tree, and the tokens that it emits.

    accepted_path_BP: nodes from the root down; the first num_accepted_B[b] >= 1 are real, the rest
        is 0.
    num_accepted_B: nodes on the path, the root included; as many tokens are emitted.
    sampled_tokens_BP: the token sampled at each node of the path, which is what follows it in the
        output: position i holds the token of node path[i + 1], and the last real position the
        bonus token, which no node had drafted.
    """

    accepted_path_BP: Tensor
    num_accepted_B: Tensor
    sampled_tokens_BP: Tensor

    def padded(self, length: int) -> Accepted:
        """The same with P cut or padded to `length`, at least the greatest num_accepted_B."""
        if length == self.accepted_path_BP.shape[1]:
            return self
        more = (0, max(0, length - self.accepted_path_BP.shape[1]))
        path_BP = pad(self.accepted_path_BP[:, :length], more)
        return Accepted(path_BP, self.num_accepted_B, pad(self.sampled_tokens_BP[:, :length], more))


def accept(tree: Tree, sampled_BN: Tensor) -> Accepted:
    """Walk from the root to the child that equals the sampled token, as far as it goes.

    sampled_BN: for each node one token sampled from the target's distribution after it
        (`Sampler.sample_tree`; greedy decoding takes the argmax), -1 where the walk cannot come by.

    P is N. The token emitted after a node is always the target's own sample there, whatever the
    tree holds: a tree can be bad, never wrong. A child is accepted with the target's probability of
    it, which no lossless rule can beat for a tree that was fixed without looking at the samples.
    Nodes of one depth share their noise, because only one of them is ever on the path; so the
    tokens equal those of autoregressive decoding with the same noise.

    Drafts that are themselves sampled (not the likeliest tokens but samples from the draft's
    distribution q) could be accepted more often than this. That needs q of each parent (N x V,
    after the same temperature and top-p as the target, both from an fp32 softmax), uniform noise
    per node, children drawn without replacement, and rejection: accept child c with probability
    min(1, p(c) / q(c)), else p <- norm(max(p - q, 0)), q(c) <- 0, q <- norm(q), and try its next
    sibling (SpecInfer, arXiv 2305.09781). How many nodes are verified must then not depend on
    their values.
    """
    if sampled_BN.is_cpu:
        return accept_on_host(tree, sampled_BN)
    return accept_on_device(tree, sampled_BN)


def accept_on_host(tree: Tree, sampled_BN: Tensor) -> Accepted:
    """`accept` by a walk in Python: on a CPU it takes a tenth of the time of small operations."""
    paths: list[list[int]] = []
    rows = zip(tree.tokens_BN.tolist(), tree.parents_BN.tolist(), sampled_BN.tolist(), strict=True)
    for tokens, parents, sampled in rows:
        path = [0]
        for node in range(1, len(tokens)):  # a parent precedes its child
            if parents[node] == path[-1] and tokens[node] == sampled[path[-1]]:
                path.append(node)
        paths.append(path)
    path_BN = torch.tensor([path + [0] * (tree.nodes - len(path)) for path in paths])
    num_accepted_B = torch.tensor([len(path) for path in paths])
    return Accepted(path_BN, num_accepted_B, sampled_BN.gather(1, path_BN))


def accept_on_device(tree: Tree, sampled_BN: Tensor) -> Accepted:
    """`accept` without a synchronisation with the host."""
    if tree.nodes == 1:
        zeros_B1 = torch.zeros_like(sampled_BN)
        return Accepted(zeros_B1, zeros_B1[:, 0] + 1, sampled_BN)
    expected_BN = sampled_BN.gather(1, tree.parents_BN.clamp(min=0))  # sampled at the parent
    rejected_BN = (tree.tokens_BN != expected_BN) | (tree.parents_BN < 0)
    rejected_BN[:, 0] = False
    accepted_BN = ~(tree.ancestors_BNN & rejected_BN[:, None]).any(-1)
    deepest_B1 = torch.where(accepted_BN, tree.depths_BN, -1).argmax(1, keepdim=True)
    index_B1N = deepest_B1[..., None].expand(-1, -1, tree.nodes)
    on_path_BN = tree.ancestors_BNN.gather(1, index_B1N)[:, 0]
    num_accepted_B = on_path_BN.sum(1)
    # A parent precedes its child, so the path in index order is the path from the root down.
    order_BN = (~on_path_BN).to(torch.uint8).argsort(dim=1, stable=True)
    positions_N = torch.arange(tree.nodes, device=order_BN.device)
    path_BN = order_BN.masked_fill(positions_N >= num_accepted_B[:, None], 0)
    return Accepted(path_BN, num_accepted_B, sampled_BN.gather(1, path_BN))
