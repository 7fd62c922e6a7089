"""Linear layers in 8-bit integers, for passes over a few positions on a CPU, where reading the
weights is what costs the time.

A weight is a whole number from -127 to 127 times a scale per output. An activation is a whole
number times a scale per token, in two levels: 63 coarse steps, each of 64 fine ones. Both levels go
through the same integer product as two rows, and on a CPU a second row costs little. One level
alone would not do; SmolLM2-135M-Instruct against float32 on 2,179 tokens of its chats:

    weights   activations          same top-1 token       KL divergence (nats)
    float32   one level            78.5 %                 0.177
    8 bits    one level            77.3 %                 0.197
    8 bits    8 bits               89.0 %                 0.050
    8 bits    two levels           96.3 %                 0.0053
    8 bits    float32              96.4 %                 0.0053

With 64 added, a level is at most 127: on processors without VNNI the kernel adds two products in 16
bits, and larger ones would not fit.

Exact stays exact. Integer sums do not depend on their order, so a token's product is the same
number alone and in a tree. Attention is not made of integers: it sums in another order over a
tree's slots, and a difference in the last bit that falls on the border between two steps becomes a
whole step in the next layer: logits of the same token differed by 0.1, and 3 of 10 responses. So it
sums in float64, where such a difference is lost when the result becomes float32: logits agree to
the last bit.

Legend: R any leading dimensions, K input width, V output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .kernels.cpu import functions
from .kernels.cpu.functions import ActivationFormat, Activations

LEVELS = 127  # of a weight, to each side
SMALLEST_SCALE = 1e-30  # of a row of zeros


def available() -> bool:
    """Whether the kernels for integer products can be built here."""
    return functions.load_kernels() is not None


def quantize_linears(module: nn.Module) -> None:
    """Replace every linear layer inside a module by one that computes in 8-bit integers."""
    replace_linears(module, QuantizedLinear)


def replace_linears(
    module: nn.Module,
    make: Callable[[nn.Linear], nn.Linear],
    wanted: Callable[[nn.Linear], bool] = lambda linear: True,
) -> None:
    """Replace linear layers inside a module, in place. Layers of a subclass stay, and so does the
    module itself.

    make: the layer in the place of another. It keeps the parameters, and so the state dict.
    """
    made: dict[nn.Linear, nn.Linear] = {}  # one module may have two places
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and wanted(child):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])


class SharedLinear(nn.Linear):
    """A linear layer with the parameters of another, that computes them in another way."""

    def __init__(self, linear: nn.Linear):
        bias = linear.bias is not None
        super().__init__(linear.in_features, linear.out_features, bias, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)


class QuantizedLinear(SharedLinear):
    """A linear layer in 8-bit integers, made at the first call. Its weights must not change.

    full_precision: whether it computes with its own weights for now.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self.full_precision = False
        self._int8: Int8 | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.full_precision:
            return super().forward(input)
        if self._int8 is None:
            self._int8 = Int8(self.weight, self.bias)
        return self._int8(input)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own integers."""
        return vars(self) | {"_int8": None}


class Int8:
    """The product of linear layers that read the same input, their outputs side by side."""

    def __init__(self, weight_VK: Tensor, bias_V: Tensor | None):
        """RuntimeError where the kernels cannot be built."""
        kernels = functions.load_kernels()
        if kernels is None:
            raise RuntimeError("Products of 8-bit integers need a C compiler.")
        self._kernels = kernels
        self.outputs, self.inputs = weight_VK.shape
        # in float64, so that the largest weight of a row is exactly the last level
        wide_VK = weight_VK.detach().double()
        scale_V1 = wide_VK.abs().amax(1, keepdim=True).clamp_min(SMALLEST_SCALE) / LEVELS
        levels_VK = (wide_VK / scale_V1).round().to(torch.int8).contiguous()
        scales_V = scale_V1[:, 0].float().contiguous()
        bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        self._packed = kernels.pack_int8(levels_VK, scales_V, bias_V)

    def __call__(self, hidden_RK: Tensor) -> Tensor:
        """R x V; each row depends on the same row of the input alone, to the last bit."""
        if hidden_RK.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "A quantised target has no gradients. Load it without quantisation to train with."
            )
        *lead, width = hidden_RK.shape
        activations = Activations(torch.Size(lead), width, ActivationFormat.INT8)
        self._kernels.convert(hidden_RK.float().contiguous(), activations)
        return self.product(activations)

    def product(self, activations: Activations) -> Tensor:
        """R x V of activations in two levels."""
        return self._kernels.multiply_int8(activations, self._packed)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within it, a quantised model computes with its float32 weights."""
    layers = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    for layer in layers:
        layer.full_precision = True
    try:
        yield
    finally:
        for layer in layers:
            layer.full_precision = False
