"""A frozen target whose layers are stored in 8 or 4 bits while heads are trained on it, by torchao.

Each product dequantises its weight to the target's own type first. Embedding, norms and LM head,
which heads use directly, stay as they are. Unlike in quantize.py, activations are not rounded, and
it runs wherever torch does.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["int8", "float8", "nf4"]
BITS: dict[Kind, float] = {"int8": 8, "float8": 8, "nf4": 4.2}  # bits per weight, with its scales
BLOCK, SCALES = 64, 256  # nf4: weights that share a scale, and scales that are quantised together
MIN_SHARE = 0.9  # of a layer's weights: where fewer can be quantised, little memory is saved


def check_weight_only(kind: str | None) -> None:
    """ValueError for a kind that does not exist, and where torchao is not installed."""
    if kind is None:
        return
    if kind not in get_args(Kind):
        raise ValueError(f"Unknown quantisation {kind!r}. There are: {', '.join(get_args(Kind))}.")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"target.quantize is {kind}, but torchao is not installed. Run `pip install "
            "'headstart[cluster]'`, or leave target.quantize out."
        )


@torch.no_grad()
def quantize_layers(layers: nn.ModuleList, kind: str, device: torch.device, name: str) -> None:
    """Quantise the matrices of a model's layers in place, on `device`, one at a time.

    ValueError, before anything is changed, where that would save little or a matrix has odd sizes.
    """
    matrices = [module for module in layers.modules() if isinstance(module, nn.Linear)]
    quantizable = sum(one.weight.numel() for one in matrices)
    total = sum(one.numel() for one in layers.parameters())
    if quantizable < MIN_SHARE * total:
        raise ValueError(
            f"Only {quantizable / total:.0%} of the weights in the layers of {name} are in linear "
            "layers, the only ones that target.quantize works on (experts often are not). Leave "
            "target.quantize out, or shard the target with parallel.target."
        )
    odd = [one for one in matrices if kind == "nf4" and one.weight.numel() % BLOCK]
    if odd:
        raise ValueError(
            f"{name} has a matrix of {list(odd[0].weight.shape)} numbers, which blocks of {BLOCK} "
            "do not divide. Set target.quantize to float8 or int8."
        )
    for module in matrices:
        _quantize(module.to(device), kind)


def _quantize(module: nn.Linear, kind: str) -> None:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
        to_nf4,
    )

    if kind == "nf4":
        scales = math.gcd(module.weight.numel() // BLOCK, SCALES)
        weight = to_nf4(module.weight.detach(), BLOCK, scales)
        module.weight = nn.Parameter(weight, requires_grad=False)
    else:
        config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]
        quantize_(module, config(set_inductor_config=False))


def dequantized(weight: Tensor) -> Tensor:
    """A weight in the target's own type, whatever it is stored in."""
    for back in ("get_original_weight", "dequantize"):
        if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, back):
            value: Tensor = getattr(weight, back)()
            return value
    return weight
