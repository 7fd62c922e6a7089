"""Faster reads of a few rows in float32 and bfloat16 on a CPU.

The matrix products of a tree have 4 to 64 rows, and there the default float32 kernel costs up to
three times as much as one with weights in a blocked layout of its own. Which is the fastest depends
on the maker of the processor, because MKL is made for Intel's (two threads, ms by default / oneDNN
/ MKL):

    rows  weights        Xeon, AVX-512        EPYC, AVX2
    1     49152 x 576    default              13.9 / 8.1 / 7.2
    8     49152 x 576    13.3 / 5.1 / 6.1     32.3 / 10.1 / 23.8
    1     576 x 576      default              0.13 / 0.11 / 0.15
    8     576 x 576      0.077 / 0.074 / 0.065    0.19 / 0.16 / 0.28

So Intel's keep the default for one row and take MKL for small weights; all others take oneDNN for
both, and up to 512 rows: all layers of SmolLM2 at once took 421 ms for 256 rows by default, 300 ms
packed (EPYC, AVX-512), in bfloat16 168 and 152 ms. Longer texts stay with the default kernel.

The packed copy is made at the first such read, beside the weights: they stay as they are, are saved
and hashed as before, and take twice the memory. Both kernels sum in float32.
"""

from __future__ import annotations

import platform
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.backends.kernels.cpu import build as kernels

from .int8 import Int8, QuantizedLinear


def _made_by_intel() -> bool:
    """Whether the processor is one that MKL is made for."""
    info = Path("/proc/cpuinfo")  # Linux; the others name the maker through Python
    return "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())


INTEL = _made_by_intel()
MOST_ROWS = 64 if INTEL else 512  # MKL is better at long texts where it is at home
HALF_ROWS = range(1, 513)  # of bfloat16: few and many in one way, so that both round alike
ROWS = range(4 if INTEL else 1, MOST_ROWS + 1)  # where packed weights won in every shape tried
PACKED = (torch.float32, torch.bfloat16)
SMALLEST = 1 << 14  # weights; below, a call costs more than it saves
MKL_BELOW = 1 << 20  # weights
MKL_LAYOUT, ONEDNN_LAYOUT = 8, 4  # rows that the layouts are made for; others work with them too


def pack_linears(model: nn.Module) -> None:
    """Let every linear layer in float32 or bfloat16 on a CPU use packed weights for a few rows."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _worth_it(module.weight):
            module.__class__ = PackedLinear


class Kind(Enum):
    """How rows are written between products. DIGITS: as whole numbers, see quantized.py."""

    FLOAT32 = kernels.FLOAT32
    BFLOAT16 = kernels.BFLOAT16
    DIGITS = kernels.DIGITS

    @staticmethod
    def of(dtype: torch.dtype) -> Kind:
        """KeyError for another type."""
        return {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16}[dtype]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self is Kind.BFLOAT16 else torch.float32


class Halves:
    """The product of bfloat16 linear layers with sums in float32, in C: the same for a row, to the
    last bit, whatever is read beside it, which libraries do not promise."""

    def __init__(self, weight_VK: Tensor, bias_V: Tensor | None):
        built = kernels.functions()
        assert built is not None and Halves.suit(weight_VK)
        self._built, (self.outputs, self.inputs) = built, weight_VK.shape
        self._bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        size = built.packed_halves(self.outputs) * self.inputs
        self._packed = torch.empty(size, dtype=torch.bfloat16)
        weight_VK = weight_VK.detach().contiguous()
        into = self._packed.data_ptr()
        built.pack_halves(self.outputs, self.inputs, weight_VK.data_ptr(), into)

    @staticmethod
    def suit(weight: Tensor) -> bool:
        """Whether they can be built here, and take such weights: inputs come in pairs."""
        known = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.shape[1] % 2 == 0
        return known and kernels.functions() is not None

    def __call__(self, hidden_RK: Tensor) -> Tensor:
        """R x V in float32."""
        hidden_RK = hidden_RK.contiguous()
        result_RV = torch.empty(*hidden_RK.shape[:-1], self.outputs)
        bias = None if self._bias_V is None else self._bias_V.data_ptr()
        self._built.multiply_halves(
            hidden_RK.numel() // self.inputs, self.outputs, self.inputs, hidden_RK.data_ptr(),
            self._packed.data_ptr(), bias, result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV


class PackedLinear(nn.Linear):
    """A linear layer with packed weights where they are faster. Made by `pack_linears`."""

    # what it was made from, and the copy
    _packed: tuple[tuple[int, int], Tensor | Halves] | None = None

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // input.shape[-1]
        suits = rows in (HALF_ROWS if self.weight.dtype == torch.bfloat16 else ROWS)
        known = input.dtype == self.weight.dtype in PACKED and input.is_cpu and suits
        if not known or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        made_from = identity(self.weight)
        if self._packed is None or self._packed[0] != made_from:
            halves = Halves.suit(self.weight)
            packed = Halves(self.weight, self.bias) if halves else _packed(self.weight)
            self._packed = made_from, packed
        packed = self._packed[1]
        if isinstance(packed, Halves):
            return packed(input).to(input.dtype)
        return _product(input, packed, self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which pack their own weights: the layouts cannot be saved."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}


class Product:
    """Linear layers that read the same input, their outputs side by side.

    Where one layout is the best for every row count they are one product of joined weights, and
    quantised layers are always. LookupError for layers that are not plain linear ones.
    """

    def __init__(self, *linears: nn.Module):
        known = (nn.Linear, PackedLinear, QuantizedLinear)
        plain = [one for one in linears if isinstance(one, nn.Linear) and type(one) in known]
        self._quantized = any(type(one) is QuantizedLinear for one in plain)
        joinable = len({(one.bias is None, type(one) is QuantizedLinear) for one in plain}) == 1
        if len(plain) != len(linears) or not joinable:
            raise LookupError("these layers are no plain linear ones")
        self._linears: list[nn.Linear] = plain
        self._joined = len(plain) > 1 and not INTEL and torch.backends.mkldnn.is_available()
        self._made_from: list[tuple[int, int]] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._int8: Int8 | None = None
        self._half: Halves | None = None
        self._whole: tuple[Tensor, Tensor | None] | None = None
        self._whole_from: list[tuple[int, int]] = []

    @property
    def kind(self) -> Kind:
        """How it takes its rows where kernels in C write them."""
        return Kind.DIGITS if self._quantized else Kind.of(self._linears[0].weight.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        if not hidden.is_cpu:
            return F.linear(hidden, *self.joined)
        return self.wide(hidden).to(hidden.dtype)

    def wide(self, hidden: Tensor) -> Tensor:
        """In float32 where the sums are."""
        if self._quantized:
            return self.integers(hidden)
        if Halves.suit(self._linears[0].weight):
            return self._halves()(hidden)
        if not self._joined:
            parts = [one.forward(hidden) for one in self._linears]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        made_from = [identity(one.weight) for one in self._linears]
        if made_from != self._made_from:
            self._made_from = made_from
            joined, self._bias = self._side_by_side()
            self._weight = torch.ops.mkldnn._reorder_linear_weight(joined, ONEDNN_LAYOUT)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._weight, self._bias, "none", [], ""
        )
        return result

    @property
    def joined(self) -> tuple[Tensor, Tensor | None]:
        """The joined weight and bias. The layers' own weights become parts of it, so that nothing
        is held twice."""
        if len(self._linears) == 1:
            return self._linears[0].weight, self._linears[0].bias
        whole, made_from = self._whole, [identity(one.weight) for one in self._linears]
        if whole is None or made_from != self._whole_from:
            self._whole = whole = self._side_by_side()
            parts = whole[0].split([len(one.weight) for one in self._linears])
            for one, part in zip(self._linears, parts, strict=True):
                one.weight.data = part
            self._whole_from = [identity(one.weight) for one in self._linears]
        return whole

    def _halves(self) -> Halves:
        made_from = [identity(one.weight) for one in self._linears]
        if self._half is None or made_from != self._made_from:
            self._made_from, self._half = made_from, Halves(*self._side_by_side())
        return self._half

    @property
    def integers(self) -> Int8:
        """Of quantised layers."""
        if self._int8 is None:
            self._int8 = Int8(*self._side_by_side())
        return self._int8

    def _side_by_side(self) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([one.weight.detach() for one in self._linears])
        biases = [one.bias.detach() for one in self._linears if one.bias is not None]
        return weight, torch.cat(biases) if biases else None


def identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor's values are replaced or written to.

    Tensors of inference mode do not count their writes, so of those only a replacement is seen.
    """
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def _packed(weight: Tensor) -> Tensor:
    result: Tensor
    if _for_mkl(weight):
        result = torch.ops.mkl._mkl_reorder_linear_weight(weight, MKL_LAYOUT)
    else:
        result = torch.ops.mkldnn._reorder_linear_weight(weight, ONEDNN_LAYOUT)
    return result


def _product(hidden: Tensor, packed: Tensor, module: nn.Linear) -> Tensor:
    result: Tensor
    weight, bias = module.weight, module.bias
    if _for_mkl(weight):
        rows = hidden.numel() // hidden.shape[-1]
        result = torch.ops.mkl._mkl_linear(hidden, packed, weight, bias, rows)
    else:
        result = torch.ops.mkldnn._linear_pointwise(hidden, packed, bias, "none", [], "")
    return result


def _for_mkl(weight: Tensor) -> bool:
    small = weight.dtype == torch.float32 and weight.numel() < MKL_BELOW
    return small and INTEL and torch.backends.mkl.is_available()


def _worth_it(weight: Tensor) -> bool:
    known = weight.device.type == "cpu" and weight.dtype in PACKED
    return known and weight.numel() >= SMALLEST
