"""Reads an exported folder as vLLM's `llama_eagle3` does, native or in the format speculators.

Written from vLLM's layout, not from what Headstart writes. What matters there:

- A folder with `speculators_config` is translated first: the keys of `transformer_layer_config`
  become the draft's own, and a missing `norm_before_residual` means true (else false).
- The target's layers come from the top-level `eagle_aux_hidden_state_layer_ids`: j is the hidden
  state that goes into layer j. `eagle_config` only sizes fc, beside `num_aux_hidden_states`.
- `midlayer.` is another name of `layers.0.`; `t2d` is left out; any other unknown name is an error.
- `d2t` holds offsets: draft id i is token i + d2t[i] of the target.
- Embedding and LM head are the target's if the folder has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from reference_draft import LINEARS, NORMS, ReferenceDraft, files
from torch import Tensor
from transformers import PreTrainedModel


def read(folder: Path, target: PreTrainedModel, rope: str = "nested") -> ReferenceDraft:
    """rope: "nested" as with transformers 5 (`rope_parameters`), "flat" as before."""
    config, tensors = files(folder)
    if "speculators_config" in config:
        config = translated(config)
    assert config["architectures"][0] in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["hidden_act"] == "silu"
    assert not config["attention_bias"] and not config["norm_before_fc"]  # or there were tensors
    assert config["vocab_size"] == target.config.vocab_size
    tensors.pop("t2d", None)
    embedding = tensors.pop("embed_tokens.weight", target.get_input_embeddings().weight)
    lm_head = tensors.pop("lm_head.weight", target.get_output_embeddings().weight)
    offsets = tensors.pop("d2t", None)
    weights, fc_norms = _layer(tensors)
    width = config.get("target_hidden_size") or config["hidden_size"]
    count = config.get("num_aux_hidden_states")
    if count is None:
        count = len(config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", "123"))
    layers = config["eagle_aux_hidden_state_layer_ids"]
    assert len(layers) == count, "the size of fc and the list of layers come from different keys"
    assert weights["fc"].shape == (config["hidden_size"], width * count)
    assert len(fc_norms) == (count if config.get("fc_norm") else 0)
    size = config["draft_vocab_size"] or config["vocab_size"]
    assert offsets is not None or size == config["vocab_size"]
    assert len(lm_head) == size and len(embedding) == config["vocab_size"]
    theta = config["rope_parameters"] if rope == "nested" else config
    assert theta.get("rope_type", "default") == "default" and not config.get("rope_scaling")
    return ReferenceDraft(
        target=target,
        layers=layers,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        theta=theta["rope_theta"],
        eps=config["rms_norm_eps"],
        weights=weights,
        fc_norms=fc_norms,
        embedding=embedding,
        lm_head=lm_head,
        ids=torch.arange(size) + (0 if offsets is None else offsets),
        feed_normed=config.get("norm_output", False),
        residual_normed=config.get("norm_before_residual", False),
    )


def translated(config: dict[str, Any]) -> dict[str, Any]:
    """The keys that vLLM derives from a configuration of speculators, after checking it."""
    assert config["speculators_model_type"] == "eagle3"
    section = config["speculators_config"]
    assert section["proposal_methods"][0]["speculative_tokens"] >= 1
    assert section["verifier"]["name_or_path"]
    layer = dict(config["transformer_layer_config"])
    assert layer["model_type"] in ("llama", "qwen3")
    layer["architectures"] = ["Eagle3LlamaForCausalLM"]
    layer["draft_vocab_size"] = config.get("draft_vocab_size")
    layer["norm_before_residual"] = config.get("norm_before_residual", True)
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        layer[key] = config.get(key, False)
    for key in ("target_hidden_size", "eagle_aux_hidden_state_layer_ids"):
        if config.get(key):
            layer[key] = config[key]
    return layer


def _layer(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Weights by their names in the layer, and the norms before fc."""
    left = {name.replace("midlayer.", "layers.0."): one for name, one in tensors.items()}
    weights = {name: left.pop(f"layers.0.{name}.weight") for name in (*LINEARS, *NORMS)}
    weights |= {name: left.pop(f"{name}.weight") for name in ("fc", "norm")}
    fc_norms = []
    while f"fc_norm.{len(fc_norms)}.weight" in left:
        fc_norms.append(left.pop(f"fc_norm.{len(fc_norms)}.weight"))
    assert not left, f"unknown to vLLM: {sorted(left)}"
    return weights, fc_norms
