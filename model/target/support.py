"""Which models can be targets.

Windows, recurrent layers and the computation of the logits follow from the configuration, not from
the family's name, and a probe at load compares the result with the model itself. Only sparse
attention goes by name: in 16 bits a probe cannot see what an indexer selects.
"""

from __future__ import annotations

import sys

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from headstart.model.backends.visibility import (
    CHUNKED,
    FULL,
    LINEAR,
    SLIDING,
    SPARSE,
    AttentionWindows,
)

from .gqa_attention import GROUPED, SDPA
from .sparse_attention import FAMILIES, indexers

MIXER = "linear_attn"  # attribute of a recurrent layer that holds its recurrent part
# transformers' functions with which models with windows build their masks.
WINDOW_MASKS = (
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
    "create_masks_for_generate",
)


def recurrent_mixers(
    layers: nn.ModuleList, config: PretrainedConfig, name: str
) -> dict[int, nn.Module]:
    """The recurrent part of each recurrent decoder layer, by the layer's index.

    ValueError for layers whose states are not known to fit cache/recurrent_state.py.
    """
    kinds = config.to_dict().get("layer_types") or ()
    known = enumerate(zip(kinds, layers, strict=False))  # some name the kinds of more layers
    recurrent = {index: layer for index, (kind, layer) in known if kind == LINEAR}
    if any(not hasattr(layer, MIXER) for layer in recurrent.values()):
        raise ValueError(_recurrent(name, config))
    return {index: getattr(layer, MIXER) for index, layer in recurrent.items()}


def check_supported(model: PreTrainedModel, name: str) -> None:
    """ValueError for models that are known not to work; `probe` finds the others."""
    config = model.config.get_text_config(decoder=True)
    check_config(config, name)
    if AttentionWindows.of(config).sparse and not indexers(model):
        raise ValueError(_unknown_choice(name, config))
    if model._is_stateful and LINEAR not in (config.to_dict().get("layer_types") or ()):
        raise ValueError(_recurrent(name, config))
    attention = config._attn_implementation
    if attention not in (SDPA, GROUPED, "eager"):
        raise ValueError(
            f"{name} was built with {attention} attention, which takes no tree mask. "
            'Build it with attn_implementation="sdpa" or "eager".'
        )


def check_config(config: PretrainedConfig, name: str) -> None:
    """ValueError for a configuration that is known not to work, before weights are loaded."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model ({config.model_type}). Tree decoding needs a "
            "decoder-only causal language model. Use another target."
        )
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        raise ValueError(
            f"{name} ({config.model_type}) applies its local windows by cache slot, and in a tree "
            "the branches share a range of slots. Use another target."
        )
    kinds = set(config.to_dict().get("layer_types") or ())
    if kinds & set(SPARSE) and config.model_type not in FAMILIES:
        raise ValueError(_unknown_choice(name, config))
    odd = kinds - {FULL, SLIDING, CHUNKED}
    if odd and kinds != {FULL, LINEAR} and not kinds <= set(SPARSE):
        raise ValueError(_recurrent(name, config, f", with layers of {', '.join(sorted(odd))}"))


def check_window_is_applied(decoder: nn.Module, config: PretrainedConfig, name: str) -> None:
    """ValueError where the configuration names a window that the model's code does not apply.

    The window can be longer than any sequence that is cheap to try, so the code is inspected: it
    must use transformers' masks with windows.
    """
    modules = [sys.modules.get(one.__module__) for one in type(decoder).__mro__]
    windowed = any(hasattr(module, mask) for module in modules for mask in WINDOW_MASKS)
    if AttentionWindows.of(config).kinds != (FULL,) and not windowed:
        raise ValueError(
            f"{name} ({config.model_type}) has an attention window in its configuration, but its "
            "code does not apply it in a known way. Use another target."
        )


def _recurrent(name: str, config: PretrainedConfig, layers: str = "") -> str:
    return (
        f"{name} ({config.model_type}{layers}) does not use softmax attention in every layer, and "
        "what it uses there is not known here (known: gated delta nets, as in Qwen3-Next; sparse "
        "attention in all layers, as in GLM-5). Use a target with softmax attention throughout."
    )


def _unknown_choice(name: str, config: PretrainedConfig) -> str:
    return (
        f"{name} ({config.model_type}) has sparse attention whose indexer is not known here "
        "(known: that of DeepSeek-V3.2 and GLM-5). Use another target."
    )
