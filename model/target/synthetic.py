"""Targets with random weights, of the shape of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from .modules import decoder_layers, inner_model
from .pretrained import dtype_of


def of_shape(config: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """A model with random weights, of the shape in a config.json, for timing."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        shape = AutoConfig.from_pretrained(config)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"{config} does not describe a language model: {error} Give the config.json of a model "
            "folder."
        ) from error
    with place:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape, dtype=dtype_of(dtype, place)
        )
    return model


def one_layer(
    model_type: str, settings: Mapping[str, Any], attention: str
) -> tuple[nn.Module, nn.Module]:
    """The first decoder layer of a family and its rotary embedding, with initial weights.

    settings: of the family's configuration.
    attention: the attention function that it calls, by its name in transformers.
    """
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    decoder = inner_model(model)
    layer_type: Any = type(decoder_layers(decoder, config, model_type)[0])
    rotary_type: Any = type(decoder.rotary_emb)
    config._attn_implementation = attention
    return layer_type(config, 0), rotary_type(config=config)


def random_model(settings: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A small float32 model with random weights, for trials.

    settings: `model_type` and fields of that type's configuration (hidden_size, ...).
    """
    sizes = dict(settings)
    kind = sizes.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"A random target needs a model_type that transformers knows, got {kind!r}. "
            "For example: {model_type: llama, hidden_size: 64, num_hidden_layers: 2}."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
