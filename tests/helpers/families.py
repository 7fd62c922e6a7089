"""Tiny random models of many families, for tests of what must hold for all of them.

`FAMILIES[name]()` builds one (float32, seeded, without an end-of-text token). Windows are small,
so that short texts outgrow them. `prompts` draws text for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import headstart.model.target.pretrained  # noqa: F401  (knows MiMo)

VOCAB = 96
WINDOW = 8
SPREAD = 0.25  # of the random weights: wide enough that greedy decoding does not repeat one token

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
GROUPED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
# Gated delta nets beside softmax attention, as in Qwen3-Next.
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
}
# Sparse attention: few of the columns are chosen, even of a short text.
SPARSE = {"index_topk": 6, "index_n_heads": 8, "index_head_dim": 16}
SHARED_EXPERTS = EXPERTS | {"shared_expert_intermediate_size": 32}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
ORIGINAL = "original_max_position_embeddings"
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "factor": 8.0,
    ORIGINAL: 24,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "ministral": MIXED | {"head_dim": 8},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "qwen2": {},
    "mimo": {},
    "qwen2_windows": MIXED | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen2_moe": SHARED_EXPERTS,
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": MIXED | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "phi3_longrope": {
        "sliding_window": None,
        "rope_parameters": LONGROPE | {ORIGINAL: 48},
        ORIGINAL: 48,
    },
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": GROUPED | {"head_dim": 8},
    "glm4_moe_lite": GROUPED | MLA,
    "deepseek_v2": GROUPED | MLA | {"topk_method": "greedy"},
    "deepseek_v3": GROUPED | MLA,
    "deepseek_v32": GROUPED | MLA | SPARSE,
    "glm_moe_dsa": GROUPED
    | MLA
    | SPARSE
    | {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    "gpt2": GPT2,
    "gpt_neox": {},
    "gptj": GPT2 | {"rotary_dim": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "gpt_oss": MIXED | ROPE | {"num_local_experts": 4, "head_dim": 8},
    "smollm3": {"num_hidden_layers": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": MIXED | {"logit_scale": 0.5, "head_dim": 8},
    "starcoder2": {"sliding_window": WINDOW},
    "granite": {
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {"logits_scaling": 2.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "stablelm": {},
    "exaone4": MIXED,
    "nemotron": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ernie4_5": {},
    "seed_oss": {"head_dim": 8},
    "apertus": ROPE,
    "arcee": {},
    "helium": {"head_dim": 8},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "head_dim": 8,
    },
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "biogpt": {},
    "codegen": GPT2 | {"rotary_dim": 4},
    "gpt_bigcode": GPT2,
    "persimmon": {},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "dots1": GROUPED | {"head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_layer_start_index": 0,
    },
}
MODEL_TYPES = {"llama_tied": "llama", "qwen2_windows": "qwen2", "phi3_longrope": "phi3"}
# Where seed 0 (and those in between) gives a model that repeats itself.
SEEDS = {
    "qwen2": 1,
    "qwen2_windows": 1,
    "glm": 1,
    "deepseek_v2": 1,
    "glm_moe_dsa": 1,
    "gptj": 1,
    "falcon": 1,
    "exaone4": 2,
    "nemotron": 1,
    "seed_oss": 1,
    "apertus": 1,
    "persimmon": 3,
}


def build(model_type: str, settings: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """A random model of a family: the common small sizes, changed by `settings`."""
    config = AutoConfig.for_model(model_type, **(BASE | settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, SPREAD)
                else:  # norms and biases: away from 1 and 0, so that they are seen to be used
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def prompts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    """One random text per length, as 1-D token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts as B x T ids padded on the right, and their lengths."""
    lengths_B = torch.tensor([len(text) for text in texts])
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths_B


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    name: partial(build, MODEL_TYPES.get(name, name), settings, SEEDS.get(name, 0))
    for name, settings in SETTINGS.items()
}
