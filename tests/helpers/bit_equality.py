"""Whether a token's logits have the same bits in a tree and alone."""

from __future__ import annotations

import torch
from families import prompts

from headstart.model.target.target import Target
from headstart.model.tree.tree import Tree


def check_bits(target: Target, length: int, more: int) -> None:
    """Five tokens behind `length` others, as a path of a tree and one by one. more: leaves that the
    tree has besides; from some number of nodes on attention is computed otherwise."""
    text_T, cache = prompts([length + 5])[0], target.new_cache(1)
    target.forward(text_T[None, :length], cache, logits=False)
    cache.commit(None, torch.tensor([length]))
    path = [0, 2, 4, 6, 7]  # the others are noise
    tokens_BN = torch.cat([torch.arange(50, 58), torch.arange(more) % 90])[None]
    tokens_BN[0, path] = text_T[length:]
    parents_BN = torch.tensor([[-1, 0, 0, 1, 2, 3, 4, 6] + more * [0]])
    tree = Tree(tokens_BN, parents_BN, torch.zeros(1, 8 + more))
    logits_NV = target.forward(tree, cache).logits_BTV[0]
    for node, token in zip(path, text_T[length:], strict=True):
        alone_V = target.forward(token[None, None], cache).logits_BTV[0, 0]
        assert torch.equal(alone_V, logits_NV[node])
        cache.commit(None, torch.tensor([1]))
