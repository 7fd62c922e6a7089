"""The operations that decoder layers and draft heads are made of.

`TorchOps` (torch_ops.py) is the reference: differentiable, on any device, in any dtype. `CpuOps`
computes with kernels in C, `TritonOps` with kernels in Triton; what they have no kernel for they
inherit from the reference. select.py chooses among them, once per device.

The residual stream may be updated in place, except by the reference: callers use what an
operation returns and drop what they passed.

Legend: B sequences, N new positions, R any leading dimensions, D hidden size, E width of queries,
keys and values joined, F inner size of an MLP, H query heads, G key/value heads, C head dimension,
M pending cache slots, S cache slots, K chosen tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from headstart.model.cache.kv_cache import KVCache, KVLayer
from headstart.model.tree.ops import TreeOps

from .linear import FusedLinear
from .rotary import CosSin, Rotary
from .visibility import AdditiveMask

Activation = Callable[[Tensor], Tensor]


class NormWeights(Protocol):
    """A root mean square norm: a module or a `Norm` (fused_decoder.py). wide: in float32."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def wide(self) -> Tensor: ...

    @property
    def eps(self) -> float: ...


class CacheVisibility(Protocol):
    """What new positions may see: see `Visibility`. windowed: whether some see only a part of the
    committed slots."""

    @property
    def cache(self) -> KVCache: ...

    @property
    def pending_BNM(self) -> Tensor: ...

    @property
    def all_visible(self) -> bool: ...

    @property
    def windowed(self) -> bool: ...

    def additive(self, dtype: torch.dtype) -> AdditiveMask: ...


@dataclass(frozen=True)
class AttentionSpec:
    """How one layer attends.

    scale: factor of the scores. query_norm, key_norm: both or neither.
    kind: kind of attention, where masks differ by kind ("": there is one kind).
    exact: whether sums must not depend on what else is computed (`exact_attention`).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    query_norm: NormWeights | None = None
    key_norm: NormWeights | None = None
    kind: str = ""
    exact: bool = False

    def norms(self, *, wide: bool) -> tuple[tuple[Tensor, Tensor] | None, float]:
        """Weights of the norms of queries and keys, in float32 if `wide`, and their epsilon."""
        query, key = self.query_norm, self.key_norm
        if query is None or key is None:
            return None, 0.0
        weights = (query.wide, key.wide) if wide else (query.weight, key.weight)
        return weights, query.eps


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What the attention of all layers of one forward pass shares. Made by `Ops.begin`.

    shape: B and N. dtype: of keys and values in the cache.
    masks: additive masks as the backend reads them; None where all is visible, or where the
    backend reads `visibility` itself. slots_BN: cache slots of the new positions, if needed.
    """

    visibility: CacheVisibility
    cos_sin: CosSin
    shape: tuple[int, int]
    dtype: torch.dtype
    masks: AdditiveMask | None = None
    slots_BN: Tensor | None = None

    def mask(self, kind: str) -> Tensor | None:
        """The mask of one kind of attention."""
        return self.masks[kind] if isinstance(self.masks, dict) else self.masks


def refuse_gradients(hidden: Tensor) -> None:
    """ValueError where a gradient is wanted: kernels compute none."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        raise ValueError("A head that was opened for decoding has no gradients. Load it again.")


class Ops(TreeOps, Protocol):
    """See `TorchOps` for what each operation computes."""

    # A decoder layer over the residual stream
    def residual_stream(self, embedded_RD: Tensor) -> Tensor: ...

    def norm_linear(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights, linear: FusedLinear
    ) -> tuple[Tensor, Tensor]: ...

    def linear_add(
        self, input_R: Tensor, linear: FusedLinear, hidden_RD: Tensor
    ) -> Tensor | None: ...

    def gated_linear_add(
        self, gate_up_RF: Tensor, activation: Activation, linear: FusedLinear, hidden_RD: Tensor
    ) -> Tensor | None: ...

    def add_norm(
        self, hidden_RD: Tensor, added_RD: Tensor | None, norm: NormWeights
    ) -> tuple[Tensor, Tensor]: ...

    # Attention over a cache
    def begin(
        self,
        visibility: CacheVisibility,
        cos_sin: CosSin,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> AttentionContext: ...

    def attend(
        self, qkv_RE: Tensor, spec: AttentionSpec, context: AttentionContext, kv_layer: KVLayer
    ) -> Tensor: ...

    def cached_attention(
        self, queries_BHNC: Tensor, keys: Tensor, values: Tensor, visibility: CacheVisibility
    ) -> Tensor: ...

    # Parts of a draft head's layers
    def prepare(self, linear: FusedLinear) -> None: ...

    def rms_norm(self, hidden_RD: Tensor, norm: NormWeights) -> Tensor: ...

    def linear(self, input_R: Tensor, linear: FusedLinear) -> Tensor: ...

    def gate(self, gate_up_RF: Tensor, activation: Activation) -> Tensor: ...

    def rope(self, rotary: Rotary, positions_BN: Tensor, like: Tensor) -> CosSin: ...

    def rotate(
        self, qkv_BNE: Tensor, spec: AttentionSpec, cos_sin: CosSin
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    # Drafting and sampling
    def topk_logprobs(
        self, logits_RV: Tensor, k: int, temperature: float
    ) -> tuple[Tensor, Tensor]: ...

    def argmax(self, scores_RV: Tensor) -> Tensor: ...
