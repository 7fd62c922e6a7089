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
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
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


class ActivationFormat(Enum):
    """How the input of a matrix product is written. INT8: in two levels, see int8.py."""

    FLOAT32, BFLOAT16, INT8 = range(3)

    @staticmethod
    def of(dtype: torch.dtype) -> ActivationFormat:
        """ValueError for a dtype that the kernels do not know."""
        if dtype not in _FORMATS:
            raise ValueError(f"The CPU kernels take float32 and bfloat16, not {dtype}.")
        return _FORMATS[dtype]


_FORMATS = {
    torch.float32: ActivationFormat.FLOAT32,
    torch.bfloat16: ActivationFormat.BFLOAT16,
}
_CODES = {dtype: known.value for dtype, known in _FORMATS.items()}
_FLOAT32 = ActivationFormat.FLOAT32.value


@dataclass(frozen=True, slots=True)
class Activations:
    """The input of a matrix product. In int8, `values` are 2R x K levels, else they are R x K.

    shape: R and K. scales_R: of int8 alone.
    """

    values: Tensor
    format: ActivationFormat
    shape: Sequence[int]
    scales_R: Tensor | None = None

    @staticmethod
    def empty(shape: Sequence[int], to: ActivationFormat) -> Activations:
        """Room for activations."""
        if to is not ActivationFormat.INT8:
            dtype = torch.bfloat16 if to is ActivationFormat.BFLOAT16 else torch.float32
            return Activations(torch.empty(shape, dtype=dtype), to, shape)
        rows, padded = _rows(shape), -(-shape[-1] // build.GROUP) * build.GROUP
        levels = torch.empty(2 * rows, padded, dtype=torch.uint8)
        return Activations(levels, to, shape, torch.empty(rows))

    @property
    def room(self) -> tuple[int, int, int | None]:
        """The arguments of a kernel that writes them."""
        scales = None if self.scales_R is None else self.scales_R.data_ptr()
        return self.values.data_ptr(), self.format.value, scales


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
        shape, width = hidden_RD.shape, hidden_RD.shape[-1]
        added = (None, _FLOAT32) if added_RD is None else _source(added_RD, shape)
        self._c.residual_norm(
            _rows(shape), width, _float32(hidden_RD), *added, _float32(weight_D, (width,)), eps,
            *_room(out, shape),
        )  # fmt: skip

    def rotate_store(
        self,
        qkv_BNE: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        cos_sin: tuple[Tensor, Tensor],
        slots_BN: Tensor,
        keys_values: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Split into queries, keys and values, norm and rotate queries and keys, store the latter.

        norms: weights of the norms of queries and keys. cos_sin: B x N x C, float32.
        keys_values: of a cache, B x G x S x C, contiguous in their last two dimensions.
        slots_BN: where the new keys and values belong, int64. Returns the queries B x N x H x C.
        """
        keys, values = keys_values
        (batch, new, width), (_, kv_heads, _, head_dim) = qkv_BNE.shape, keys.shape
        heads = width // head_dim - 2 * kv_heads
        if (heads + 2 * kv_heads) * head_dim != width or len(keys) != batch:
            raise _mismatch("queries, keys and values", qkv_BNE, keys)
        angles = [_float32(one, (batch, new, head_dim)) for one in cos_sin]
        weights = (None, None) if norms is None else [_float32(one, (head_dim,)) for one in norms]
        queries_BNHC = torch.empty(batch, new, heads, head_dim)
        self._c.rotate_store(
            batch * new, new, heads, kv_heads, head_dim, *_source(qkv_BNE, qkv_BNE.shape),
            *weights, eps, *angles, _checked(slots_BN, torch.int64, (batch, new)),
            *_cache(keys, values), queries_BNHC.data_ptr(),
        )  # fmt: skip
        return queries_BNHC

    def attend(
        self,
        queries_BNHC: Tensor,
        keys_values: tuple[Tensor, Tensor],
        visible: int,
        mask_BNS: Tensor | None,
        scale: float,
        exact: bool = False,
    ) -> Tensor:
        """Softmax attention B x N x H x C over the first `visible` slots of a cache.

        mask_BNS: additive, float32; None where all of them are visible.
        exact: with sums in float64, so that a position does not depend on what is beside it.
        """
        keys, values = keys_values
        batch, new, heads, head_dim = queries_BNHC.shape
        if keys.shape[0] != batch or keys.shape[3] != head_dim or visible > keys.shape[2]:
            raise _mismatch("queries and keys", queries_BNHC, keys)
        mask = None if mask_BNS is None else _float32(mask_BNS, (batch, new, visible))
        out_BNHC = torch.empty(queries_BNHC.shape)
        (self._c.attend_exactly if exact else self._c.attend)(
            batch, new, heads, keys.shape[1], head_dim, visible, _float32(queries_BNHC),
            *_cache(keys, values), mask, scale, out_BNHC.data_ptr(),
        )  # fmt: skip
        return out_BNHC

    def gate(self, gate_up_RF: Tensor, out: Activations) -> None:
        """SiLU of the first half times the second half."""
        *lead, both = shape = gate_up_RF.shape
        where = _room(out, (*lead, both // 2))
        self._c.gate(_rows(shape), both // 2, *_source(gate_up_RF, shape), *where)

    def convert(self, values_RK: Tensor, out: Activations) -> None:
        """Write float32 values in the format of a product's input."""
        shape = values_RK.shape
        self._c.convert(_rows(shape), shape[-1], _float32(values_RK), *_room(out, shape))

    def pack_int8(self, levels_VK: Tensor) -> tuple[Tensor, Tensor]:
        """Lay out int8 weights for `multiply_int8`: the packed levels, and their sums."""
        outputs, inputs = levels_VK.shape
        columns = self._c.int8_padded_outputs(outputs)
        padded = -(-inputs // build.GROUP) * build.GROUP
        packed = torch.empty(columns * padded, dtype=torch.int8)
        zeros = torch.empty(columns, dtype=torch.int32)
        levels = _checked(levels_VK, torch.int8, levels_VK.shape)
        self._c.pack_int8(outputs, inputs, levels, packed.data_ptr(), zeros.data_ptr())
        return packed, zeros

    def multiply_int8(
        self,
        activations: Activations,
        packed: tuple[Tensor, Tensor],
        scales_V: Tensor,
        bias_V: Tensor | None,
    ) -> Tensor:
        """R x V of activations in int8 and weights from `pack_int8`, float32."""
        *lead, inputs = activations.shape
        outputs, rows = len(scales_V), _rows(activations.shape)
        padded = -(-inputs // build.GROUP) * build.GROUP
        if len(packed[0]) != self._c.int8_padded_outputs(outputs) * padded:
            raise ValueError(f"Weights for {outputs} outputs do not fit {inputs} inputs.")
        result_RV, levels = torch.empty(*lead, outputs), activations.values
        assert activations.scales_R is not None, "activations are not in int8"
        self._c.multiply_int8(
            rows, outputs, inputs, _checked(levels, torch.uint8, (2 * rows, padded)),
            _float32(activations.scales_R, (rows,)), packed[0].data_ptr(), packed[1].data_ptr(),
            _float32(scales_V), None if bias_V is None else _float32(bias_V, (outputs,)),
            result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV

    def pack_bf16(self, weight_VK: Tensor) -> Tensor:
        """Lay out bfloat16 weights for `multiply_bf16`."""
        outputs, inputs = weight_VK.shape
        if inputs % 2:
            raise ValueError(f"The kernel for bfloat16 takes pairs of inputs, not {inputs}.")
        size = self._c.bf16_padded_outputs(outputs) * inputs
        packed = torch.empty(size, dtype=torch.bfloat16)
        weight = _checked(weight_VK, torch.bfloat16, weight_VK.shape)
        self._c.pack_bf16(outputs, inputs, weight, packed.data_ptr())
        return packed

    def multiply_bf16(
        self, hidden_RK: Tensor, packed: Tensor, outputs: int, bias_V: Tensor | None
    ) -> Tensor:
        """R x V of bfloat16 values and weights from `pack_bf16`, float32."""
        *lead, inputs = hidden_RK.shape
        if len(packed) != self._c.bf16_padded_outputs(outputs) * inputs:
            raise ValueError(f"Weights for {outputs} outputs do not fit {inputs} inputs.")
        result_RV = torch.empty(*lead, outputs)
        self._c.multiply_bf16(
            _rows(hidden_RK.shape), outputs, inputs,
            _checked(hidden_RK, torch.bfloat16, hidden_RK.shape), packed.data_ptr(),
            None if bias_V is None else _float32(bias_V, (outputs,)), result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV

    def argmax(self, scores_RV: Tensor) -> Tensor:
        """The index of each row's largest score, the first of equals; a NaN is never it."""
        *lead, width = scores_RV.shape
        index_R = torch.empty(lead, dtype=torch.int64)
        self._c.argmax(index_R.numel(), width, _float32(scores_RV), index_R.data_ptr())
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


def _rows(shape: Sequence[int]) -> int:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return rows


def _checked(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """The pointer of a tensor that a kernel can read."""
    known = tensor.dtype is dtype and tensor.is_contiguous() and tensor.is_cpu
    if not known or tensor.shape != shape:
        raise ValueError(
            f"A CPU kernel was given {tensor.dtype} on {tensor.device} of shape "
            f"{tuple(tensor.shape)} and strides {tensor.stride()}, but takes contiguous {dtype} on "
            f"the CPU of shape {tuple(shape)}. A head that was opened for decoding keeps to the "
            "target it was opened for: load it again for another."
        )
    return tensor.data_ptr()


def _float32(tensor: Tensor, shape: Sequence[int] | None = None) -> int:
    return _checked(tensor, torch.float32, tensor.shape if shape is None else shape)


def _source(values: Tensor, shape: Sequence[int]) -> tuple[int, int]:
    """The arguments of a kernel that reads float32 or bfloat16."""
    dtype = values.dtype if values.dtype is torch.bfloat16 else torch.float32
    return _checked(values, dtype, shape), _CODES[dtype]


def _room(out: Activations, shape: Sequence[int]) -> tuple[int, int, int | None]:
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"Room for {tuple(out.shape)} does not fit {tuple(shape)}.")
    return out.room


def _cache(keys: Tensor, values: Tensor) -> tuple[int, int, int, int, int]:
    """The arguments of a kernel that reads or writes keys and values of a cache."""
    inner = keys.shape[3], 1
    alike = keys.shape == values.shape and keys.stride() == values.stride()
    known = alike and keys.stride()[2:] == inner and keys.dtype is values.dtype
    if not known or keys.dtype not in _CODES or not keys.is_cpu:
        raise _mismatch("keys and values", keys, values)
    code = _CODES[keys.dtype]
    return keys.data_ptr(), values.data_ptr(), code, keys.stride(0), keys.stride(1)


def _mismatch(what: str, one: Tensor, other: Tensor) -> ValueError:
    shapes = [f"{each.dtype} {tuple(each.shape)} {each.stride()}" for each in (one, other)]
    return ValueError(f"CPU kernels do not take such {what}: {' and '.join(shapes)}.")
