"""A shorter way through models built like Llama, for reads of a few rows on a CPU.

A step of a small model is so short there that it shows how the modules are cut: norms of six
operations, three products where one does, keys copied per query head. `Lean` computes the same
with one product for queries, keys and values, one for gate and up, and fused norms. It borrows the
model's own weights, rotary angles and activation.

No family is known by name. A model qualifies if its modules have the parts named below and if two
texts, one of them at the far end of its context, come out as from the model itself. All others,
long texts and accelerators use the modules as they are, which is what tests compare with.

Legend: B batch rows, N new rows, H query heads, G key/value heads, C head channels, D hidden size,
S columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.cache.kv_cache import KVCache

from .attention import grouped_attention
from .int8 import QuantizedLinear, exact_attention
from .linear import MOST_ROWS, Product, identity
from .visibility import Visibility

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMED_ATTENTION = ATTENTION | {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


Turn = tuple[Tensor, Tensor]  # cosines and signed sines, B x 1 x N x C


class Norm:
    """A root mean square norm as one operation."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps
        self._wide, self._made_from = weight.float(), identity(weight)

    @property
    def wide(self) -> Tensor:
        """The weight in float32."""
        if self.weight.dtype != torch.float32 and self._made_from != identity(self.weight):
            self._wide, self._made_from = self.weight.float(), identity(self.weight)
        return self._wide

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class Lean:
    """The layers of a decoder, as functions of its weights. See the head of this file."""

    def __init__(self, decoder: Any, layers: nn.ModuleList, kinds: Sequence[str]):
        """kinds: the kind of attention of each layer. LookupError for a model with other parts."""
        if _children(decoder) != DECODER or decoder.training:
            raise LookupError("the decoder has other parts")
        self.embed, self.rotary = decoder.embed_tokens, decoder.rotary_emb
        self.norm = rms_norm(decoder.norm)
        self.dtype: torch.dtype = decoder.norm.weight.dtype
        self.layers = [Layer(one, kind) for one, kind in zip(layers, kinds, strict=True)]

    def accepts(self, ids_BN: Tensor, cache: KVCache) -> bool:
        """Whether it computes such a pass: all behind a sequence, and all of a quantised model, as
        rounding must not depend on how many positions are computed together."""
        behind = cache.preallocated or cache.width > 0
        few = ids_BN.numel() <= MOST_ROWS
        return (self.layers[0].exact or behind or few) and not torch.is_autocast_enabled("cpu")

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache,
        visibility: Visibility,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Compute the new positions, whose keys and values stay pending in the cache.

        Returns the LM head's input B x N x D, and the outputs of the layers `taps` by layer.
        """
        masks = None if visibility.all_visible else visibility.additive(self.dtype)
        hidden_BND = self.embed(ids_BN)
        cos_BNC, sin_BNC = self.rotary(hidden_BND, position_ids=positions_BN)
        turn = cos_BNC[:, None], _signed(sin_BNC)[:, None]
        kept: dict[int, Tensor] = {}
        for index, layer in enumerate(self.layers):
            mask = masks[layer.kind] if isinstance(masks, Mapping) else masks
            hidden_BND = layer(hidden_BND, turn, index, cache, mask)
            if index in taps:
                kept[index] = hidden_BND
        return self.norm(hidden_BND), kept


class Layer:
    """One decoder layer: attention and a gated MLP, each behind a norm and with a residual."""

    def __init__(self, layer: Any, kind: str):
        attention, mlp = layer.self_attn, layer.mlp
        named = _children(attention)
        if _children(layer) != LAYER or _children(mlp) != MLP:
            raise LookupError("the layer has other parts")
        if named not in (ATTENTION, NORMED_ATTENTION) or [*attention.parameters(recurse=False)]:
            raise LookupError("the attention has other parts")
        self.kind = kind
        self.first = rms_norm(layer.input_layernorm)
        self.second = rms_norm(layer.post_attention_layernorm)
        normed = named == NORMED_ATTENTION
        self.query_norm = rms_norm(attention.q_norm) if normed else None
        self.key_norm = rms_norm(attention.k_norm) if normed else None
        self.channels, self.scale = attention.head_dim, attention.scaling
        self.heads = attention.q_proj.out_features // self.channels
        self.groups = attention.k_proj.out_features // self.channels
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product(attention.o_proj)
        self.gate_up, self.down = Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)
        self.activation: Callable[[Tensor], Tensor] = mlp.act_fn
        self.exact = type(attention.o_proj) is QuantizedLinear
        self.attention = exact_attention if self.exact else grouped_attention

    def __call__(
        self,
        hidden_BND: Tensor,
        turn: Turn,
        index: int,
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        attended = self._attend(self.first(hidden_BND), turn, index, cache, mask)
        hidden_BND = hidden_BND + self.out(attended)
        gate, up = self.gate_up(self.second(hidden_BND)).chunk(2, -1)
        return hidden_BND + self.down(self.activation(gate) * up)

    @property
    def usual(self) -> bool:
        """Whether its MLP is a SwiGLU, and queries and keys are normed alike or not at all."""
        sample = torch.linspace(-8, 8, 33)
        alike = {one and one.eps for one in (self.query_norm, self.key_norm)}
        return len(alike) == 1 and torch.allclose(self.activation(sample), F.silu(sample))

    def _attend(
        self,
        normed_BND: Tensor,
        turn: Turn,
        index: int,
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        batch, new, _ = normed_BND.shape
        heads_BNHC = self.qkv(normed_BND).view(batch, new, -1, self.channels)
        turned, values = heads_BNHC.transpose(1, 2).split(
            [heads_BNHC.shape[2] - self.groups, self.groups], 1
        )
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = turned[:, : -self.groups], turned[:, -self.groups :]
            turned = torch.cat([self.query_norm(queries), self.key_norm(keys)], 1)
        cos, sin = turn
        turned = torch.addcmul(turned * cos, turned.roll(self.channels // 2, -1), sin)
        keys, values = cache.kv_layers[index].update(turned[:, -self.groups :], values)
        attended_BHNC = self.attention(
            turned[:, : -self.groups], keys, values, mask, scale=self.scale
        )
        return attended_BHNC.transpose(1, 2).reshape(batch, new, -1)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _signed(sin_BNC: Tensor) -> Tensor:
    """For x cos + roll(x) sin: the first half of `rotate_half` is negative."""
    left, right = sin_BNC.chunk(2, -1)
    return torch.cat([-left, right], -1)


def rms_norm(module: nn.Module) -> Norm:
    """The module's norm as one operation. LookupError if it is another one."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or [*module.parameters()] != [weight]:
        raise LookupError("the norm has other parts")
    sample = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
    norm = Norm(weight.detach(), eps)
    step = torch.finfo(weight.dtype).eps
    if not torch.allclose(norm(sample), module(sample), rtol=100 * step, atol=10 * step):
        raise LookupError("the norm computes something else")
    return norm
