"""The kernels in C, as functions of tensors: the only file that knows their pointers.

Every function checks dtype, shape and contiguity of what it hands over, and raises ValueError for
what the kernels do not know. See the files in C beside this one for how they compute.

Legend: R any leading dimensions, D width, E width of queries, keys and values joined, F inner size
of an MLP, B sequences, N new positions, H query heads, G key/value heads, C head dimension,
S cache slots, K inputs, V outputs.
"""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import build

_N, _P, _K, _D = ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_double
_ATTEND = [*[_N] * 6, *[_P] * 3, _K, _N, _N, _P, _D, _P]
SIGNATURES: dict[str, list[Any]] = {
    "residual_norm": [_N, _N, _P, _P, _K, _P, _D, _P, _K, _P],
    "rotate_store": [*[_N] * 5, _P, _K, _P, _P, _D, *[_P] * 5, _K, _N, _N, _P],
    "attend": _ATTEND,
    "attend_exactly": _ATTEND,
    "gate": [_N, _N, _P, _K, _P, _K, _P],
    "convert": [_N, _N, _P, _P, _K, _P],
    "pack_int8": [_N, _N, _P, _P, _P],
    "multiply_int8": [_N, _N, _N, *[_P] * 7],
    "pack_bf16": [_N, _N, _P, _P],
    "multiply_bf16": [_N, _N, _N, *[_P] * 4],
    "argmax": [_N, _N, _P, _P],
}
SIZES = ("int8_padded_outputs", "bf16_padded_outputs")  # what returns a number


class ActivationFormat(IntEnum):
    """How the input of a matrix product is written. INT8: in two levels, see int8.py."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2

    @staticmethod
    def of(dtype: torch.dtype) -> ActivationFormat:
        """ValueError for a dtype that the kernels do not know."""
        known = _FORMATS.get(dtype)
        if known is None:
            raise ValueError(f"The CPU kernels take float32 and bfloat16, not {dtype}.")
        return known


_FORMATS = {
    torch.float32: ActivationFormat.FLOAT32,
    torch.bfloat16: ActivationFormat.BFLOAT16,
}
_INT8 = ActivationFormat.INT8
_CODES = {dtype: int(known) for dtype, known in _FORMATS.items()}
_FLOAT32 = 0


class Activations:
    """The input of a matrix product: `values` are R x K, and 2R x K levels in int8.

    lead: R. width: K. scales_R: of int8 alone.
    """

    __slots__ = ("format", "lead", "scales_R", "values", "width")

    def __init__(self, lead: torch.Size, width: int, to: ActivationFormat):
        """Room for activations."""
        self.lead, self.width, self.format = lead, width, to
        self.scales_R: Tensor | None = None
        if to is _INT8:
            rows, padded = lead.numel(), -(-width // build.GROUP) * build.GROUP
            self.values = torch.empty(2 * rows, padded, dtype=torch.uint8)
            self.scales_R = torch.empty(rows)
        else:
            dtype = torch.float32 if to == _FLOAT32 else torch.bfloat16
            self.values = torch.empty((*lead, width), dtype=dtype)

    @property
    def room(self) -> tuple[int, int, int | None]:
        """The arguments of a kernel that writes them."""
        scales = self.scales_R
        return self.values.data_ptr(), self.format, None if scales is None else scales.data_ptr()


class KeysValues:
    """Keys and values of one layer of a cache, B x G x S x C, as the kernels read and write them.

    Made anew for each pass, as a cache may grow.
    """

    __slots__ = ("arguments", "keys", "shape", "values")

    def __init__(self, keys: Tensor, values: Tensor):
        """ValueError if their last two dimensions are not contiguous, or if they differ."""
        strides, code, shape = keys.stride(), _CODES.get(keys.dtype), keys.shape
        known = strides[3] == 1 and strides[2] == shape[3] and keys.is_cpu and values.is_cpu
        alike = values.stride() == strides and values.shape == shape and keys.dtype is values.dtype
        if not known or not alike or code is None:
            raise _mismatch("keys and values", keys, values)
        self.keys, self.values, self.shape = keys, values, shape
        self.arguments = keys.data_ptr(), values.data_ptr(), code, strides[0], strides[1]


class PackedWeights:
    """Weights V x K in the layout of a kernel, with what belongs to each output."""

    __slots__ = ("inputs", "outputs", "pointers", "tensors")

    def __init__(self, outputs: int, inputs: int, *tensors: Tensor | None):
        """tensors: as the kernel takes them. They are checked by who packs them."""
        self.outputs, self.inputs, self.tensors = outputs, inputs, tensors
        self.pointers = tuple(None if one is None else one.data_ptr() for one in tensors)


class CpuKernels:
    """The kernels of a library that was built for this machine."""

    def __init__(self, library: ctypes.CDLL):
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        for name in SIZES:
            getattr(library, name).argtypes, getattr(library, name).restype = [_N], _N
        self._c = library

    def residual_norm(
        self,
        hidden_RD: Tensor,
        added_RD: Tensor | None,
        weight_D: Tensor,
        eps: float,
        out: Activations,
    ) -> None:
        """Add to the hidden states, in place; write their root mean square norm."""
        width, size = out.width, hidden_RD.numel()
        rows = size // width
        if hidden_RD.shape[-1] != width or rows != out.lead.numel():
            raise _no_room(hidden_RD, out)
        added, code = (None, _FLOAT32) if added_RD is None else _source(added_RD, size)
        self._c.residual_norm(
            rows, width, _float32(hidden_RD, size), added, code, _float32(weight_D, width), eps,
            *out.room,
        )  # fmt: skip

    def rotate_store(
        self,
        qkv_RE: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cos_sin: tuple[Tensor, Tensor],
        slots_BN: Tensor,
        cache: KeysValues,
    ) -> Tensor:
        """Split into queries, keys and values, norm and rotate queries and keys, store the latter.

        qkv_RE: R is B x N, or both in one dimension.
        norms: weights of the norms of queries and keys. cos_sin: B x N x C, float32.
        slots_BN: where the new keys and values belong, int64. Returns the queries B x N x H x C.
        """
        (batch, new), width = slots_BN.shape, qkv_RE.shape[-1]
        cache_batch, kv_heads, _, head_dim = cache.shape
        heads = width // head_dim - 2 * kv_heads
        if (heads + 2 * kv_heads) * head_dim != width or cache_batch != batch:
            raise _mismatch("queries, keys and values", qkv_RE, cache.keys)
        rows, (cos, sin) = batch * new, cos_sin
        query_norm, key_norm = (None, None) if norms is None else norms
        queries_BNHC = torch.empty(batch, new, heads, head_dim)
        self._c.rotate_store(
            rows, new, heads, kv_heads, head_dim, *_source(qkv_RE, rows * width),
            None if query_norm is None else _float32(query_norm, head_dim),
            None if key_norm is None else _float32(key_norm, head_dim), eps,
            _float32(cos, rows * head_dim), _float32(sin, rows * head_dim),
            _checked(slots_BN, torch.int64, rows), *cache.arguments, queries_BNHC.data_ptr(),
        )  # fmt: skip
        return queries_BNHC

    def attend(
        self,
        queries_BNHC: Tensor,
        cache: KeysValues,
        visible: int,
        mask_BNS: Tensor | None,
        scale: float,
        out_RE: Tensor,
        exact: bool = False,
    ) -> Tensor:
        """Softmax attention over the first `visible` slots of a cache.

        mask_BNS: additive, float32; None where all of them are visible.
        exact: with sums in float64, so that a position does not depend on what is beside it.
        out_RE: room for the result, B x N x H x C in any shape. Returned.
        """
        batch, new, heads, head_dim = queries_BNHC.shape
        cache_batch, kv_heads, slots, cache_dim = cache.shape
        if cache_batch != batch or cache_dim != head_dim or visible > slots:
            raise _mismatch("queries and keys", queries_BNHC, cache.keys)
        mask = None if mask_BNS is None else _float32(mask_BNS, batch * new * visible)
        size = batch * new * heads * head_dim
        (self._c.attend_exactly if exact else self._c.attend)(
            batch, new, heads, kv_heads, head_dim, visible,
            _float32(queries_BNHC, size), *cache.arguments, mask, scale,
            _float32(out_RE, size),
        )  # fmt: skip
        return out_RE

    def gate(self, gate_up_RF: Tensor, out: Activations) -> None:
        """SiLU of the first half times the second half."""
        width, rows = out.width, out.lead.numel()
        if gate_up_RF.shape[-1] != 2 * width:
            raise _no_room(gate_up_RF, out)
        self._c.gate(rows, width, *_source(gate_up_RF, 2 * rows * width), *out.room)

    def convert(self, values_RK: Tensor, out: Activations) -> None:
        """Write float32 values in the format of a product's input."""
        width, rows = out.width, out.lead.numel()
        if values_RK.shape[-1] != width:
            raise _no_room(values_RK, out)
        self._c.convert(rows, width, _float32(values_RK, rows * width), *out.room)

    def pack_int8(
        self, levels_VK: Tensor, scales_V: Tensor, bias_V: Tensor | None
    ) -> PackedWeights:
        """Lay out int8 weights for `multiply_int8`. scales_V, bias_V: of the outputs, float32."""
        outputs, inputs = levels_VK.shape
        columns = self._c.int8_padded_outputs(outputs)
        padded = -(-inputs // build.GROUP) * build.GROUP
        packed = torch.empty(columns * padded, dtype=torch.int8)
        zeros = torch.empty(columns, dtype=torch.int32)
        for one in (scales_V,) if bias_V is None else (scales_V, bias_V):
            _float32(one, outputs)
        levels = _checked(levels_VK, torch.int8, outputs * inputs)
        self._c.pack_int8(outputs, inputs, levels, packed.data_ptr(), zeros.data_ptr())
        return PackedWeights(outputs, inputs, packed, zeros, scales_V, bias_V)

    def multiply_int8(self, activations: Activations, weights: PackedWeights) -> Tensor:
        """R x V of activations in int8 and weights from `pack_int8`, float32."""
        inputs, outputs, scales_R = activations.width, weights.outputs, activations.scales_R
        if inputs != weights.inputs or scales_R is None:
            raise ValueError(f"{inputs} inputs do not fit int8 weights for {weights.inputs}.")
        lead = activations.lead
        result_RV = torch.empty((*lead, outputs))
        self._c.multiply_int8(
            lead.numel(), outputs, inputs, activations.values.data_ptr(), scales_R.data_ptr(),
            *weights.pointers, result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV

    def pack_bf16(self, weight_VK: Tensor, bias_V: Tensor | None) -> PackedWeights:
        """Lay out bfloat16 weights for `multiply_bf16`. bias_V: float32."""
        outputs, inputs = weight_VK.shape
        if inputs % 2:
            raise ValueError(f"The kernel for bfloat16 takes pairs of inputs, not {inputs}.")
        size = self._c.bf16_padded_outputs(outputs) * inputs
        packed = torch.empty(size, dtype=torch.bfloat16)
        if bias_V is not None:
            _float32(bias_V, outputs)
        weight = _checked(weight_VK, torch.bfloat16, outputs * inputs)
        self._c.pack_bf16(outputs, inputs, weight, packed.data_ptr())
        return PackedWeights(outputs, inputs, packed, bias_V)

    def multiply_bf16(self, hidden_RK: Tensor, weights: PackedWeights) -> Tensor:
        """R x V of bfloat16 values and weights from `pack_bf16`, float32."""
        *lead, inputs = hidden_RK.shape
        outputs, size = weights.outputs, hidden_RK.numel()
        if inputs != weights.inputs:
            raise ValueError(f"{inputs} inputs do not fit weights for {weights.inputs}.")
        result_RV = torch.empty(*lead, outputs)
        self._c.multiply_bf16(
            size // inputs, outputs, inputs, _checked(hidden_RK, torch.bfloat16, size),
            *weights.pointers, result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV

    def argmax(self, scores_RV: Tensor) -> Tensor:
        """The index of each row's largest score, the first of equals; a NaN is never it."""
        *lead, width = scores_RV.shape
        index_R = torch.empty(lead, dtype=torch.int64)
        scores = _float32(scores_RV, scores_RV.numel())
        self._c.argmax(index_R.numel(), width, scores, index_R.data_ptr())
        return index_R


@cache
def load_kernels() -> CpuKernels | None:
    """The kernels in C. None, with a warning, where they cannot be built."""
    try:
        return CpuKernels(build.open_library())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            "Steps and drafts on this CPU take two to three times as long, because the kernels in "
            f"C cannot be built: {error} Install a C compiler (gcc or clang), or name one in the "
            "variable CC.",
            stacklevel=2,
        )
        return None


def _checked(tensor: Tensor, dtype: torch.dtype, size: int) -> int:
    """The pointer of a tensor that a kernel can read. On the hot path: some 20 calls per layer."""
    known = tensor.dtype is dtype and tensor.is_contiguous() and tensor.is_cpu
    if not known or tensor.numel() != size:
        raise ValueError(
            f"A CPU kernel was given {tensor.dtype} on {tensor.device} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}, but takes contiguous {dtype} on "
            f"the CPU with {size} values. A head that was opened for decoding keeps to the target "
            "it was opened for: load it again for another."
        )
    return tensor.data_ptr()


def _float32(tensor: Tensor, size: int) -> int:
    return _checked(tensor, torch.float32, size)


def _source(values: Tensor, size: int) -> tuple[int, int]:
    """The arguments of a kernel that reads float32 or bfloat16."""
    if values.dtype is torch.bfloat16:
        return _checked(values, torch.bfloat16, size), 1
    return _checked(values, torch.float32, size), 0


def _no_room(given: Tensor, out: Activations) -> ValueError:
    room = (*out.lead, out.width)
    return ValueError(f"What is made of {tuple(given.shape)} does not fit {room}.")


def _mismatch(what: str, one: Tensor, other: Tensor) -> ValueError:
    shapes = [f"{each.dtype} {tuple(each.shape)} {each.stride()}" for each in (one, other)]
    return ValueError(f"CPU kernels do not take such {what}: {' and '.join(shapes)}.")
