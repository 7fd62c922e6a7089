"""The shortest way of reads on a CPU: matrix products, and what lies between them in C.

A layer of a small model is four products and some thirty small operations, and on a CPU it is those
that a step waits for: 8-bit SmolLM2-135M spends 5 of 22 ms in its products. `Native` does the rest
in five passes over the rows (kernels/cpu/layer_ops.c, attention.c); where those cannot be built,
`Lean` is used. Products of bfloat16 targets read 16 bits; all else stays in float32.

Legend: B batch rows, N new rows, R rows of all texts together, D hidden size, H query heads,
G key/value heads, C head channels, S columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.model.backends.kernels.cpu import build as kernels
from headstart.model.cache.kv_cache import KVCache, KVLayer

from .attention import grouped_attention
from .fused_decoder import Layer, Lean, Norm
from .int8 import empty_digits, exact_attention
from .linear import Kind, Product
from .visibility import Visibility


class _Rows:
    """Rows in the form that a product takes or gives: see kernels/cpu/formats.h."""

    def __init__(self, values: Tensor, kind: Kind, scales: Tensor | None = None):
        self.values, self.kind, self.scales = values, kind, scales

    @staticmethod
    def empty(rows: int, width: int, kind: Kind) -> _Rows:
        if kind is Kind.DIGITS:
            digits, scales = empty_digits(rows, width)
            return _Rows(digits, kind, scales)
        return _Rows(torch.empty(rows, width, dtype=kind.dtype), kind)

    def through(self, product: Product) -> _Rows:
        if self.scales is not None:
            return _Rows(product.integers.product(self.values, self.scales), Kind.FLOAT32)
        result = product.wide(self.values).contiguous()
        return _Rows(result, Kind.of(result.dtype))

    @property
    def source(self) -> tuple[int | None, ...]:
        """As arguments to read from."""
        return self.values.data_ptr(), self.kind.value

    @property
    def room(self) -> tuple[int | None, ...]:
        """As arguments to write to."""
        scales = None if self.scales is None else self.scales.data_ptr()
        return self.values.data_ptr(), self.kind.value, scales


class Native:
    """Reads as `Lean` does, with the same weights."""

    def __init__(self, lean: Lean):
        built = kernels.functions()
        assert built is not None, "it does not suit"
        self._lean, self._c = lean, built
        # bfloat16 products are the same in a tree and alone; then a last bit of attention matters
        exact = lean.layers[0].exact or lean.dtype == torch.bfloat16
        self._attention = built.attend_exactly if exact else built.attend
        self._long_attention = exact_attention if exact else grouped_attention
        self._kind = Kind.of(lean.dtype)

    @staticmethod
    def suits(lean: Lean) -> bool:
        """Whether the functions in C can be built here, and know all that the layers do."""
        return all(one.usual for one in lean.layers) and kernels.functions() is not None

    def accepts(self, ids_BN: Tensor, cache: KVCache) -> bool:
        """As `Lean.accepts`."""
        return self._lean.accepts(ids_BN, cache)

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache,
        visibility: Visibility,
        taps: Sequence[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `Lean.forward`."""
        masks = None if visibility.all_visible else visibility.additive(torch.float32)
        lean, (batch, new) = self._lean, ids_BN.shape
        hidden_RD = lean.embed(ids_BN).float().flatten(0, 1)
        cosines, sines = lean.rotary(hidden_RD[None], position_ids=positions_BN)
        angles = cosines.contiguous(), sines.contiguous()
        read = _Read(batch, new, *angles, cache.new_columns(new))
        wide = _wide(masks, batch)
        kept: dict[int, Tensor] = {}
        first = [*(one.first for one in lean.layers), lean.norm]  # what follows each layer
        kinds = [*(one.qkv.kind for one in lean.layers), Kind.FLOAT32]
        normed = self._norm(hidden_RD, None, first[0], kinds[0])
        for index, layer in enumerate(lean.layers):
            mask = wide[layer.kind] if isinstance(masks, Mapping) else wide.get("")
            columns = cache.kv_layers[index]
            attended = self._attend(layer, normed.through(layer.qkv), read, columns, mask)
            added = attended.through(layer.out)
            normed = self._norm(hidden_RD, added, layer.second, layer.gate_up.kind)
            gated = self._gate(normed.through(layer.gate_up), layer.down)
            added = gated.through(layer.down)
            normed = self._norm(hidden_RD, added, first[index + 1], kinds[index + 1])
            if index in taps:
                kept[index] = hidden_RD.to(lean.dtype, copy=True).view(batch, new, -1)
        return normed.values.to(lean.dtype).view(batch, new, -1), kept

    def _norm(self, hidden_RD: Tensor, added: _Rows | None, norm: Norm, kind: Kind) -> _Rows:
        """Adds to the hidden rows, in place; the rows normed."""
        rows, width = hidden_RD.shape
        out = _Rows.empty(rows, width, kind)
        source = kernels.NOTHING if added is None else added.source
        self._c.residual_norm(
            rows, width, hidden_RD.data_ptr(), *source, norm.wide.data_ptr(), norm.eps, *out.room
        )
        return out

    def _attend(
        self, layer: Layer, qkv: _Rows, read: _Read, cache: KVLayer, mask_BNS: Tensor | None
    ) -> _Rows:
        heads, groups, channels = layer.heads, layer.groups, layer.channels
        rows, width = read.batch * read.new, heads * channels
        empty = torch.empty(read.batch, groups, 0, channels, dtype=self._lean.dtype)
        keys, values = cache.room(empty, empty)
        assert keys.dtype == values.dtype == empty.dtype, "the cache was filled by other means"
        place = keys.data_ptr(), values.data_ptr(), self._kind.value, *keys.stride()[:2]
        query_norm, key_norm = layer.query_norm, layer.key_norm
        queries_RD = torch.empty(rows, width)
        self._c.rotate_store(
            rows, read.new, heads, groups, channels, *qkv.source,
            None if query_norm is None else query_norm.wide.data_ptr(),
            None if key_norm is None else key_norm.wide.data_ptr(),
            0.0 if query_norm is None else query_norm.eps,
            read.cosines.data_ptr(), read.sines.data_ptr(), read.columns_BN.data_ptr(),
            *place, queries_RD.data_ptr(),
        )  # fmt: skip
        seen = cache.place.end
        if read.new > kernels.LONG:
            queries = queries_RD.view(read.batch, read.new, heads, channels).transpose(1, 2)
            mask = None if mask_BNS is None else mask_BNS[:, None]
            columns = keys[:, :, :seen].float(), values[:, :, :seen].float()
            attended = self._long_attention(queries, *columns, mask, scale=layer.scale)
            attended_RD = attended.transpose(1, 2).reshape(rows, width)
        else:
            attended_RD = torch.empty(rows, width)
            self._attention(
                read.batch, read.new, heads, groups, channels, seen, queries_RD.data_ptr(), *place,
                _pointer(mask_BNS), layer.scale, attended_RD.data_ptr(),
            )  # fmt: skip
        if layer.out.kind is Kind.FLOAT32:
            return _Rows(attended_RD, Kind.FLOAT32)
        out = _Rows.empty(rows, width, layer.out.kind)
        self._c.convert(rows, width, attended_RD.data_ptr(), *out.room)
        return out

    def _gate(self, gate_up: _Rows, following: Product) -> _Rows:
        rows, width = len(gate_up.values), gate_up.values.shape[1] // 2
        out = _Rows.empty(rows, width, following.kind)
        self._c.gate(rows, width, *gate_up.source, *out.room)
        return out


@dataclass(frozen=True)
class _Read:
    """What all layers of a read share."""

    batch: int
    new: int
    cosines: Tensor
    sines: Tensor
    columns_BN: Tensor


def _wide(masks: Mapping[str, Tensor] | Tensor | None, batch: int) -> dict[str, Tensor]:
    """Masks by kind of attention as plain numbers B x N x S; "" is for all kinds."""
    if masks is None:
        return {}
    by_kind = masks if isinstance(masks, Mapping) else {"": masks}
    return {
        kind: mask[:, 0].expand(batch, -1, -1).float().contiguous()
        for kind, mask in by_kind.items()
    }


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
