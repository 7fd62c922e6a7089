"""What a fresh head takes over from its target: sizes, and starting weights where they fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.model.target.sharding import full_tensor
from headstart.model.target.weight_only import dequantized

if TYPE_CHECKING:
    from headstart.model.target.target import Target


def layer_sizes(target: Target) -> dict[str, Any]:
    """Sizes for a head's decoder layer, like those of the target's own layers."""
    config = target.config.to_dict()
    hidden = target.hidden_size
    heads = int(target.config.num_attention_heads)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)  # some families have one entry per kind of layer
    last = target.layers[-1]
    names = dict(last.named_parameters())
    head_dim = config.get("head_dim") or hidden // heads
    return {
        "hidden_size": hidden,
        "intermediate_size": config.get("intermediate_size") or 4 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim + head_dim % 2,
        "rms_norm_eps": config.get("rms_norm_eps") or 1e-5,
        "rope_theta": float(rope.get("rope_theta") or 10000.0),
        "attention_bias": "self_attn.q_proj.bias" in names,
        "qk_norm": "self_attn.q_norm.weight" in names,
    }


@torch.no_grad()
def copy_last_layer(target: Target, layer: nn.Module) -> bool:
    """Fill a layer with the target's last one; False when names or shapes differ."""
    return copy_layer(target, -1, layer)


@torch.no_grad()
def copy_layer(target: Target, index: int, layer: nn.Module) -> bool:
    """Fill a layer with one of the target's; False when names or shapes differ."""
    theirs = target.layers[index].state_dict(keep_vars=True)
    ours = layer.state_dict(keep_vars=True)
    if ours.keys() != theirs.keys() or any(ours[n].shape != theirs[n].shape for n in ours):
        return False
    for name, tensor in ours.items():
        tensor.copy_(dequantized(full_tensor(theirs[name])))
    return True


@torch.no_grad()
def copy_final_norm(target: Target, weight_D: Tensor) -> None:
    """Fill a norm's weight with the scale that the target's final norm applies.

    The scale is measured, not read: families store it as w, as 1 + w, or beside a bias. An input
    with mean 0 and root mean square 1 comes out of each of them as scale * input + bias.
    """
    norm = _final_norm(target)
    if norm is None:
        return
    signs_D = torch.ones(target.hidden_size, device=target.device, dtype=target.dtype)
    signs_D[1::2] = -1
    scale_D = (norm(signs_D[None, None]) - norm(-signs_D[None, None]))[0, 0] * signs_D / 2
    weight_D.copy_(scale_D)


def _final_norm(target: Target) -> nn.Module | None:
    """The last norm of the stack that holds the decoder layers."""
    found: nn.Module | None = None
    for module in target.model.modules():
        children = list(module.children())
        if any(child is target.layers for child in children):
            for child in children:
                weight = dict(child.named_parameters(recurse=False)).get("weight")
                if weight is not None and weight.shape == (target.hidden_size,):
                    found = child
    return found
