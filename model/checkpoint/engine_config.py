"""Configuration keys and tensor names that inference engines expect in a head's folder.

vLLM, SGLang and llama.cpp's converter read heads of kind `eagle3`, transformers those of kind
`mtp`. Other kinds have no engine keys and keep the tensor names of their own state dict.

Legend: V draft vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from headstart.model.heads import eagle3, mtp
from headstart.model.heads.common.base import DraftHead
from headstart.model.heads.common.layers import LayerConfig

from .engine_support import support


def engine_keys(head: DraftHead, target: PretrainedConfig) -> dict[str, Any]:
    """Return the top-level keys of the head's config.json; none if no engine supports the head."""
    if isinstance(head, eagle3.Head) and support(head, "vllm") is None:
        return _eagle3_keys(head, target)
    if isinstance(head, mtp.Head) and support(head, "native_mtp") is None:
        return {"num_nextn_predict_layers": 1, "num_mtp_layers": 1}
    return {}


def tensor_name(head: DraftHead, name: str) -> str:
    """Return the name in the weights file of an entry of the state dict. Kind mtp: GLM's names."""
    if not isinstance(head, mtp.Head) or name == "d2t":
        return name
    prefix = f"model.layers.{head.target.num_layers}."
    if name.startswith("layer."):
        return prefix + name.removeprefix("layer.").removeprefix("block.")
    return prefix + ("shared_head." + name if name.startswith("norm.") else name)


def lm_head_rows(head: DraftHead, dtype: torch.dtype) -> Tensor | None:
    """Return the rows V x D of the target's LM head for a pruned draft vocabulary.

    None if the head drafts from the whole vocabulary, or if no engine supports it.
    """
    ids = head.draft_ids
    if ids is None or support(head, "vllm") is not None:
        return None
    weight_VD = head.target.model.get_output_embeddings().weight
    return weight_VD[ids].to(dtype).cpu().contiguous()


def _eagle3_keys(head: eagle3.Head, target: PretrainedConfig) -> dict[str, Any]:
    """One folder serves all engines, which count the tapped layers in two ways: vLLM and llama.cpp
    by the layer whose input is read, SGLang by the layer whose output is. Each has its own key."""
    config = head.config
    assert isinstance(config, eagle3.Config)
    layer: LayerConfig = config.layer
    outputs = list(head.taps)
    inputs = [tap + 1 for tap in outputs]
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": layer.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": layer.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": layer.rms_norm_eps,
        "hidden_act": "silu",
        "attention_bias": layer.attention_bias,
        "mlp_bias": False,
        "bias": False,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab,
        "max_position_embeddings": target.max_position_embeddings,
        "rope_theta": layer.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": layer.rope_theta},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "num_aux_hidden_states": len(outputs),
        "eagle_aux_hidden_state_layer_ids": inputs,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": outputs,
        },
    }
