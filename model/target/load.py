"""Open a target: from a hub, a folder, a GGUF file, in parts on several processes, or by its
configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .pretrained import (
    open_pretrained,
    open_sharded,
    open_skeleton,
    open_tensor_parallel,
    open_weight_only,
)
from .quantize import check_kind
from .target import Target
from .weight_only import check_weight_only
from .weights_hash import remember, weights_hash


def load_target(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
    weight_only: str | None = None,
) -> Target:
    """Open a hub id, a model folder (a fused one too) or a .gguf file.

    dtype: "auto" is float32 on a CPU and bfloat16 on an accelerator.
    device: None is the accelerator if there is one.
    quantize: "int8" for integer products (CPU, float32); that model is then the target.
    weight_only: "int8", "float8" or "nf4", to hold its layers in less memory while heads are
        trained on it; decoding is slower then.
    Raises ValueError for what cannot be opened, with what to do instead.
    """
    check_kind(quantize)
    check_weight_only(weight_only)
    if weight_only is not None:
        if quantize is not None:
            raise ValueError("Give either quantize or weight_only: they exclude each other.")
        held = open_weight_only(str(name), dtype, device, revision, weight_only)
        return Target(*held, str(name), weight_only=weight_only)
    model, tokenizer = open_pretrained(str(name), dtype, device, revision)
    return Target(model, tokenizer, str(name), quantize)


def load_sharded_target(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device,
    revision: str | None = None,
    tensor_parallel: bool = False,
) -> Target:
    """Open a target whose layers are sharded over all processes of the run.

    All processes call this together, and `forward` too (with the same batch where the target is
    tensor-parallel). Such a target trains heads; it does not decode.
    """
    if tensor_parallel:
        model, tokenizer = open_tensor_parallel(str(name), dtype, device, revision)
        weights_hash(model)  # now, while all processes are here
    else:
        model, tokenizer, digest = open_sharded(str(name), dtype, device, revision)
        remember(model, digest)
    return Target(model, tokenizer, str(name))


def target_from_config(name: str | Path, *, revision: str | None = None) -> Target:
    """The sizes of a target, on the meta device: only its configuration is read."""
    return Target(open_skeleton(str(name), revision), "It was opened without weights.", str(name))


def wrap_target(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
) -> Target:
    """Freeze a model that is already built."""
    return Target(model, tokenizer or "None was given.", type(model).__name__, quantize)
