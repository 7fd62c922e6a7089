"""The parts of a transformers model that a target uses."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def context_limit(config: PretrainedConfig) -> int | None:
    """Maximum number of tokens of a sequence; None where the configuration names no limit.

    With longrope (Phi) that is the length it was first trained for. Past it, transformers rotates
    all positions of a forward pass by other angles, while the keys in the cache keep the old ones.
    The result would depend on which tokens were computed together.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None)  # ALiBi has none
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [
        rope,
        *(one for one in rope.values() if isinstance(one, dict)),
    ]
    first = [
        one["original_max_position_embeddings"]
        for one in kinds
        if one.get("rope_type") == "longrope"
    ]
    return min(first if limit is None else [limit, *first], default=None)


def output_head(model: PreTrainedModel, name: str) -> nn.Linear:
    """The LM head. ValueError where it is not one linear layer."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{name} ({type(model).__name__}) has no plain linear LM head (found {type(head)}), so "
            "draft heads cannot share it. Use a causal language model with an LM head."
        )
    return head


def inner_model(model: PreTrainedModel) -> nn.Module:
    """The model below the LM head: token ids in, the LM head's input out."""
    decoder: nn.Module = model.get_decoder()
    if decoder is not model:
        return decoder
    # a few families name their prefix wrongly, and nothing is found under it
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def cache_kwarg(decoder: nn.Module) -> str:
    """Argument name of the model's cache: `cache` from transformers 5.24 on, before that
    `past_key_values`."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def decoder_layers(decoder: nn.Module, config: PretrainedConfig, name: str) -> nn.ModuleList:
    """The decoder layers: the outermost list of the length in the configuration."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ValueError(
        f"{name} has no list of {config.num_hidden_layers} decoder layers, so their outputs cannot "
        "be tapped. Use another target."
    )
