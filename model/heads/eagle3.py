"""EAGLE-3 (arXiv 2503.01840): one decoder layer over fused low, middle and high features.

    g = fc([h_low; h_mid; h_high])         attention input = [norm(embed(x[t+1])); norm(g)]

Later steps take the layer's own output for g. The residual is the un-normed g, which is what both
vLLM (norm_before_residual false) and SGLang compute. Options of EAGLE-3.1 (arXiv 2605.09992):
`fc_norm` norms each tap before fc, `norm_output` feeds the normed output back.

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from headstart.model.heads.common.autoregressive import AutoregressiveConfig, AutoregressiveHead
from headstart.model.heads.common.borrow import copy_final_norm, layer_sizes
from headstart.model.heads.common.layers import MLP, Attend, Attention, LayerConfig, RMSNorm
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target


class Config(AutoregressiveConfig):
    taps: tuple[int, ...] = Field(
        description="Decoder layers of the target (0-based) whose outputs are fused."
    )
    fc_norm: bool = Field(default=False, description="Norm each tap before they are fused.")
    norm_output: bool = Field(
        default=False, description="Feed the normed output back in later draft steps."
    )


class DecoderLayer(nn.Module):
    """A Llama layer whose attention reads the embedding beside the feature."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.hidden_norm = RMSNorm(size, eps)
        self.self_attn = Attention(config, 2 * size)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        joined = torch.cat([self.input_layernorm(embedded_BTD), self.hidden_norm(feature_BTD)], -1)
        hidden_BTD = feature_BTD + self.self_attn(joined, positions_BT, attend)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Head(AutoregressiveHead):
    kind = "eagle3"

    def __init__(self, config: Config):
        super().__init__(config)
        size, eps = config.hidden_size, config.layer.rms_norm_eps
        self.attention_layout, self.window = config.attention_layout, config.window
        self.taps = config.taps
        self.norm_output = config.norm_output
        self.fc = nn.Linear(len(config.taps) * size, size, bias=False)
        norms = [RMSNorm(size, eps) for _ in config.taps] if config.fc_norm else []
        self.fc_norm = nn.ModuleList(norms)
        self.midlayer = DecoderLayer(config.layer)
        self.norm = RMSNorm(size, eps)

    @classmethod
    def defaults(cls, target: Target) -> dict[str, Any]:
        last = target.num_layers - 1
        taps = sorted({min(1, last), max(target.num_layers // 2 - 1, 0), max(last - 3, 0)})
        # Engines build this layer without norms and biases of queries and keys.
        layer = layer_sizes(target) | {"qk_norm": False, "attention_bias": False}
        return {"layer": layer, "taps": taps}

    @torch.no_grad()
    def init_from_target(self) -> None:
        """The final norm starts as the target's; the layer is new."""
        copy_final_norm(self.target, self.norm.weight)

    def feature(self, seen: TargetOutput) -> Tensor:
        taps = [seen.hidden_states[layer].to(self.fc.weight.dtype) for layer in self.taps]
        if self.fc_norm:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        return self.fc(torch.cat(taps, -1))

    def step(
        self, embedded_BTD: Tensor, feature_BTD: Tensor, positions_BT: Tensor, attend: Attend
    ) -> Tensor:
        return self.midlayer(embedded_BTD, feature_BTD, positions_BT, attend)

    def lm_head_input(self, output_BTD: Tensor) -> Tensor:
        return self.norm(output_BTD)

    def next_feature(self, output_BTD: Tensor) -> Tensor:
        return self.norm(output_BTD) if self.norm_output else output_BTD
