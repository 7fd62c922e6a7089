"""What stock engines want to find in a head's folder: configuration keys and tensor names.

vLLM, SGLang and llama.cpp's converter read `eagle3` heads; transformers reads `mtp` ones. A kind
without an entry here keeps its own names and has no engine keys.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from headstart.model.heads import eagle3, mtp
from headstart.model.heads.common.base import DraftHead
from headstart.model.heads.common.layers import LayerConfig

LM_HEAD = "lm_head.weight"
USUAL_STEPS = 3  # guesses per pass where nothing says how far the head was trained

Engine = Literal["vllm", "sglang", "llama.cpp"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")  # those that read a fused folder as it is


def engine_keys(head: DraftHead, target: PretrainedConfig) -> dict[str, Any]:
    """Top-level keys of the head's config.json; none when no engine would draft as we do."""
    if unservable(head):
        return {}
    if isinstance(head, eagle3.Head):
        return _eagle3_keys(head, target)
    assert isinstance(head, mtp.Head)
    return {"num_nextn_predict_layers": 1, "num_mtp_layers": 1}


def unservable(head: DraftHead) -> str | None:
    """Why stock engines cannot draft with this head, or None when they can."""
    if getattr(head, "window", None) is not None:
        return "they let a head see the whole text, and this one has a window"
    if isinstance(head, mtp.Head):
        return None  # one step is served, which all attention layouts have in common
    if not isinstance(head, eagle3.Head):
        return f"they do not read heads of kind {head.kind}"
    if head.attention_layout != "append":
        return f"they draft in the attention layout append, not in {head.attention_layout}"
    if len(head.taps) == 1:
        return "SGLang leaves out fc where a single layer is read"
    assert isinstance(head.config, eagle3.Config)
    if head.config.layer.qk_norm:
        return "their EAGLE-3 layer has no norm on queries and keys"
    if head.config.layer.attention_bias:
        return "SGLang's EAGLE-3 layer has no bias on queries, keys and values"
    return None


def undraftable(head: DraftHead) -> str | None:
    """Why vLLM and SGLang cannot draft with this head, or None when they can."""
    reason = unservable(head)
    if reason is None and not isinstance(head, eagle3.Head):
        return f"they draft with heads of kind eagle3, not with one of kind {head.kind}"
    return reason


def inconvertible(head: DraftHead) -> str | None:
    """Why llama.cpp cannot draft with this head, or None when it can."""
    reason = undraftable(head)
    if reason is not None:
        return reason
    assert isinstance(head, eagle3.Head)
    if len(head.taps) != 3:
        return f"it reads three layers of the target, and this head reads {len(head.taps)}"
    if len(head.fc_norm) > 0 or head.norm_output:
        return (
            "it does not know the norms of EAGLE-3.1 (train with head.fc_norm=false and "
            "head.norm_output=false)"
        )
    return None


def launch_line(engine: Engine, target: str, draft: str, steps: int | None) -> str:
    """How an engine is started that drafts a chain with a head.

    target, draft: their folders, for llama.cpp their files. steps: how many steps ahead the head
    was trained for.
    """
    steps = steps or USUAL_STEPS
    if engine == "llama.cpp":
        drafting = ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(steps)]
        return shlex.join(["llama-server", "-m", target, "-md", draft, *drafting])
    if engine == "vllm":
        return _vllm_line(target, method="eagle3", model=draft, num_speculative_tokens=steps)
    options = {
        "model-path": target,
        "speculative-algorithm": "EAGLE3",
        "speculative-draft-model-path": draft,
        "speculative-num-steps": steps,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": steps + 1,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "sglang.launch_server", *given])


def native_line(folder: str, steps: int | None) -> str:
    """How vLLM is started that drafts with the multi-token prediction layer of the target's own."""
    return _vllm_line(folder, method="mtp", num_speculative_tokens=steps or 1)


def _vllm_line(target: str, **config: str | int) -> str:
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(config)])


def tensor_name(head: DraftHead, ours: str) -> str:
    """The name in the file of a tensor of the head's state dict. GLM's names for kind mtp."""
    if not isinstance(head, mtp.Head) or ours == "d2t":
        return ours
    prefix = f"model.layers.{head.target.num_layers}."
    if ours.startswith("layer."):
        return prefix + ours.removeprefix("layer.").removeprefix("block.")
    return prefix + ("shared_head." + ours if ours.startswith("norm.") else ours)


def lm_head_rows(head: DraftHead, dtype: torch.dtype) -> Tensor | None:
    """The target's LM head for the draft vocabulary, where engines want it in the head's file."""
    ids = head.draft_ids
    if ids is None or unservable(head) or not isinstance(head, eagle3.Head):
        return None
    weight_VD = head.target.model.get_output_embeddings().weight
    return weight_VD[ids].to(dtype).cpu().contiguous()


def _eagle3_keys(head: eagle3.Head, target: PretrainedConfig) -> dict[str, Any]:
    """One folder for all: vLLM and llama.cpp count the layer whose input is tapped, SGLang the one
    whose output is; each reads its own key."""
    config = head.config
    assert isinstance(config, eagle3.Config)
    layer: LayerConfig = config.layer
    taps = list(head.taps)
    inputs = [tap + 1 for tap in taps]
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
        "num_aux_hidden_states": len(taps),
        "eagle_aux_hidden_state_layer_ids": inputs,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": taps},
    }
