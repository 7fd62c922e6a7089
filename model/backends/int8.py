"""A target in 8-bit integers, for reads of a few rows on a CPU, where reading the weights is what
costs the time.

A weight is a whole number from -127 to 127 times a scale per output row. An activation is a whole
number times a scale per token, in two digits: 63 coarse steps, each of 64 fine ones. Both digits go
through the same integer product as two rows, and on a CPU a second row costs little. One digit
alone would not do; SmolLM2-135M-Instruct against float32 on 2,179 tokens of its chats:

    weights   activations          same likeliest token   divergence (nats)
    float32   one digit            78.5 %                 0.177
    8 bits    one digit            77.3 %                 0.197
    8 bits    8 bits               89.0 %                 0.050
    8 bits    two digits           96.3 %                 0.0053
    8 bits    float32              96.4 %                 0.0053

With 64 added, a digit is at most 127: on processors without VNNI the kernel adds two products in 16
bits, and larger ones would not fit.

Exact stays exact. Integer sums do not depend on their order, so a token's product is the same
number whether it is read alone or in a tree. Attention is not made of integers: it sums in another
order over a tree's columns, and a difference in the last bit that falls on the border between two
steps becomes a whole step in the next layer: logits of the same token differed by 0.1, and 3 of 10
answers. So it is computed in float64, where such a difference is lost when the result becomes
float32: logits agree to the last bit.

Legend: B batch rows, N new rows, H query heads, G key/value heads, C head channels, S columns,
R rows (any leading dimensions), K input width, V output width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headstart.model.backends.kernels.cpu import build as kernels

from .attention import grouped_attention

if TYPE_CHECKING:
    pass
LEVELS = 127  # of a weight, to each side
SMALLEST = 1e-30  # scale of a row of zeros
SHORT = kernels.LONG  # tokens of a prompt whose attention is cheap in float64


def quantize_linears(module: nn.Module) -> None:
    """Let every linear layer compute in 8-bit integers."""
    for one in module.modules():
        if type(one) is nn.Linear:
            one.__class__ = QuantizedLinear


def available() -> bool:
    """Whether products of integers can be built here."""
    return kernels.functions() is not None


class QuantizedLinear(nn.Linear):
    """A linear layer in 8-bit integers. Made by `quantize`. Its weights must not change."""

    _int8: Int8 | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self._int8 is None:
            self._int8 = Int8(self.weight, self.bias)
        return self._int8(input)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own integers."""
        return {name: value for name, value in vars(self).items() if name != "_int8"}


class Int8:
    """The product of linear layers that read the same input, their outputs side by side."""

    def __init__(self, weight_VK: Tensor, bias_V: Tensor | None):
        """RuntimeError where the functions in C cannot be built."""
        built = kernels.functions()
        if built is None:
            raise RuntimeError("Products of 8-bit integers need a C compiler.")
        self._built = built
        self.outputs, self.inputs = weight_VK.shape
        # in float64, so that the largest weight of a row is exactly the last level
        wide_VK = weight_VK.detach().double()
        scale_V1 = wide_VK.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LEVELS
        levels_VK = (wide_VK / scale_V1).round().to(torch.int8).contiguous()
        self._scales_V = scale_V1[:, 0].float()
        self._bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        columns = built.packed_outputs(self.outputs)
        self._packed = torch.empty(columns * padded(self.inputs), dtype=torch.int8)
        self._zeros = torch.empty(columns, dtype=torch.int32)
        room = self._packed.data_ptr(), self._zeros.data_ptr()
        built.pack(self.outputs, self.inputs, levels_VK.data_ptr(), *room)

    def __call__(self, hidden_RK: Tensor) -> Tensor:
        """R x V; each row depends on the same row of the input alone, to the last bit."""
        if hidden_RK.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "A quantised target has no gradients. Load it without quantisation to train with."
            )
        shape = hidden_RK.shape[:-1]
        hidden_RK = hidden_RK.reshape(-1, self.inputs).float().contiguous()
        rows = len(hidden_RK)
        digits, scales_R = empty_digits(rows, self.inputs)
        room = digits.data_ptr(), kernels.DIGITS, scales_R.data_ptr()
        self._built.convert(rows, self.inputs, hidden_RK.data_ptr(), *room)
        return self.product(digits, scales_R).view(*shape, self.outputs)

    def product(self, digits: Tensor, scales_R: Tensor) -> Tensor:
        """R x V of rows of digits."""
        rows = len(scales_R)
        result_RV = torch.empty(rows, self.outputs)
        bias = None if self._bias_V is None else self._bias_V.data_ptr()
        self._built.multiply(
            rows, self.outputs, self.inputs, digits.data_ptr(), scales_R.data_ptr(),
            self._packed.data_ptr(), self._zeros.data_ptr(), self._scales_V.data_ptr(), bias,
            result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV


def padded(width: int) -> int:
    """The length of a row of digits."""
    return -(-width // kernels.GROUP) * kernels.GROUP


def empty_digits(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Room for the digits and the scales of rows, in the order of kernels/cpu/formats.h."""
    return torch.empty(2 * rows, padded(width), dtype=torch.uint8), torch.empty(rows)


def exact_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Softmax attention B H N C, the same for a row whatever is read beside it.

    mask: boolean (True: may see) or additive, B 1 N S. None: every row sees the columns up to its
    own. A prompt that nothing is in front of is the same in plain and in tree decoding, so long
    ones stay in float32.
    """
    new, columns = queries.shape[2], keys.shape[2]
    causal = mask is None and new > 1
    assert not causal or new == columns, "nothing says which columns a row sees"
    if SHORT < new == columns:
        return grouped_attention(queries, keys, values, mask, causal, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wide = queries.double(), keys.double(), values.double()
    return grouped_attention(*wide, mask, causal, scale).to(queries.dtype)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within it, a quantised model computes with its float32 weights."""
    layers: list[nn.Module] = [one for one in model.modules() if type(one) is QuantizedLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = QuantizedLinear
