"""GLM's multi-token prediction block (GLM-4.5 arXiv 2508.06471, GLM-5 arXiv 2602.15763).

One decoder layer shared by all steps, between the target's final hidden state and its LM head:

    u = eh_proj([enorm(embed(x[t+1])), hnorm(h[t])])
    z = norm(DecoderLayer(u))         p(x[t+2]) = softmax(lm_head(z))

h[t] is the target's hidden state after its final norm; in later steps it is z. Heads that came with
their target (checkpoint/adopt.py) may use another state and have a layer of the target's family.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from headstart.model.heads.common.autoregressive import AutoregressiveConfig, AutoregressiveHead
from headstart.model.heads.common.borrow import copy_final_norm, copy_last_layer, layer_sizes
from headstart.model.heads.common.layers import (
    MLP,
    Attend,
    Attention,
    LayerConfig,
    RMSNorm,
    ZeroCentredNorm,
)
from headstart.model.heads.common.target_layer import FamilyConfig, FamilyLayer
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target


class Config(AutoregressiveConfig):
    family: FamilyConfig | None = Field(
        default=None,
        description="The target family's own decoder layer in place of `layer`, as in heads that "
        "came with their target.",
    )
    feature_layer: int | None = Field(
        default=None,
        description="Decoder layer of the target (0-based) whose output the head uses (default: "
        "the input of the LM head).",
    )
    zero_centred: bool = Field(
        default=False, description="Add 1 to the weights of the head's own norms."
    )


class DecoderLayer(nn.Module):
    """A pre-norm Llama layer."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config, size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        normed_BTD = self.input_layernorm(hidden_BTD)
        hidden_BTD = hidden_BTD + self.self_attn(normed_BTD, positions_BT, attend)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Head(AutoregressiveHead):
    kind = "mtp"

    def __init__(self, config: Config):
        super().__init__(config)
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        self.attention_layout, self.window = config.attention_layout, config.window
        norm = ZeroCentredNorm if config.zero_centred else RMSNorm
        self.enorm = norm(size, eps)
        self.hnorm = norm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        if config.feature_layer is not None:
            self.taps = (config.feature_layer,)
        family = config.family
        self.layer = DecoderLayer(config.layer) if family is None else FamilyLayer(family)
        self.norm = norm(size, eps)

    @classmethod
    def defaults(cls, target: Target) -> dict[str, Any]:
        return {"layer": layer_sizes(target)}

    @torch.no_grad()
    def init_from_target(self) -> None:
        """Start as the target's last layer with the hidden state passed through."""
        layer = self.layer.block if isinstance(self.layer, FamilyLayer) else self.layer
        copy_last_layer(self.target, layer)
        copy_final_norm(self.target, self.norm.weight)
        if isinstance(self.norm, ZeroCentredNorm):
            self.norm.weight.sub_(1)
        half = self.config.hidden_size
        self.eh_proj.weight[:, half:] = torch.eye(half)
        self.eh_proj.weight[:, :half] *= 0.1

    def feature(self, seen: TargetOutput) -> Tensor:
        hidden_BTD = seen.hidden_states[self.taps[0]] if self.taps else seen.lm_head_input_BTD
        return hidden_BTD.to(self.eh_proj.weight.dtype)

    def step(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        joined = torch.cat([self.enorm(embedded_BTD), self.hnorm(feature_BTD)], -1)
        output_BTD: Tensor = self.layer(self.eh_proj(joined), positions_BT, attend)
        return output_BTD

    def lm_head_input(self, output_BTD: Tensor) -> Tensor:
        return self.norm(output_BTD)

    def next_feature(self, output_BTD: Tensor) -> Tensor:
        return self.norm(output_BTD)
