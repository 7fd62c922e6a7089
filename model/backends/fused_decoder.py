"""The layers of decoders built like Llama, on top of `Ops`: one loop for all devices and dtypes.

A step of a small model is so short that it shows how the modules are cut: norms of six operations,
three products where one does, keys copied per query head. `FusedDecoder` computes the same with one
product for queries, keys and values, one for gate and up, and fused norms. It borrows the model's
own weights, rotary angles and activation.

No family is known by name: select.py says which models qualify. All others, long prompts on a GPU
and long ones without a prefix use the modules as they are, which is what tests compare with.

Legend: B sequences, N new positions, R = B x N, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.cache.kv_cache import KVCache

from .int8 import QuantizedLinear
from .linear import MAX_ROWS, FusedLinear, weight_version
from .ops import Activation, AttentionSpec, Ops
from .visibility import Visibility

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMED_ATTENTION = ATTENTION | {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
MAX_NEW_ON_A_GPU = 512  # new positions; longer prompts are left to the model's own modules


class Norm:
    """The weight and epsilon of a root mean square norm."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps
        self._wide, self._made_from = weight.float(), weight_version(weight)

    @property
    def wide(self) -> Tensor:
        """The weight in float32."""
        if self.weight.dtype != torch.float32 and self._made_from != weight_version(self.weight):
            self._wide, self._made_from = self.weight.float(), weight_version(self.weight)
        return self._wide


class FusedDecoder:
    """The layers of a decoder, as functions of its weights."""

    def __init__(self, decoder: Any, layers: nn.ModuleList, kinds: Sequence[str], ops: Ops):
        """kinds: the kind of attention of each layer. LookupError for a model with other parts."""
        if _children(decoder) != DECODER or decoder.training:
            raise LookupError("the decoder has other parts")
        self.ops = ops
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        self.norm = rms_norm(decoder.norm)
        self.dtype: torch.dtype = decoder.norm.weight.dtype
        self.device: torch.device = decoder.norm.weight.device
        pairs = zip(layers, kinds, strict=True)
        self.layers: Sequence[FusedLayer] = [FusedLayer(one, kind) for one, kind in pairs]

    def prepare(self) -> FusedDecoder:
        """Lay out the weights for the ops, once it is known that this decoder will be used."""
        for layer in self.layers:
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                self.ops.prepare(linear)
        return self

    def accepts(self, ids_BN: Tensor, cache: KVCache) -> bool:
        """Whether it computes such a pass. On a CPU all behind a prefix, and all of a quantised
        model, as rounding must not depend on how many positions are computed together."""
        behind = cache.preallocated or cache.max_length > 0
        if self.device.type != "cpu":
            return behind and ids_BN.shape[1] <= MAX_NEW_ON_A_GPU
        known = behind or ids_BN.numel() <= MAX_ROWS or self.layers[0].spec.exact
        return known and not torch.is_autocast_enabled("cpu")

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache,
        visibility: Visibility,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Compute new positions, whose keys and values stay pending in the cache.

        taps: decoder layers (0-based) whose output is wanted.
        Returns the LM head's input B x N x D, and the outputs of the layers `taps` by layer.
        """
        ops, tapped = self.ops, dict[int, Tensor]()
        batch, new = ids_BN.shape
        hidden_RD = ops.residual_stream(self.embed(ids_BN).flatten(0, 1))
        cos_sin = self.rotary(hidden_RD[None], position_ids=positions_BN)
        context = ops.begin(visibility, cos_sin, (batch, new), self.dtype)

        def tap(hidden_RD: Tensor) -> Tensor:
            return hidden_RD.to(self.dtype, copy=True).view(batch, new, -1)

        added_RD: Tensor | None = None  # by the block before, to the residual stream
        for index, layer in enumerate(self.layers):
            hidden_RD, qkv = ops.norm_linear(hidden_RD, added_RD, layer.input_norm, layer.qkv)
            if index - 1 in taps:
                tapped[index - 1] = tap(hidden_RD)
            attended = ops.attend(qkv, layer.spec, context, cache.kv_layers[index])
            added_RD = ops.linear_add(attended, layer.out, hidden_RD)
            hidden_RD, gate_up = ops.norm_linear(hidden_RD, added_RD, layer.mlp_norm, layer.gate_up)
            added_RD = ops.gated_linear_add(gate_up, layer.activation, layer.down, hidden_RD)
        hidden_RD, normed_RD = ops.add_norm(hidden_RD, added_RD, self.norm)
        if index in taps:
            tapped[index] = tap(hidden_RD)
        return normed_RD.to(self.dtype).view(batch, new, -1), tapped


class FusedLayer:
    """The weights of one decoder layer: attention and a gated MLP, each behind a norm and with a
    residual."""

    def __init__(self, layer: Any, kind: str):
        """LookupError for a layer with other parts."""
        attention, mlp = layer.self_attn, layer.mlp
        named = _children(attention)
        if _children(layer) != LAYER or _children(mlp) != MLP:
            raise LookupError("the layer has other parts")
        if named not in (ATTENTION, NORMED_ATTENTION) or [*attention.parameters(recurse=False)]:
            raise LookupError("the attention has other parts")
        self.input_norm = rms_norm(layer.input_layernorm)
        self.mlp_norm = rms_norm(layer.post_attention_layernorm)
        normed = named == NORMED_ATTENTION
        self.spec = AttentionSpec(
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            query_norm=rms_norm(attention.q_norm) if normed else None,
            key_norm=rms_norm(attention.k_norm) if normed else None,
            kind=kind,
            exact=isinstance(attention.o_proj, QuantizedLinear),
        )
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = FusedLinear(attention.o_proj)
        self.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj)
        self.down = FusedLinear(mlp.down_proj)
        self.activation: Activation = F.silu if _is_silu(mlp.act_fn) else mlp.act_fn

    @property
    def is_plain(self) -> bool:
        """Whether kernels know it: a SwiGLU, and queries and keys normed alike or not at all."""
        query, key = self.spec.query_norm, self.spec.key_norm
        alike = query is None or key is None or query.eps == key.eps
        return alike and self.activation is F.silu


def rms_norm(module: nn.Module) -> Norm:
    """The weights of a module's norm. LookupError if it computes something else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or [*module.parameters()] != [weight]:
        raise LookupError("the norm has other parts")
    sample = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
    norm = Norm(weight.detach(), eps)
    step = torch.finfo(weight.dtype).eps
    ours = F.rms_norm(sample, norm.weight.shape, norm.weight, eps)
    if not torch.allclose(ours, module(sample), rtol=100 * step, atol=10 * step):
        raise LookupError("the norm computes something else")
    return norm


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_silu(activation: Activation) -> bool:
    sample = torch.linspace(-8, 8, 33)
    return torch.allclose(activation(sample), F.silu(sample))
