"""Which operations a device has, and whether a target's layers are computed with them.

`select_ops` chooses the operations, once per device. `select_backend` decides whether a decoder is
computed by `FusedDecoder` instead of its own modules: if it has the parts of a Llama, and computes
the same on a probe (probe.py). No family is known by name.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig

from . import cuda_ops
from .cpu_ops import cpu_ops
from .cuda_ops import TritonOps
from .fused_decoder import FusedDecoder
from .int8 import full_precision
from .kernels.cpu import build, functions
from .linear import pack_linears
from .probe import NOT_ALIKE, Probe, widened_decoder
from .torch_ops import TORCH_OPS, TorchOps
from .visibility import AttentionWindows

# Largest error of a probe's outputs, by their norm. The layers are probed in float32; the kernels
# of a CPU in their own dtype, in which they round as they will.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_ops(device: torch.device) -> TorchOps:
    """The operations of a device: the reference where no kernels can be built."""
    if device.type == "cuda":
        return cuda_ops.triton_ops(device)
    return cpu_ops() if device.type == "cpu" else TORCH_OPS


def kernel_hash(device: torch.device) -> str | None:
    """Hash of the kernels that a device uses; None where it uses none."""
    if device.type == "cuda":
        return None if cuda_ops.load_kernels(device) is None else cuda_ops.kernel_hash()
    in_c = device.type == "cpu" and functions.load_kernels() is not None
    return build.kernel_hash() if in_c else None


def select_backend(
    decoder: nn.Module, layers: nn.ModuleList, config: PretrainedConfig, windows: AttentionWindows
) -> FusedDecoder | None:
    """Choose how a decoder's layers are computed. None: by its own modules.

    On a CPU, its linear layers are packed if it qualifies.
    """
    weight = next(decoder.parameters())
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    ops = select_ops(weight.device)
    try:
        if isinstance(ops, TritonOps):
            return _on_a_gpu(decoder, layers, kinds, config, windows, ops)
        if weight.is_cpu and weight.dtype in TOLERANCE:
            return _on_a_cpu(decoder, layers, kinds, config, windows, ops)
    except NOT_ALIKE:
        return None  # other parts, or parts that work together in another way
    return None


def _on_a_cpu(
    decoder: nn.Module,
    layers: nn.ModuleList,
    kinds: list[str],
    config: PretrainedConfig,
    windows: AttentionWindows,
    ops: TorchOps,
) -> FusedDecoder | None:
    with full_precision(decoder):  # in integers, the last bit of an input can be a whole step
        probe = Probe(decoder, config, windows)
        reference = FusedDecoder(decoder, layers, kinds, TORCH_OPS)
        wide = widened_decoder(decoder, layers, kinds, TORCH_OPS)
        if not probe.agrees(wide, TOLERANCE[torch.float32]):
            return None
        known = all(layer.is_plain for layer in reference.layers)
        fused = FusedDecoder(decoder, layers, kinds, ops)
        if not known or not probe.agrees(fused, TOLERANCE[reference.dtype]):
            ops = TORCH_OPS
    pack_linears(decoder)  # after the probes, which would pack what they widen
    return FusedDecoder(decoder, layers, kinds, ops).prepare()


def _on_a_gpu(
    decoder: nn.Module,
    layers: nn.ModuleList,
    kinds: list[str],
    config: PretrainedConfig,
    windows: AttentionWindows,
    ops: TritonOps,
) -> FusedDecoder | None:
    alike = {(one.device, one.dtype) for one in decoder.parameters()}
    dtype = next(decoder.parameters()).dtype
    if len(alike) > 1 or dtype not in GPU_DTYPES or not windows.full_only:
        return None
    probe, fused = Probe(decoder, config, windows), FusedDecoder(decoder, layers, kinds, ops)
    if not all(layer.is_plain for layer in fused.layers):
        return None
    wide = widened_decoder(decoder, layers, kinds, ops)
    try:
        agrees = probe.agrees(wide, TOLERANCE[torch.float32])
    except NOT_ALIKE:
        raise
    except Exception as error:  # a GPU may be too small for a kernel: Triton's own errors
        raise LookupError("the kernels cannot be used for this model") from error
    return fused.prepare() if agrees else None
