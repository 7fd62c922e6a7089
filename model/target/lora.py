"""A target that is trained jointly with its head, by low-rank adapters (LoRA, arXiv 2106.09685).

Joint training CHANGES the target. Until both are fused, the head's folder holds the adapters,

    adapter/adapter_config.json, adapter/adapter_model.safetensors      as peft writes them

and belongs to no model that exists: `headstart fuse` adds them to the target's weights, and the
result is a model of its own, with a hash of its own, whose output is kept exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .sparse_attention import indexers

ADAPTER = "adapter"  # folder of the adapters, inside that of the head
INDEXERS = r".*\bindexer\b.*"  # of sparse attention: their selection has no gradient


def adapted(model: nn.Module, rank: int, alpha: float, modules: str | Sequence[str]) -> Any:
    """Add float32 adapters to a model, in place; at first they change nothing.

    modules: names of linear layers, or "all-linear" for all but the LM head.
    Returns the peft model. ValueError where no layer has such a name, or peft is not installed.
    """
    peft = _peft()
    names = modules if isinstance(modules, str) else list(modules)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        exclude_modules=INDEXERS if indexers(model) else None,
        lora_dropout=0.0,
    )
    try:
        return peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        raise ValueError(
            f"The target has no layers to adapt (joint.modules is {modules}): {error} Name some of "
            "its linear layers, or all-linear."
        ) from error


def is_joint(folder: Path) -> bool:
    """Whether a head's folder holds adapters of its target."""
    return (folder / ADAPTER).is_dir()


@torch.no_grad()
def merge(model: nn.Module, folder: Path) -> None:
    """Add the adapters in a head's folder to the weights of their target, in place.

    ValueError when they cannot be read or fit another model.
    """
    peft = _peft()
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder / ADAPTER))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"The adapters in {folder / ADAPTER} do not fit their target: {error} A file is "
            "missing or damaged: copy the folder again."
        ) from error
    wrapped.merge_and_unload(safe_merge=True)  # raises where a value is not finite


def check_peft() -> None:
    """ValueError where peft, which joint training needs, is not installed."""
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "Training the target jointly with its head needs peft, which is not installed. Run "
            "`pip install 'headstart[cluster]'`, or leave the recipe's joint section out."
        ) from error
    return peft
