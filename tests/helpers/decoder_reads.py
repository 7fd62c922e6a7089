"""Shared by tests: decoder reads."""

from __future__ import annotations

import torch
from families import prompts
from torch import Tensor

from headstart.model.target.target import Target
from headstart.model.tree.tree import Tree

LIKE_LLAMA = ["llama", "llama_tied", "mistral", "ministral", "qwen2", "qwen3", "seed_oss"]
OTHERS = ["gemma", "granite", "smollm3", "olmo2", "phi3", "cohere", "gpt2", "qwen3_moe", "glm4"]


def a_tree(roots_B: Tensor) -> Tree:
    parents_N = torch.tensor([-1, 0, 0, 1, 1, 2, 5], device=roots_B.device)
    tokens_BN = (roots_B[:, None] + 7 * torch.arange(7, device=roots_B.device)) % 50
    return Tree(tokens_BN, parents_N.expand(len(roots_B), -1), torch.zeros_like(tokens_BN).float())


def reads(target: Target, batch: int) -> list[Tensor]:
    """What is seen of a few texts, a tree behind them, and one more token each."""
    device = target.device
    ids_BT = torch.stack(prompts([9] * batch)).to(device)
    cache = target.new_cache(batch)
    seen = [target.forward(ids_BT, cache, taps=(0,))]
    cache.commit(None, torch.tensor([9, 4, 7][:batch], device=device))
    seen.append(target.forward(a_tree(ids_BT[:, 0]), cache, taps=(0,)))
    one_B = torch.ones(batch, dtype=torch.int64, device=device)
    cache.commit(0 * one_B[:, None], one_B)
    seen.append(target.forward(ids_BT[:, :1], cache, taps=(0,)))
    return [
        part for one in seen for part in (one.logits_BTV, one.hidden_states[0]) if part is not None
    ]
