"""Compare a target with the model's own forward pass when it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headstart.model.tree.tree import Tree

from .sparse_attention import small_topk_for_probe

if TYPE_CHECKING:
    from .target import Target
from headstart.model.backends.visibility import AttentionWindows


def probe(target: Target) -> None:
    """Compare a few tokens with the model's own forward pass. ValueError if they differ.

    Catches families that compute logits in their own way, or ignore the mask or the positions.
    """
    ids = [5, 3, 7, 2, 6, 4, 1]
    text_1T = torch.tensor([[i % target.vocab_size for i in ids]], device=target.device)
    try:
        with torch.no_grad(), small_topk_for_probe(target.layers, target.dtype):
            mask = AttentionWindows.of(target.config).whole_sequence_mask(text_1T, target.dtype)
            whole = target.model(input_ids=text_1T, attention_mask=mask, use_cache=False)
            plain = target.forward(text_1T)
            branch = (_read_chains if target.recurrent else _read_branches)(target, text_1T)
            theirs = whole.logits
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{target.name} ({target.config.model_type}) cannot be read with own positions, mask "
            f"and cache: {error} Use a target of another family."
        ) from error
    assert plain.logits_BTV is not None
    if not _close(plain.logits_BTV, theirs):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) computes its logits in a way that is not "
            "known here (known: a linear LM head, then scaling, then a soft cap). Use a target of "
            "another family."
        )
    if not _close(branch, plain.lm_head_input_BTD[:, 3:]):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) reads a tree unlike the same text: its "
            "attention ignores the mask or the positions, or recurrent layers the state in front "
            "of several tokens. Use a target of another family."
        )


def _read_branches(target: Target, text_1T: Tensor) -> Tensor:
    """The last four positions again, read as one branch of a tree whose other branch is noise."""
    cache = target.new_cache(1)
    target.forward(text_1T[:, :3], cache, logits=False)
    counts_B = torch.tensor([3], device=target.device)
    cache.commit(torch.arange(3, device=target.device)[None], counts_B)
    root, one, two, three = text_1T[0, 3:].tolist()
    tokens_BN = torch.tensor([[root, two, one, root, two]], device=target.device)
    parents_BN = torch.tensor([[-1, 0, 0, 1, 2]], device=target.device)
    tree = Tree(tokens_BN, parents_BN, torch.zeros(1, 5, device=target.device))
    first = target.forward(tree, cache, logits=False).lm_head_input_BTD[:, [0, 2, 4]]
    cache.commit(torch.tensor([[0, 2, 4]], device=target.device), counts_B)
    last_token = torch.tensor([[three]], device=target.device)
    return torch.cat([first, target.forward(last_token, cache, logits=False).lm_head_input_BTD], 1)


def _read_chains(target: Target, text_1T: Tensor) -> Tensor:
    """The last four positions again, behind a rejected guess, a chain that was accepted in part,
    and one that was accepted in whole."""
    cache = target.new_cache(1)
    two, three, four, five, six = text_1T[0, 2:].tolist()
    target.forward(text_1T[:, :2], cache, logits=False)
    cache.commit(None, torch.tensor([2], device=target.device))
    seen = []
    for chain, accepted in (([two, six], 1), ([three, four, three], 2), ([five, six], 2)):
        tokens_1N = torch.tensor([chain], device=target.device)
        parents_1N = torch.arange(len(chain), device=target.device)[None] - 1
        tree = Tree(tokens_1N, parents_1N, torch.zeros(1, len(chain), device=target.device))
        seen.append(target.forward(tree, cache, logits=False).lm_head_input_BTD[:, :accepted])
        cache.commit(None, torch.tensor([accepted], device=target.device))
    return torch.cat(seen, 1)[:, 1:]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding: in half precision rounding can be large, a wrong mask is larger."""
    if ours.shape != theirs.shape:
        return False
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 0.2
    return float((ours.float() - theirs.float()).norm()) <= tolerance * float(theirs.float().norm())
