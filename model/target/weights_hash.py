"""A hash of a target's weights, which ties a head to the target that it was trained on."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .sharding import full_tensor, is_sharded, local_tensor

if TYPE_CHECKING:
    from .target import Target

_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def target_hash(target: Target) -> str:
    """`weights_hash` of a target: it is frozen, so the hash is computed once."""
    return weights_hash(target.model)


def weights_hash(model: nn.Module) -> str:
    """sha256 of a frozen model's weights, whatever file and precision they came from.

    Hashed in order of name, tied tensors once: the name, the shape, and the sha256 of the values
    rounded to bfloat16 (integers as they are). So float32 and bfloat16 copies, shards and a GGUF
    file saved as a folder agree; float16 may not (its range is smaller).
    Processes that share a sharded model call this together.
    """
    if model not in _hashes:
        tensors = _distinct(model.state_dict())
        # Shards are gathered from all processes, one tensor after the other.
        with ThreadPoolExecutor(1 if is_sharded(model) else None) as pool:
            digests = pool.map(_digest, tensors.values())
            lines = [
                f"{name} {list(tensor.shape)} {digest}\n"
                for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
            ]
        _hashes[model] = hashlib.sha256("".join(lines).encode()).hexdigest()
    return _hashes[model]


def remember(model: nn.Module, digest: str) -> None:
    """Set the hash of a model whose weights are not all in this process."""
    _hashes[model] = digest


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors sorted by name; of tied ones only the first."""
    storages: set[tuple[int, torch.Size]] = set()
    distinct: dict[str, Tensor] = {}
    for name in sorted(state):
        storage = (local_tensor(state[name]).data_ptr(), state[name].shape)
        if storage not in storages:
            storages.add(storage)
            distinct[name] = state[name]
    return distinct


def _digest(tensor: Tensor) -> str:
    values = full_tensor(tensor)
    values = values.to(torch.bfloat16) if values.is_floating_point() else values
    flat = values.cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()
