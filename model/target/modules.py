"""The parts of a transformers model that a target uses."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

if TYPE_CHECKING:
    pass


def context_limit(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None where its configuration names no limit.

    With longrope (Phi) that is the length it was first trained for. Past it, transformers turns all
    positions of a read by other angles, while the keys in the cache keep the old ones. What a token
    then sees depends on which read it came in: a tree would switch sooner than single tokens do.
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
    """What the model calls its cache: `cache` since transformers 5.24, `past_key_values` before."""
    known = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def decoder_layers(decoder: nn.Module, config: PretrainedConfig, name: str) -> nn.ModuleList:
    """The list of decoder layers: the outermost list as long as the configuration says."""
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise ValueError(
        f"{name} has no list of {config.num_hidden_layers} decoder layers, so their outputs cannot "
        "be read. Use another target."
    )
