"""The modules that heads share: norm, attention and MLP.

They compute through `ops`: the torch reference in training, a device's kernels after
`use_ops`. Both share one forward.

Legend: B sequences, T positions, H query heads, G key/value heads, C head dimension, E width of
queries, keys and values joined, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from headstart.model.backends.linear import FusedLinear
from headstart.model.backends.ops import AttentionSpec, Ops
from headstart.model.backends.rotary import Rotary
from headstart.model.backends.torch_ops import TORCH_OPS

from .cached_attention import CachedAttention

# (queries B H T C, keys B G T C, values B G T C) -> attended values B H T C. The caller decides
# what a query may see: training, prompt and tree each bring their own.
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


class OpsModule(nn.Module):
    """A module that computes through `ops`."""

    ops: Ops = TORCH_OPS

    def use_ops(self, ops: Ops) -> None:
        """Compute with these operations from now on; the weights must not change any more."""
        self.ops = ops
        self.fuse()
        for linear in vars(self).values():
            if isinstance(linear, FusedLinear):
                ops.prepare(linear)

    def fuse(self) -> None:
        """Join the linear layers that read the same input, as they are now."""


def use_ops(module: nn.Module, ops: Ops) -> None:
    """Let all parts of a module compute with these operations."""
    for one in module.modules():
        if isinstance(one, OpsModule):
            one.use_ops(ops)


class RMSNorm(OpsModule):
    """Root mean square norm (arXiv 1910.07467), computed in the type of its input or wider."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    @property
    def wide(self) -> Tensor:
        """The weight in float32."""
        return self.weight.float()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ops.rms_norm(hidden, self)


class ZeroCentredNorm(RMSNorm):
    """The same, with a weight that is added to 1, as Qwen3-Next holds it."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        scale = 1 + self.weight.to(wide)
        return F.rms_norm(hidden.to(wide), scale.shape, scale, self.eps).to(hidden.dtype)


class Attention(OpsModule):
    """Grouped-query self-attention; `attend` decides what a query sees."""

    def __init__(self, config: LayerConfig, input_size: int):
        super().__init__()
        self.config = config
        heads, kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(input_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.spec = AttentionSpec(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            query_norm=self.q_norm if config.qk_norm else None,
            key_norm=self.k_norm if config.qk_norm else None,
        )
        self.rotary = Rotary(head_dim, config.rope_theta)
        self.fuse()

    def fuse(self) -> None:
        self.qkv = FusedLinear(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        qkv_BTE = self.ops.linear(hidden_BTD, self.qkv)
        cos_sin = self.ops.rope(self.rotary, positions_BT, qkv_BTE)
        if isinstance(attend, CachedAttention):  # keys and values are written to the cache at once
            attended = attend.fused(qkv_BTE, self.spec, cos_sin)
        else:
            queries, keys, values = self.ops.rotate(qkv_BTE, self.spec, cos_sin)
            attended = attend(queries, keys, values).transpose(1, 2).flatten(2)
        return self.o_proj(attended)


class MLP(OpsModule):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LayerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fuse()

    def fuse(self) -> None:
        self.gate_up = FusedLinear(self.gate_proj, self.up_proj)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.ops.gate(self.ops.linear(hidden, self.gate_up), F.silu))
