"""The few blocks that heads share: norm, rotary positions, attention and one decoder layer.

Legend: B batch rows, T positions, H query heads, G key/value heads, C head channels, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

# (queries B H T C, keys B G T C, values B G T C) -> attended values B H T C. What a query may see
# is the caller's business: training, prompt and tree each bring their own.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class LayerConfig(BaseModel):
    """Sizes of one decoder layer in the Llama style."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(description="Width of the hidden states.")
    intermediate_size: int = Field(description="Width of the MLP.")
    num_attention_heads: int = Field(description="Attention heads.")
    num_key_value_heads: int = Field(description="Heads of keys and values.")
    head_dim: int = Field(description="Size of an attention head.")
    rms_norm_eps: float = Field(default=1e-5, description="Epsilon of the norms.")
    rope_theta: float = Field(default=10000.0, description="Base of the rotary positions.")
    attention_bias: bool = Field(default=False, description="Biases of queries, keys and values.")
    qk_norm: bool = Field(default=False, description="Norm queries and keys per attention head.")


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in the type of its input or wider."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.eps)


class ZeroCentredNorm(RMSNorm):
    """The same, with a weight that is added to 1, as Qwen3-Next holds it."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(hidden.to(wide), scale.shape, scale, self.eps).to(hidden.dtype)


def angles(positions: Tensor, channels: int, theta: float, wide: torch.dtype) -> Tensor:
    """Rotary angles (arXiv 2104.09864) of half the channels, in the type `wide`."""
    half = channels // 2
    steps = torch.arange(half, dtype=wide, device=positions.device) / half
    return positions[..., None].to(wide) * theta**-steps


def rotate(states_BHTC: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Rotary position embedding, half-split as in Llama."""
    half = states_BHTC.shape[-1] // 2
    # Angles need the precision of the positions, whatever the type of the states.
    wide = torch.float64 if states_BHTC.dtype == torch.float64 else torch.float32
    angles_BTC = angles(positions_BT, 2 * half, theta, wide)
    cos = angles_BTC.cos()[:, None].to(states_BHTC.dtype)
    sin = angles_BTC.sin()[:, None].to(states_BHTC.dtype)
    left, right = states_BHTC[..., :half], states_BHTC[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class Attention(nn.Module):
    """Grouped-query self-attention; `attend` decides who sees whom."""

    def __init__(self, config: LayerConfig, input_size: int):
        super().__init__()
        self.config = config
        heads, groups, channels = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(input_size, heads * channels, bias=bias)
        self.k_proj = nn.Linear(input_size, groups * channels, bias=bias)
        self.v_proj = nn.Linear(input_size, groups * channels, bias=bias)
        self.o_proj = nn.Linear(heads * channels, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(channels, config.rms_norm_eps)
            self.k_norm = RMSNorm(channels, config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        channels, theta = self.config.head_dim, self.config.rope_theta
        split = (*hidden_BTD.shape[:2], -1, channels)
        queries = self.q_proj(hidden_BTD).view(split)
        keys = self.k_proj(hidden_BTD).view(split)
        values = self.v_proj(hidden_BTD).view(split)
        if self.config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries.transpose(1, 2), positions_BT, theta)
        keys = rotate(keys.transpose(1, 2), positions_BT, theta)
        attended_BHTC = attend(queries, keys, values.transpose(1, 2))
        return self.o_proj(attended_BHTC.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
