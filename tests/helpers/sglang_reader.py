"""Reads an exported folder as SGLang's `LlamaForCausalLMEagle3` does.

Written from SGLang's layout, not from what Headstart writes. What matters there:

- The target's layers come from `eagle_config` alone: j is the output of layer j, which the engine
  catches on its way into layer j + 1.
- The layer is `midlayer`; an unknown name is skipped silently, and a weight that is not loaded
  stays random.
- The residual is the feature before its norm. Queries, keys and values have no bias.
- fc is applied only if the features are wider than an embedding.
- `tie_word_embeddings` makes the LM head the embedding; without `draft_vocab_size` it is the
  target's. `d2t` holds offsets, which become the hot tokens d2t[i] + i.
"""

from __future__ import annotations

from pathlib import Path

import torch
from reference_draft import LINEARS, NORMS, ReferenceDraft, files
from torch import Tensor
from transformers import PreTrainedModel


def read(folder: Path, target: PreTrainedModel, rope: str = "nested") -> ReferenceDraft:
    """rope: "nested" as with transformers 5 (`rope_parameters`), "flat" as before."""
    config, tensors = files(folder)
    assert "speculators_config" not in config, "SGLang does not support the format speculators"
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert config["hidden_act"] == "silu" and not config.get("bias", False)
    assert not config.get("norm_before_fc", False)
    eagle = config["eagle_config"]
    assert eagle["use_aux_hidden_state"] is True
    outputs = eagle["eagle_aux_hidden_state_layer_ids"]
    count = config.get("num_aux_hidden_states", 3)
    assert len(outputs) == count
    norms = count if config.get("fc_norm") or config.get("use_aux_norm") else 0
    weights, skipped = _loaded(tensors, norms)
    assert skipped <= {"t2d", "lm_head.weight", "d2t"}, f"skipped silently: {skipped}"
    width = config.get("target_hidden_size") or config["hidden_size"]
    assert weights["fc"].shape == (config["hidden_size"], width * count)
    embedding = target.get_input_embeddings().weight
    lm_head, size = tensors.get("lm_head.weight"), config["draft_vocab_size"]
    if config.get("tie_word_embeddings", False):
        lm_head = embedding
    elif size is None:
        lm_head, size = target.get_output_embeddings().weight, config["vocab_size"]
    assert lm_head is not None and len(lm_head) == size
    ids = torch.arange(size)
    if "d2t" in tensors:
        ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    assert len(ids) == size
    theta = config["rope_parameters"] if rope == "nested" else config
    assert theta.get("rope_type", "default") == "default" and not config.get("rope_scaling")
    return ReferenceDraft(
        target=target,
        layers=[layer + 1 for layer in outputs],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        theta=theta["rope_theta"],
        eps=config["rms_norm_eps"],
        weights=weights,
        fc_norms=[weights[f"fc_norm.{index}"] for index in range(norms)],
        embedding=embedding,
        lm_head=lm_head,
        ids=ids,
        feed_normed=config.get("norm_output", False),
        with_fc=width * count != embedding.shape[1],
    )


def _loaded(tensors: dict[str, Tensor], fc_norms: int) -> tuple[dict[str, Tensor], set[str]]:
    """Weights by their names in the layer, and the names of unknown tensors."""
    places = {f"midlayer.{name}.weight": name for name in (*LINEARS, *NORMS)}
    names = ("fc", "norm", *(f"fc_norm.{index}" for index in range(fc_norms)))
    places |= {f"{name}.weight": name for name in names}
    weights = {places[name]: one for name, one in tensors.items() if name in places}
    random = set(places.values()) - weights.keys()
    assert not random, f"never loaded: {random}"
    return weights, tensors.keys() - places.keys()
