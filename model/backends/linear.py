"""Linear layers for passes over a few positions: packed weights on a CPU, joined weights.

The matrix products of a tree have 4 to 64 rows. On a CPU the default float32 kernel costs up to
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
packed (EPYC, AVX-512), in bfloat16 168 and 152 ms. Longer prompts stay with the default kernel.

The packed copy is made at the first such pass, beside the weights: they stay as they are, are saved
and hashed as before, and take twice the memory. Both kernels sum in float32.

Legend: R any leading dimensions, K input width, V output width.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .int8 import Int8, QuantizedLinear, SharedLinear, replace_linears
from .kernels.cpu import functions
from .kernels.cpu.functions import ActivationFormat


def _made_by_intel() -> bool:
    """Whether the processor is one that MKL is made for."""
    info = Path("/proc/cpuinfo")  # Linux; the others name the maker through Python
    return "GenuineIntel" in (info.read_text() if info.exists() else platform.processor())


INTEL = _made_by_intel()
MAX_ROWS = 64 if INTEL else 512  # MKL is better at long prompts where it is at home
BF16_ROWS = range(1, 513)  # few and many by one kernel, so that both round alike
ROWS = range(4 if INTEL else 1, MAX_ROWS + 1)  # where packed weights won in every shape tried
PACKED = (torch.float32, torch.bfloat16)
MIN_WEIGHTS = 1 << 14  # below, a call costs more than it saves
MKL_BELOW = 1 << 20  # weights
MKL_LAYOUT, ONEDNN_LAYOUT = 8, 4  # rows that the layouts are made for; others work with them too


def pack_linears(module: nn.Module) -> None:
    """Replace the linear layers in float32 and bfloat16 on a CPU inside a module by ones that use
    packed weights for a few rows. The module itself stays: see `packed`."""
    if torch.backends.mkldnn.is_available():
        replace_linears(module, PackedLinear, _worth_it)


def packed(linear: nn.Linear) -> nn.Linear:
    """A linear layer with packed weights, or the layer itself where they do not help."""
    known = type(linear) is nn.Linear and torch.backends.mkldnn.is_available()
    return PackedLinear(linear) if known and _worth_it(linear) else linear


class BF16Linear:
    """The product of bfloat16 linear layers with sums in float32, in C: the same for a row, to the
    last bit, whatever is computed beside it, which libraries do not promise."""

    def __init__(self, weight_VK: Tensor, bias_V: Tensor | None):
        kernels = functions.load_kernels()
        assert kernels is not None and BF16Linear.supports(weight_VK)
        self._kernels = kernels
        bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        self._packed = kernels.pack_bf16(weight_VK.detach().contiguous(), bias_V)

    @staticmethod
    def supports(weight: Tensor) -> bool:
        """Whether it can be built here, and takes such weights: inputs come in pairs."""
        known = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.shape[1] % 2 == 0
        return known and functions.load_kernels() is not None

    def __call__(self, hidden_RK: Tensor) -> Tensor:
        """R x V in float32."""
        return self._kernels.multiply_bf16(hidden_RK.contiguous(), self._packed)


class PackedLinear(SharedLinear):
    """A linear layer with packed weights where they are faster. Made by `pack_linears`."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        # what the copy was made from, and the copy
        self._packed: tuple[tuple[int, int], Tensor | BF16Linear] | None = None

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // input.shape[-1]
        few = rows in (BF16_ROWS if self.weight.dtype == torch.bfloat16 else ROWS)
        known = input.dtype == self.weight.dtype in PACKED and input.is_cpu and few
        if not known or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.linear(input, self.weight, self.bias)
        made_from = weight_version(self.weight)
        if self._packed is None or self._packed[0] != made_from:
            in_c = BF16Linear.supports(self.weight)
            copied = BF16Linear(self.weight, self.bias) if in_c else _packed(self.weight)
            self._packed = made_from, copied
        copied = self._packed[1]
        if isinstance(copied, BF16Linear):
            return copied(input).to(input.dtype)
        return _product(input, copied, self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which pack their own weights: the layouts cannot be saved."""
        return vars(self) | {"_packed": None}


class FusedLinear:
    """Linear layers that read the same input, their outputs side by side.

    On a CPU, where one layout is the best for every row count, they are one product of joined
    weights; quantised layers are always. On a GPU they are if `join` was called.

    linears: modules, called as they are by the reference (torch_ops.py).
    """

    def __init__(self, *linears: nn.Module):
        """LookupError for layers that are not plain linear ones."""
        known = (nn.Linear, PackedLinear, QuantizedLinear)
        plain = [one for one in linears if isinstance(one, nn.Linear) and type(one) in known]
        alike = {(one.bias is None, isinstance(one, QuantizedLinear)) for one in plain}
        if len(plain) != len(linears) or len(alike) != 1:
            raise LookupError("these layers are no plain linear ones")
        self.linears: list[nn.Linear] = plain
        self._joins = len(plain) > 1 and not INTEL and torch.backends.mkldnn.is_available()
        self._forget()

    def _forget(self) -> None:
        """Drop what was made of the weights."""
        self._format: ActivationFormat | None = None
        self._in_c = False  # whether the kernel for bfloat16 takes it
        self._made_from: list[tuple[int, int]] = []
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._int8: Int8 | None = None
        self._bf16: BF16Linear | None = None
        self._joined: tuple[Tensor, Tensor | None] | None = None
        self._joined_from: list[tuple[int, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own layouts."""
        return {name: getattr(self, name) for name in ("linears", "_joins")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    @property
    def format(self) -> ActivationFormat:
        """The format in which kernels write its input."""
        first = self.linears[0]
        if isinstance(first, QuantizedLinear):
            return ActivationFormat.FLOAT32 if first.full_precision else ActivationFormat.INT8
        if self._format is None:
            self._format = ActivationFormat.of(first.weight.dtype)
            self._in_c = BF16Linear.supports(first.weight)
        return self._format

    def __call__(self, hidden: Tensor) -> Tensor:
        """In the type of its input, on a CPU."""
        return self.wide(hidden).to(hidden.dtype)

    def wide(self, hidden: Tensor) -> Tensor:
        """In float32 where the sums are, on a CPU."""
        if self.format is ActivationFormat.INT8:
            return self.integers(hidden)
        if self._in_c:
            return self._in_bf16()(hidden)
        if not self._joins:
            parts = [one.forward(hidden) for one in self.linears]
            return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        made_from = [weight_version(one.weight) for one in self.linears]
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
        """The joined weight and bias: a copy unless `join` was called."""
        if len(self.linears) == 1:
            return self.linears[0].weight, self.linears[0].bias
        whole, made_from = self._joined, [weight_version(one.weight) for one in self.linears]
        if whole is None or made_from != self._joined_from:
            self._joined, self._joined_from = whole, _ = self._side_by_side(), made_from
        return whole

    def join(self) -> None:
        """Let the layers' own weights become parts of the joined one, so that nothing is held
        twice. Once, while a backend or a head is built."""
        if len(self.linears) == 1:
            return
        self._joined = self._side_by_side()
        parts = self._joined[0].split([len(one.weight) for one in self.linears])
        for one, part in zip(self.linears, parts, strict=True):
            one.weight.data = part
        self._joined_from = [weight_version(one.weight) for one in self.linears]

    @property
    def integers(self) -> Int8:
        """Of quantised layers."""
        if self._int8 is None:
            self._int8 = Int8(*self._side_by_side())
        return self._int8

    def _in_bf16(self) -> BF16Linear:
        made_from = [weight_version(one.weight) for one in self.linears]
        if self._bf16 is None or made_from != self._made_from:
            self._made_from, self._bf16 = made_from, BF16Linear(*self._side_by_side())
        return self._bf16

    def _side_by_side(self) -> tuple[Tensor, Tensor | None]:
        weight = torch.cat([one.weight.detach() for one in self.linears])
        biases = [one.bias.detach() for one in self.linears if one.bias is not None]
        return weight, torch.cat(biases) if biases else None


def weight_version(tensor: Tensor) -> tuple[int, int]:
    """A value that changes when a tensor's values are replaced or written to.

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


def _worth_it(linear: nn.Linear) -> bool:
    weight = linear.weight
    known = weight.device.type == "cpu" and weight.dtype in PACKED
    return known and weight.numel() >= MIN_WEIGHTS
