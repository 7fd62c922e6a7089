"""EAGLE-3 drafting in plain formulas, for readers of exported folders (vllm_reader, sglang_reader).

Nothing here comes from the project. A reader fills in the fields as its engine would.

Legend: T positions, D hidden size, H query heads, G key/value heads, C head_dim, V target
vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
NORMS = ("input_layernorm", "hidden_norm", "post_attention_layernorm")


class DraftLogits(NamedTuple):
    """Logits Vd of a draft token, and the token ids that they belong to."""

    logits: Tensor
    ids: Tensor

    @property
    def token(self) -> int:
        return int(self.ids[self.logits.argmax()])


def files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors in float32."""
    tensors = load_file(folder / "model.safetensors")
    wide = {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}
    return json.loads((folder / "config.json").read_text()), wide


def normed(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return hidden_TD / (hidden_TD.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def rotated(states_THC: Tensor, positions_T: Tensor, theta: float) -> Tensor:
    """Rotary positions as complex numbers: dimensions c and c + C/2 form one of them."""
    half = states_THC.shape[-1] // 2
    speeds = 1 / theta ** (2 * torch.arange(half, dtype=torch.float64) / (2 * half))
    angles = (positions_T[:, None].double() * speeds)[:, None]
    real, imaginary = states_THC[..., :half].double(), states_THC[..., half:].double()
    rotated_THC = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([rotated_THC.real, rotated_THC.imag], -1).float()


@torch.no_grad()
def layer_inputs(model: PreTrainedModel, tokens: list[int], layers: list[int]) -> Tensor:
    """T x (layers D): the concatenated inputs of decoder layers of a target. The layer behind the
    last one stands for the final norm."""
    inner = model.model
    places = [*inner.layers, inner.norm]
    inputs: dict[int, Tensor] = {}
    handles = [
        places[layer].register_forward_pre_hook(
            lambda _, args, kwargs, at=layer: inputs.update(
                {at: args[0] if args else kwargs["hidden_states"]}
            ),
            with_kwargs=True,
        )
        for layer in set(layers)
    ]
    model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    return torch.cat([inputs[layer][0] for layer in layers], -1)


@dataclass
class ReferenceDraft:
    """The draft model of one sequence.

    layers: of the target whose inputs are the features.
    theta, eps: of rotary positions and of all norms.
    weights: fc, the linears and norms of the layer, norm.
    feed_normed: the next step gets the normed output.
    """

    target: PreTrainedModel
    layers: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    theta: float
    eps: float
    weights: dict[str, Tensor]
    fc_norms: list[Tensor]
    embedding: Tensor
    lm_head: Tensor
    ids: Tensor
    feed_normed: bool
    residual_normed: bool = False
    with_fc: bool = True
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    feature_D: Tensor | None = None

    @torch.no_grad()
    def begin(self, tokens: list[int], following: int) -> DraftLogits:
        """The first draft step behind a sequence and the next token, `following`."""
        taps = layer_inputs(self.target, tokens, self.layers).float()
        if self.fc_norms:
            parts = taps.chunk(len(self.fc_norms), -1)
            taps = torch.cat(
                [normed(*pair, self.eps) for pair in zip(parts, self.fc_norms, strict=True)], -1
            )
        feature_TD = taps @ self.weights["fc"].T if self.with_fc else taps
        return self._step([*tokens[1:], following], feature_TD)

    @torch.no_grad()
    def follow(self, token: int) -> DraftLogits:
        """The next draft step, with the draft token of the one before."""
        assert self.feature_D is not None
        return self._step([token], self.feature_D[None])

    def _step(self, tokens: list[int], feature_TD: Tensor) -> DraftLogits:
        embedded_TD = self.embedding[torch.tensor(tokens)].float()
        output_TD = self._layer(embedded_TD, feature_TD)
        last_D = normed(output_TD, self.weights["norm"], self.eps)[-1]
        self.feature_D = last_D if self.feed_normed else output_TD[-1]
        return DraftLogits(self.lm_head.float() @ last_D, self.ids)

    def _layer(self, embedded_TD: Tensor, feature_TD: Tensor) -> Tensor:
        w, eps = self.weights, self.eps
        hidden_TD = normed(feature_TD, w["hidden_norm"], eps)
        residual_TD = hidden_TD if self.residual_normed else feature_TD
        joined = torch.cat([normed(embedded_TD, w["input_layernorm"], eps), hidden_TD], -1)
        residual_TD = residual_TD + self._attended(joined)
        hidden_TD = normed(residual_TD, w["post_attention_layernorm"], eps)
        gate = hidden_TD @ w["mlp.gate_proj"].T
        gated = gate * gate.sigmoid() * (hidden_TD @ w["mlp.up_proj"].T)
        return residual_TD + gated @ w["mlp.down_proj"].T

    def _attended(self, joined: Tensor) -> Tensor:
        """Causal attention; positions are counted from the first pair."""
        w, new, start = self.weights, len(joined), len(self.keys)
        positions_T = torch.arange(start, start + new)
        queries, keys, values = (
            (joined @ w[f"self_attn.{part}_proj"].T).view(new, -1, self.head_dim) for part in "qkv"
        )
        self.keys += rotated(keys, positions_T, self.theta)
        self.values += values
        all_keys, all_values = torch.stack(self.keys), torch.stack(self.values)
        heads = []
        for head, queries_TC in enumerate(rotated(queries, positions_T, self.theta).unbind(1)):
            group = head * self.kv_heads // self.heads
            scores = queries_TC @ all_keys[:, group].T / self.head_dim**0.5
            later = torch.arange(len(all_keys)) > positions_T[:, None]
            scores = scores.masked_fill(later, float("-inf"))
            heads.append(scores.softmax(-1) @ all_values[:, group])
        return torch.cat(heads, -1) @ w["self_attn.o_proj"].T
