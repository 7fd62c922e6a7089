"""The reference of all operations, in torch.

Legend: as in ops.py; T positions of a whole sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headstart.model.cache.kv_cache import KVLayer
from headstart.model.tree.ops import TorchTreeOps

from .linear import FusedLinear
from .ops import Activation, AttentionContext, AttentionSpec, CacheVisibility, NormWeights
from .rotary import CosSin, Rotary, rotate

FLOAT64_PROMPT = 64  # tokens of a prompt whose attention is cheap in float64


class TorchOps(TorchTreeOps):
    """Any device and dtype; differentiable, and nothing is changed in place but the cache."""

    def __reduce__(self) -> tuple[Any, ...]:
        return torch_ops, ()  # what is unpickled uses the one there is

    def __deepcopy__(self, memo: object) -> TorchOps:
        return self

    def residual_stream(self, embedded_RD: Tensor) -> Tensor:
        """The hidden states that layers add to, from the embeddings."""
        return embedded_RD

    def norm_linear(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights, linear: FusedLinear
    ) -> tuple[Tensor, Tensor]:
        """Add to the residual stream, norm it, and apply linear layers.

        added_RD: what the block before left to be added; None for nothing.
        Returns the residual stream and the output of the linear layers.
        """
        hidden_RD, normed_RD = self.add_norm(hidden_RD, added_RD, norm)
        return hidden_RD, self.linear(normed_RD, linear)

    def linear_add(self, input_R: Tensor, linear: FusedLinear, hidden_RD: Tensor) -> Tensor | None:
        """Apply a linear layer whose output belongs to the residual stream.

        Returns the output for the next `added_RD`, or None where it was added in place.
        """
        return self.linear(input_R, linear)

    def gated_linear_add(
        self, gate_up_RF: Tensor, activation: Activation, linear: FusedLinear, hidden_RD: Tensor
    ) -> Tensor | None:
        """`linear_add` of a gated MLP's inner states."""
        return self.linear_add(self.gate(gate_up_RF, activation), linear, hidden_RD)

    def add_norm(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights
    ) -> tuple[Tensor, Tensor]:
        """Add to the residual stream and norm it. Returns the residual stream and its norm."""
        hidden_RD = hidden_RD if added_RD is None else hidden_RD + added_RD
        return hidden_RD, self.rms_norm(hidden_RD, norm)

    def begin(
        self,
        visibility: CacheVisibility,
        cos_sin: CosSin,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> AttentionContext:
        """Compute what the attention of all layers of a pass shares.

        shape: sequences B and new positions N. dtype: of the cache.
        """
        masks = None if visibility.all_visible else visibility.additive(dtype)
        return AttentionContext(visibility, cos_sin, shape, dtype, masks)

    def attend(
        self, qkv_RE: Tensor, spec: AttentionSpec, context: AttentionContext, kv_layer: KVLayer
    ) -> Tensor:
        """Norm and rotate queries and keys, write keys and values to the cache, and attend.

        qkv_RE: R is B x N, or both in one dimension. Returns the attended values, R x (H C).
        """
        qkv_BNE = qkv_RE.view(*context.shape, -1)
        queries, keys, values = self.rotate(qkv_BNE, spec, context.cos_sin)
        keys, values = kv_layer.update(keys, values)
        attention = exact_attention if spec.exact else grouped_attention
        attended_BHNC = attention(queries, keys, values, context.mask(spec.kind), scale=spec.scale)
        return attended_BHNC.transpose(1, 2).reshape(*qkv_RE.shape[:-1], -1)

    def cached_attention(
        self, queries_BHNC: Tensor, keys: Tensor, values: Tensor, visibility: CacheVisibility
    ) -> Tensor:
        """Attend to keys and values of a cache, B x G x S x C, in which the new ones are written.
        Returns B x H x N x C."""
        mask = visibility.additive(queries_BHNC.dtype)
        assert isinstance(mask, Tensor), "a head has one kind of attention"
        return grouped_attention(queries_BHNC, keys, values, mask)

    def prepare(self, linear: FusedLinear) -> None:
        """Lay out the weights for these operations, once, when a backend or head is built."""

    def rms_norm(self, hidden_RD: Tensor, norm: NormWeights) -> Tensor:
        """Root mean square norm (arXiv 1910.07467), in the type of its input or wider."""
        weight_D = norm.weight.to(hidden_RD.dtype)
        return F.rms_norm(hidden_RD, weight_D.shape, weight_D, norm.eps)

    def linear(self, input_R: Tensor, linear: FusedLinear) -> Tensor:
        """Apply linear layers that read the same input; their outputs side by side."""
        outputs = [one(input_R) for one in linear.linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def gate(self, gate_up_RF: Tensor, activation: Activation) -> Tensor:
        """The activation of the first half times the second (SwiGLU, arXiv 2002.05202)."""
        gate, up = gate_up_RF.chunk(2, -1)
        return activation(gate) * up

    def rope(self, rotary: Rotary, positions_BN: Tensor, like: Tensor) -> CosSin:
        """Cosines and sines of positions, as `rotate` and `attend` take them. like: the states."""
        return rotary.cos_sin(positions_BN, like.dtype)

    def rotate(
        self, qkv_BNE: Tensor, spec: AttentionSpec, cos_sin: CosSin
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split into queries, keys and values, norm and rotate the former two.

        Returns queries B x H x N x C, keys and values B x G x N x C.
        """
        split_BNHC = qkv_BNE.unflatten(-1, (-1, spec.head_dim))
        sizes = [spec.heads, spec.kv_heads, spec.kv_heads]
        queries, keys, values = split_BNHC.split(sizes, 2)
        if spec.query_norm is not None and spec.key_norm is not None:
            queries = self.rms_norm(queries, spec.query_norm)
            keys = self.rms_norm(keys, spec.key_norm)
        queries = rotate(queries.transpose(1, 2), cos_sin)
        return queries, rotate(keys.transpose(1, 2), cos_sin), values.transpose(1, 2)

    def topk_logprobs(self, logits_RV: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The k largest log-probabilities of logits / temperature and their token ids, R x K, best
        first."""
        logp_RK, ids_RK = (logits_RV.float() / temperature).log_softmax(-1).topk(k, dim=-1)
        return logp_RK, ids_RK

    def argmax(self, scores_RV: Tensor) -> Tensor:
        """The index of each row's largest score, the first of equals."""
        return scores_RV.argmax(-1)


TORCH_OPS = TorchOps()


def torch_ops() -> TorchOps:
    """The one instance."""
    return TORCH_OPS


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention B H T C over keys and values B G S C, which are not copied per query head.

    mask: boolean (True: visible) or additive, the same for all heads (B 1 T S).
    Torch's kernels copy each key for every query head that shares it when there is a mask. Here
    those heads become more queries instead.
    """
    heads, kv_heads = queries.shape[1], keys.shape[1]
    if mask is None or heads == kv_heads:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
    batch, _, new, head_dim = queries.shape
    shared = heads // kv_heads
    folded = queries.reshape(batch, kv_heads, shared * new, head_dim)
    mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, new, values.shape[-1])


def exact_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Softmax attention B H N C, the same for a position whatever is computed beside it.

    It sums in float64: see int8.py for why. mask: boolean (True: visible) or additive, B 1 N S.
    None: every position sees the slots up to its own. A prompt without a prefix is the same in
    autoregressive and in tree decoding, so long ones stay in float32.
    """
    new, slots = queries.shape[2], keys.shape[2]
    causal = mask is None and new > 1
    assert not causal or new == slots, "without a mask, new positions must be the whole sequence"
    if FLOAT64_PROMPT < new == slots:
        return grouped_attention(queries, keys, values, mask, causal, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wide = queries.double(), keys.double(), values.double()
    return grouped_attention(*wide, mask, causal, scale).to(queries.dtype)
