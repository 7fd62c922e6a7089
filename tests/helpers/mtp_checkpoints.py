"""Tiny random checkpoints with a native MTP layer, under the tensor names of each family.

`write(name, folder)` writes one; `Reference` computes its layer from the published formula, with
plain tensor operations.

Legend: T positions, D hidden size, H query heads, G key/value heads, C head_dim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import DELTA, GROUPED, MLA, SHARED_EXPERTS, SPARSE, build
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, LAYERS = 32, 2
DENSE = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate_proj.weight": (64, HIDDEN),
    "mlp.up_proj.weight": (64, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, 64),
}
GQA = {
    "self_attn.q_proj.weight": (32, HIDDEN),
    "self_attn.k_proj.weight": (16, HIDDEN),
    "self_attn.v_proj.weight": (16, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, 32),
}
BIASES = {f"self_attn.{one}_proj.bias": (size,) for one, size in (("q", 32), ("k", 16), ("v", 16))}
LATENT = {
    "self_attn.q_a_proj.weight": (16, HIDDEN),
    "self_attn.q_a_layernorm.weight": (16,),
    "self_attn.q_b_proj.weight": (64, 16),
    "self_attn.kv_a_proj_with_mqa.weight": (24, HIDDEN),
    "self_attn.kv_a_layernorm.weight": (16,),
    "self_attn.kv_b_proj.weight": (80, 16),
    "self_attn.o_proj.weight": (HIDDEN, 48),
}
# 8 heads with head_dim 16; not used in drafting
INDEXER = {
    "self_attn.indexer.wq_b.weight": (128, 16),
    "self_attn.indexer.wk.weight": (16, HIDDEN),
    "self_attn.indexer.k_norm.weight": (16,),
    "self_attn.indexer.k_norm.bias": (16,),
    "self_attn.indexer.weights_proj.weight": (8, HIDDEN),
}
MIXTURE = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.gate.weight": (4, HIDDEN),
    "mlp.gate.e_score_correction_bias": (4,),
    **{
        f"mlp.{part}.{kind}_proj.weight": (HIDDEN, 32) if kind == "down" else (32, HIDDEN)
        for part in (*(f"experts.{number}" for number in range(4)), "shared_experts")
        for kind in ("gate", "up", "down")
    },
}
GLM_PARTS = {
    "enorm.weight": (HIDDEN,),
    "hnorm.weight": (HIDDEN,),
    "eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    "shared_head.norm.weight": (HIDDEN,),
}
MIMO_PARTS = {
    "token_layernorm.weight": (HIDDEN,),
    "hidden_layernorm.weight": (HIDDEN,),
    "input_proj.weight": (HIDDEN, 2 * HIDDEN),
    "final_layernorm.weight": (HIDDEN,),
}
QWEN_PARTS = {
    "pre_fc_norm_embedding.weight": (HIDDEN,),
    "pre_fc_norm_hidden.weight": (HIDDEN,),
    "fc.weight": (HIDDEN, 2 * HIDDEN),
    "norm.weight": (HIDDEN,),
}
HEAD_NORMS = {"self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,)}
# Queries and an output gate, head by head.
GATED = GQA | HEAD_NORMS | {"self_attn.q_proj.weight": (64, HIDDEN)}
SHARED_MIXTURE = {name: shape for name, shape in MIXTURE.items() if "e_score" not in name}
SHARED_MIXTURE = {
    name.replace("shared_experts", "shared_expert"): shape for name, shape in SHARED_MIXTURE.items()
} | {"mlp.shared_expert_gate.weight": (1, HIDDEN)}
# Together, as the code of Qwen3.5 holds them
FUSED_MIXTURE = {n: shape for n, shape in SHARED_MIXTURE.items() if "experts." not in n} | {
    "mlp.experts.gate_up_proj": (4, 64, HIDDEN),
    "mlp.experts.down_proj": (4, HIDDEN, 32),
}


@dataclass(frozen=True)
class Family:
    """A family of targets and its MTP layer.

    tensors: shapes by name without the prefix.
    copies: the layer comes with copies of the embedding and the LM head.
    more: further keys of config.json.
    zero_centred: norms scale by 1 + weight.
    """

    model_type: str
    settings: dict[str, Any]
    prefix: str
    tensors: dict[str, tuple[int, ...]]
    copies: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    zero_centred: bool = False


def in_first_layer(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"layers.0.{name}": shape for name, shape in tensors.items()}


GLM = f"model.layers.{LAYERS}."
FAMILIES = {
    "mimo": Family(
        "mimo",
        {"num_nextn_predict_layers": 1, "rope_parameters": {"rope_theta": 640000.0}},
        "model.mtp_layers.0.",
        MIMO_PARTS | DENSE | GQA | BIASES,
        # Code of its own, which is not there: it must not be asked for.
        more={"auto_map": {"AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}},
    ),
    # GLM's names on a Llama, as `fuse --index` writes them
    "llama": Family("llama", {}, GLM, GLM_PARTS | DENSE | GQA),
    "glm4_moe": Family(
        "glm4_moe",
        GROUPED | {"head_dim": 8, "use_qk_norm": True, "attention_bias": True},
        GLM,
        GLM_PARTS
        | MIXTURE
        | GQA
        | BIASES
        | {"self_attn.q_norm.weight": (8,), "self_attn.k_norm.weight": (8,)},
        copies=True,
    ),
    **{
        name: Family(name, GROUPED | MLA, GLM, GLM_PARTS | MIXTURE | LATENT, copies=True)
        for name in ("glm4_moe_lite", "deepseek_v3")
    },
    **{
        name: Family(name, GROUPED | MLA | SPARSE, GLM, GLM_PARTS | MIXTURE | LATENT | INDEXER)
        for name in ("deepseek_v32", "glm_moe_dsa")
    },
    "qwen3_next": Family(
        "qwen3_next",
        DELTA | SHARED_EXPERTS,
        "mtp.",
        QWEN_PARTS | in_first_layer(SHARED_MIXTURE | GATED),
        zero_centred=True,
    ),
    "qwen3_5_text": Family(
        "qwen3_5_text", DELTA, "mtp.", QWEN_PARTS | in_first_layer(DENSE | GATED), zero_centred=True
    ),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text",
        DELTA | SHARED_EXPERTS,
        "mtp.",
        QWEN_PARTS | in_first_layer(FUSED_MIXTURE | GATED),
        zero_centred=True,
    ),
}
RECURRENT = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def write(name: str, folder: Path, *, seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    """Write a bfloat16 checkpoint in two files with an index, routers and indexers in float32.

    Returns the layer's tensors by name without the prefix.
    """
    family = FAMILIES[name]
    model = build(family.model_type, family.settings | settings).bfloat16()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | family.more, indent=2))
    stored = load_file(folder / "model.safetensors")
    prefix = family.prefix.replace(f".{LAYERS}.", f".{model.config.num_hidden_layers}.")
    layer = random_layer(family, seed)
    if family.copies:
        layer["embed_tokens.weight"] = stored["model.embed_tokens.weight"].clone()
        layer["shared_head.head.weight"] = stored["lm_head.weight"].clone()
    ours = {prefix + name: tensor for name, tensor in layer.items()}
    # The second file holds a tensor of the target too, as published shards do.
    last = "model.norm.weight"
    second = {last: stored.pop(last)} | ours
    (folder / "model.safetensors").unlink()
    shards = {
        "model-00001-of-00002.safetensors": stored,
        "model-00002-of-00002.safetensors": second,
    }
    index: dict[str, str] = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)
    return layer


def random_layer(family: Family, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    layer: dict[str, Tensor] = {}
    for name, shape in family.tensors.items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            layer[name] = ((0 if family.zero_centred else 1) + 0.2 * values).bfloat16()
        elif "e_score" in name or "weights_proj" in name:
            layer[name] = 0.05 * values  # float32
        else:
            layer[name] = ((0.1 if len(shape) == 1 else 0.25) * values).bfloat16()
    return layer


@dataclass(frozen=True)
class Formula:
    """The published formula of a family's layer, for `Reference`."""

    names: tuple[str, str, str, str]  # embedding's norm, hidden state's norm, projection, last norm
    hidden_first: bool
    theta: float
    eps: float
    rotary: int  # rotated dimensions of a head
    top: int = 0  # experts per token
    scale: float = 1.0  # of the experts' output
    qwen: bool = False  # zero-centred norms, output gate, softmax over all experts, shared expert


NAMES = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
MIMO = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
QWEN = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
FORMULAS = {
    "glm4_moe_lite": Formula(NAMES, False, 10000.0, 1e-5, 8, 2, 1.8),
    "mimo": Formula(MIMO, True, 640000.0, 1e-6, 8),
    "llama": Formula(NAMES, False, 10000.0, 1e-6, 8),
    "glm4_moe": Formula(NAMES, False, 10000.0, 1e-5, 4, 2),
    "deepseek_v3": Formula(NAMES, False, 10000.0, 1e-6, 8, 2, 2.5),
    "deepseek_v32": Formula(NAMES, False, 10000.0, 1e-6, 8, 2, 2.5),
    "glm_moe_dsa": Formula(NAMES, False, 10000.0, 1e-5, 8, 2, 2.5),
    "qwen3_next": Formula(QWEN, False, 10000.0, 1e-6, 4, 2, qwen=True),
    "qwen3_5_text": Formula(QWEN, False, 10000.0, 1e-6, 4, qwen=True),
    "qwen3_5_moe_text": Formula(QWEN, False, 10000.0, 1e-6, 4, 2, qwen=True),
}


def rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


class Reference:
    """The draft steps over one sequence by the published formula, in float64.

    Pair p joins the token x[p+1] with a hidden state at p; every step writes its own keys, and step
    k at pair p sees those of step 0 up to p and its own chain.
    """

    def __init__(self, name: str, layer: dict[str, Tensor], heads: int = 4):
        self.formula, self.heads, self.name = FORMULAS[name], heads, name
        self.layer = {
            key.removeprefix("layers.0."): value.double()
            + (1 if self.formula.qwen and "norm" in key else 0)
            for key, value in layer.items()
        }

    def steps(self, embedded_TD: list[Tensor], hidden_TD: Tensor) -> list[Tensor]:
        """Normed outputs of each step. embedded_TD: of each step. hidden_TD: of the target."""
        outputs: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for step, embedded in enumerate(embedded_TD):
            hidden_TD = self._step(embedded, hidden_TD, step, keys, values)
            outputs.append(hidden_TD)
        return outputs

    def _step(
        self, embedded: Tensor, hidden: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        enorm, hnorm, proj, norm = (self.layer[f"{one}.weight"] for one in self.formula.names)
        eps = self.formula.eps
        both = [rms(embedded, enorm, eps), rms(hidden, hnorm, eps)]
        joined = torch.cat(both[::-1] if self.formula.hidden_first else both, -1)
        state = joined @ proj.T
        normed = rms(state, self.layer["input_layernorm.weight"], eps)
        state = state + self._attention(normed, step, keys, values)
        normed = rms(state, self.layer["post_attention_layernorm.weight"], eps)
        experts = self._softmax_experts if self.formula.qwen else self._experts
        mixed = experts(normed) if self.formula.top else self._mlp(normed, "mlp.")
        return rms(state + mixed, norm, eps)

    def _linear(self, states: Tensor, name: str) -> Tensor:
        bias = self.layer.get(f"self_attn.{name}.bias")
        product = states @ self.layer[f"self_attn.{name}.weight"].T
        return product if bias is None else product + bias

    def _attention(
        self, normed: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        length = len(normed)
        positions = torch.arange(length) + step
        project = self._latent if "self_attn.kv_b_proj.weight" in self.layer else self._grouped
        query, key, value = project(normed, positions)  # T x H x C each
        keys.append(key)
        values.append(value)
        out = torch.zeros(length, self.heads, value.shape[-1], dtype=torch.float64)
        for place in range(length):
            pairs = [(keys[0][: place + 1], values[0][: place + 1])]
            pairs += [
                (own[place : place + 1], held[place : place + 1])
                for own, held in zip(keys[1:], values[1:], strict=True)
            ]
            every = torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])
            scores = torch.einsum("hc,shc->hs", query[place], every[0]) * query.shape[-1] ** -0.5
            out[place] = torch.einsum("hs,shc->hc", scores.softmax(-1), every[1])
        if self.formula.qwen:
            gate = self._linear(normed, "q_proj").unflatten(1, (self.heads, 16))[..., 8:]
            out = out * gate.sigmoid()
        return out.flatten(1) @ self.layer["self_attn.o_proj.weight"].T

    def _grouped(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = 16 if self.formula.qwen else 8
        parts = [
            self._linear(normed, f"{one}_proj").unflatten(1, (-1, width if one == "q" else 8))
            for one in "qkv"
        ]
        parts[0] = parts[0][..., :8]
        for index, one in enumerate("qk"):
            weight = self.layer.get(f"self_attn.{one}_norm.weight")
            if weight is not None:
                parts[index] = rms(parts[index], weight, self.formula.eps)
            parts[index] = self._rotated(parts[index], positions)
        query, key, value = parts
        shared = self.heads // key.shape[1]
        return query, key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)

    def _rotated(self, states: Tensor, positions: Tensor, pairs: bool = False) -> Tensor:
        """Rotary positions. pairs: of adjacent dimensions, as in DeepSeek-V3."""
        turned, rest = states[..., : self.formula.rotary], states[..., self.formula.rotary :]
        half = self.formula.rotary // 2
        steps = torch.arange(half, dtype=torch.float64) / half
        angle = positions[:, None] * self.formula.theta**-steps
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if pairs:
            left, right = turned[..., 0::2], turned[..., 1::2]
        else:
            left, right = turned[..., :half], turned[..., half:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin, rest], -1)

    def _latent(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Multi-head latent attention: head_dim 8 without, 8 with rotary positions, values 12."""
        eps = 1e-6
        low = rms(
            self._linear(normed, "q_a_proj"), self.layer["self_attn.q_a_layernorm.weight"], eps
        )
        query = self._linear(low, "q_b_proj").unflatten(1, (self.heads, 16))
        query = torch.cat([query[..., :8], self._rotated(query[..., 8:], positions, True)], -1)
        joint = self._linear(normed, "kv_a_proj_with_mqa")
        turned = self._rotated(joint[:, None, 16:], positions, True).expand(-1, self.heads, -1)
        low = rms(joint[:, :16], self.layer["self_attn.kv_a_layernorm.weight"], eps)
        both = self._linear(low, "kv_b_proj").unflatten(1, (self.heads, 20))
        return query, torch.cat([both[..., :8], turned], -1), both[..., 8:]

    def _mlp(self, normed: Tensor, prefix: str) -> Tensor:
        gate, up, down = (
            self.layer[f"{prefix}{one}_proj.weight"] for one in ("gate", "up", "down")
        )
        return (torch.nn.functional.silu(normed @ gate.T) * (normed @ up.T)) @ down.T

    def _experts(self, normed: Tensor) -> Tensor:
        """Two groups of two experts, of which the group with the larger sum is used."""
        weight, bias = self.layer["mlp.gate.weight"], self.layer["mlp.gate.e_score_correction_bias"]
        scores = (normed @ weight.T).sigmoid()
        choice = scores + bias
        first = choice[:, :2].sum(-1) > choice[:, 2:].sum(-1)
        out = self._mlp(normed, "mlp.shared_experts.")
        for row in range(len(normed)):
            chosen = (0, 1) if first[row] else (2, 3)
            total = sum(scores[row, number] for number in chosen) + 1e-20
            for number in chosen:
                share = scores[row, number] / total * self.formula.scale
                out[row] += share * self._mlp(normed[row : row + 1], f"mlp.experts.{number}.")[0]
        return out

    def _softmax_experts(self, normed: Tensor) -> Tensor:
        """The top-2 experts with normalised weights, and a gated shared expert."""
        shares = (normed @ self.layer["mlp.gate.weight"].T).softmax(-1)
        gate = (normed @ self.layer["mlp.shared_expert_gate.weight"].T).sigmoid()
        out = gate * self._mlp(normed, "mlp.shared_expert.")
        for row in range(len(normed)):
            best, chosen = shares[row].topk(self.formula.top)
            for share, number in zip(best / best.sum(), chosen.tolist(), strict=True):
                out[row] += share * self._expert(normed[row : row + 1], number)[0]
        return out

    def _expert(self, normed: Tensor, number: int) -> Tensor:
        if "mlp.experts.gate_up_proj" not in self.layer:
            return self._mlp(normed, f"mlp.experts.{number}.")
        gate, up = (normed @ self.layer["mlp.experts.gate_up_proj"][number].T).chunk(2, -1)
        down = self.layer["mlp.experts.down_proj"][number]
        return (torch.nn.functional.silu(gate) * up) @ down.T
