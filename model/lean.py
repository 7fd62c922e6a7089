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
from transformers import PretrainedConfig

from .cache import KVCache
from .layers import grouped_attention
from .packed import ROWS, Product
from .quantized import QuantizedLinear, exact_attention, full_precision

DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMED_ATTENTION = ATTENTION | {"q_norm", "k_norm"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}

Norm = Callable[[Tensor], Tensor]


class Lean:
    """The layers of a decoder, as functions of its weights. See the head of this file."""

    def __init__(self, decoder: Any, layers: nn.ModuleList, kinds: Sequence[str]):
        """kinds: the kind of attention of each layer. LookupError for a model with other parts."""
        if _children(decoder) != DECODER or decoder.training:
            raise LookupError("the decoder has other parts")
        self._embed, self._rotary = decoder.embed_tokens, decoder.rotary_emb
        self._norm = _rms_norm(decoder.norm)
        self._layers = [_Layer(one, kind) for one, kind in zip(layers, kinds, strict=True)]

    @staticmethod
    def of(decoder: nn.Module, layers: nn.ModuleList, config: PretrainedConfig) -> Lean | None:
        """None for a model that is built otherwise, or computes something else."""
        weight = next(decoder.parameters())
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None
        kinds = getattr(config, "layer_types", None) or [""] * len(layers)
        try:
            with full_precision(decoder):  # integers would make a step of a last bit
                if not Lean(decoder, layers, kinds)._agrees(decoder, config):
                    return None
            return Lean(decoder, layers, kinds)
        except (LookupError, RuntimeError, TypeError, AttributeError, ValueError):
            return None  # other parts, or parts that work together in another way

    @staticmethod
    def suits(ids_BN: Tensor) -> bool:
        """Whether a read is short enough for this way."""
        return ids_BN.numel() in ROWS

    def read(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache,
        masks: Mapping[str, Tensor] | Tensor | None,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The LM head's input B x N x D, and the outputs of the layers `taps`.

        masks: additive B x 1 x N x S, by kind of attention where there are several; None where each
        row sees all columns.
        """
        hidden_BND = self._embed(ids_BN)
        cos_BNC, sin_BNC = self._rotary(hidden_BND, position_ids=positions_BN)
        turn = cos_BNC[:, None], _signed(sin_BNC)[:, None]
        kept: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            mask = masks[layer.kind] if isinstance(masks, Mapping) else masks
            hidden_BND = layer(hidden_BND, turn, index, cache, mask)
            if index in taps:
                kept[index] = hidden_BND
        return self._norm(hidden_BND), kept

    def _agrees(self, decoder: nn.Module, config: PretrainedConfig) -> bool:
        """Whether two short texts come out as from the model itself."""
        vocabulary = self._embed.num_embeddings
        ids_1N = torch.tensor([[i % vocabulary for i in (5, 3, 7, 2, 6, 4, 1)]])
        new = ids_1N.shape[1]
        far = (getattr(config, "max_position_embeddings", None) or 1 << 16) - new
        steps_N = torch.arange(new)
        mask_NN = torch.zeros(new, new).masked_fill_(steps_N[:, None] < steps_N, -torch.inf)
        for start in (0, max(far, 0)):
            positions_1N = (steps_N + start)[None]
            with torch.no_grad():
                theirs = decoder(input_ids=ids_1N, position_ids=positions_1N, use_cache=False)
                cache = KVCache(1, len(self._layers), ids_1N.device)
                cache.expect(new)
                masks = {layer.kind: mask_NN[None, None] for layer in self._layers}
                ours, _ = self.read(ids_1N, positions_1N, cache, masks)
            error = (ours - theirs.last_hidden_state).norm()
            if not error <= 1e-4 * theirs.last_hidden_state.norm():
                return False
        return True


class _Layer:
    """One decoder layer: attention and a gated MLP, each behind a norm and with a residual."""

    def __init__(self, layer: Any, kind: str):
        attention, mlp = layer.self_attn, layer.mlp
        named = _children(attention)
        if _children(layer) != LAYER or _children(mlp) != MLP:
            raise LookupError("the layer has other parts")
        if named not in (ATTENTION, NORMED_ATTENTION) or [*attention.parameters(recurse=False)]:
            raise LookupError("the attention has other parts")
        self.kind = kind
        self._first = _rms_norm(layer.input_layernorm)
        self._second = _rms_norm(layer.post_attention_layernorm)
        normed = named == NORMED_ATTENTION
        self._query_norm = _rms_norm(attention.q_norm) if normed else None
        self._key_norm = _rms_norm(attention.k_norm) if normed else None
        self._channels, self._scale = attention.head_dim, attention.scaling
        self._groups = attention.k_proj.out_features // self._channels
        self._qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = Product(attention.o_proj)
        self._gate_up, self._down = Product(mlp.gate_proj, mlp.up_proj), Product(mlp.down_proj)
        self._activation: Norm = mlp.act_fn
        quantized = type(attention.o_proj) is QuantizedLinear
        self._attention = exact_attention if quantized else grouped_attention

    def __call__(
        self,
        hidden_BND: Tensor,
        turn: tuple[Tensor, Tensor],
        index: int,
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        attended = self._attend(self._first(hidden_BND), turn, index, cache, mask)
        hidden_BND = hidden_BND + self._out(attended)
        gate, up = self._gate_up(self._second(hidden_BND)).chunk(2, -1)
        return hidden_BND + self._down(self._activation(gate) * up)

    def _attend(
        self,
        normed_BND: Tensor,
        turn: tuple[Tensor, Tensor],
        index: int,
        cache: KVCache,
        mask: Tensor | None,
    ) -> Tensor:
        batch, new, _ = normed_BND.shape
        heads_BNHC = self._qkv(normed_BND).view(batch, new, -1, self._channels)
        turned, values = heads_BNHC.transpose(1, 2).split(
            [heads_BNHC.shape[2] - self._groups, self._groups], 1
        )
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = turned[:, : -self._groups], turned[:, -self._groups :]
            turned = torch.cat([self._query_norm(queries), self._key_norm(keys)], 1)
        cos, sin = turn
        turned = torch.addcmul(turned * cos, turned.roll(self._channels // 2, -1), sin)
        keys, values = cache.kv_layers[index].update(turned[:, -self._groups :], values)
        attended_BHNC = self._attention(
            turned[:, : -self._groups], keys, values, mask, scale=self._scale
        )
        return attended_BHNC.transpose(1, 2).reshape(batch, new, -1)


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _signed(sin_BNC: Tensor) -> Tensor:
    """For x cos + roll(x) sin: the first half of `rotate_half` is negative."""
    left, right = sin_BNC.chunk(2, -1)
    return torch.cat([-left, right], -1)


def _rms_norm(module: nn.Module) -> Norm:
    """The module's norm as one operation. LookupError if it is another one."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or [*module.parameters()] != [weight]:
        raise LookupError("the norm has other parts")
    sample = torch.linspace(-2, 3, len(weight), dtype=weight.dtype)
    ours, theirs = F.rms_norm(sample, weight.shape, weight, eps), module(sample)
    if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6):
        raise LookupError("the norm computes something else")
    return lambda hidden: F.rms_norm(hidden, weight.shape, weight, eps)
