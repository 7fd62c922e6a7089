"""Compare a target with the model's own forward pass when it is loaded.

Legend: B sequences, N tree nodes, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from headstart.model.tree.tree import Tree

from .sparse_attention import small_topk_for_probe
from .target import Target

PROBE = (5, 3, 7, 2, 6, 4, 1)  # token ids


def own_logits(target: Target) -> Tensor:
    """Logits 1 x T x V of the probe's tokens, computed by the model itself."""
    ids_1T = _probe_ids(target)
    with _errors_explained(target):
        mask = target.decoder.windows.whole_sequence_mask(ids_1T, target.dtype)
        output = target.model(input_ids=ids_1T, attention_mask=mask, use_cache=False)
        logits_1TV: Tensor = output.logits
        return logits_1TV


def probe(target: Target, expected_1TV: Tensor) -> None:
    """Compare a few tokens with the model's own forward pass. ValueError if they differ.

    Catches families that compute logits in a way of their own, or ignore the mask or the positions.
    expected_1TV: `own_logits`, from before anything of the model was replaced.
    """
    ids_1T = _probe_ids(target)
    with _errors_explained(target):
        prefill = target.forward(ids_1T)
        verified = (_verify_chains if target.recurrent else _verify_branches)(target, ids_1T)
    assert prefill.logits_BTV is not None
    if not _close(prefill.logits_BTV, expected_1TV):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) computes its logits in a way that is not "
            "known here (known: a linear LM head, then scaling, then a soft cap). Use a target of "
            "another family."
        )
    if not _close(verified, prefill.lm_head_input_BTD[:, 3:]):
        raise ValueError(
            f"{target.name} ({target.config.model_type}) computes a tree unlike the same sequence: "
            "its attention ignores the mask or the positions, or recurrent layers the state in "
            "front of several tokens. Use a target of another family."
        )


def _probe_ids(target: Target) -> Tensor:
    return torch.tensor([[token % target.vocab_size for token in PROBE]], device=target.device)


@contextmanager
def _errors_explained(target: Target) -> Iterator[None]:
    """Within it the target runs on the probe; ValueError where that fails."""
    try:
        with torch.no_grad(), small_topk_for_probe(target.layers, target.dtype):
            yield
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{target.name} ({target.config.model_type}) cannot be run with explicit positions, "
            f"mask and cache: {error} Use a target of another family."
        ) from error


def _verify_branches(target: Target, ids_1T: Tensor) -> Tensor:
    """The last four positions once more, as one branch of a tree whose other branch is noise."""
    cache = target.new_cache(1)
    target.forward(ids_1T[:, :3], cache, logits=False)
    counts_B = torch.tensor([3], device=target.device)
    cache.commit(torch.arange(3, device=target.device)[None], counts_B)
    root, one, two, three = ids_1T[0, 3:].tolist()
    tokens_BN = torch.tensor([[root, two, one, root, two]], device=target.device)
    parents_BN = torch.tensor([[-1, 0, 0, 1, 2]], device=target.device)
    tree = Tree(tokens_BN, parents_BN, torch.zeros(1, 5, device=target.device))
    first = target.forward(tree, cache, logits=False).lm_head_input_BTD[:, [0, 2, 4]]
    cache.commit(torch.tensor([[0, 2, 4]], device=target.device), counts_B)
    last_token = torch.tensor([[three]], device=target.device)
    return torch.cat([first, target.forward(last_token, cache, logits=False).lm_head_input_BTD], 1)


def _verify_chains(target: Target, ids_1T: Tensor) -> Tensor:
    """The last four positions once more: behind a rejected draft token, a chain that was accepted
    in part, and one that was accepted in full."""
    cache = target.new_cache(1)
    two, three, four, five, six = ids_1T[0, 2:].tolist()
    target.forward(ids_1T[:, :2], cache, logits=False)
    cache.commit(None, torch.tensor([2], device=target.device))
    states = []
    for chain, accepted in (([two, six], 1), ([three, four, three], 2), ([five, six], 2)):
        tokens_1N = torch.tensor([chain], device=target.device)
        parents_1N = torch.arange(len(chain), device=target.device)[None] - 1
        tree = Tree(tokens_1N, parents_1N, torch.zeros(1, len(chain), device=target.device))
        states.append(target.forward(tree, cache, logits=False).lm_head_input_BTD[:, :accepted])
        cache.commit(None, torch.tensor([accepted], device=target.device))
    return torch.cat(states, 1)[:, 1:]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding: in half precision rounding can be large, a wrong mask is larger."""
    if ours.shape != theirs.shape:
        return False
    tolerance = 1e-3 if ours.dtype in (torch.float32, torch.float64) else 0.2
    return float((ours.float() - theirs.float()).norm()) <= tolerance * float(theirs.float().norm())
