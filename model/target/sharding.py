"""A frozen target whose layers are sharded over several processes, because no accelerator holds it.

Sharded (torch's `fully_shard`): a layer is gathered just before it runs and freed right behind it.
Only rank 0 reads files; the other ranks receive their shards from it.
Tensor-parallel (transformers' plan for the family): a layer stays sharded, and each rank computes
its part of the products, so all are given the same batch. Each rank reads its part of the files.
Embedding and LM head, which heads use directly, are replicated either way.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

Made = TypeVar("Made")
TIMEOUT = timedelta(hours=6)  # for loading a large model, decoding many prompts
REPLICATED = "replicated_with_grad_allreduce"  # transformers' name of a rule without sharding


def is_sharded(model: nn.Module) -> bool:
    """Whether some of its weights are sharded over several processes."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether each process computes a part of every layer, so that all need the same batch."""
    return int(getattr(model, "_tp_size", None) or 1) > 1


def tensor_plan(skeleton: PreTrainedModel, name: str) -> DistributedConfig:
    """How transformers shards the layers of this model. ValueError where it cannot.

    skeleton: on the meta device.
    """
    count = dist.get_world_size()
    ends = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    replicated = [path for path, module in skeleton.named_modules() if module in ends]
    plan = {path: style for path, style in skeleton.tp_plan.items() if path not in replicated}
    kind = skeleton.config.model_type
    instead = "Set parallel.target=sharded, which works for every family."
    if not plan:
        raise ValueError(
            f"{name} ({kind}): transformers has no tensor-parallel plan for this family. {instead}"
        )
    config = skeleton.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    by_heads = any(style == "colwise" and "att" in path for path, style in plan.items())
    if by_heads and (heads % count or kv_heads % count):
        raise ValueError(
            f"{name} has {heads} attention heads and {kv_heads} of keys and values, which {count} "
            f"processes cannot share evenly. Start a number of them that divides both. {instead}"
        )
    # Replicated by name: without a rule of ours, one of the family may apply.
    return DistributedConfig(tp_size=count, tp_plan=plan | dict.fromkeys(replicated, REPLICATED))


def full_tensor(value: Tensor) -> Tensor:
    """Gather a sharded tensor, in all processes together. Return others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@cache
def long_timeout_group() -> dist.ProcessGroup:
    """All processes, for exchanges in which the others wait while rank 0 works alone.

    A process that dies ends the wait: gloo notices that its connection is closed.
    """
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def local_tensor(value: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def broadcast_from_rank0(make: Callable[[], Made]) -> Made:
    """Call `make` in rank 0 and return its result in every process, or raise its ValueError."""
    sent: list[object] = [None, None]
    device = torch.device("cpu")
    if dist.get_rank() == 0:
        try:
            sent[0] = make()
        except ValueError as error:
            sent[1] = str(error)
    dist.broadcast_object_list(sent, src=0, group=long_timeout_group(), device=device)
    if sent[1] is not None:
        raise ValueError(sent[1])
    made: Made = sent[0]  # type: ignore[assignment]
    return made


def shard(
    skeleton: nn.Module,
    decoder: nn.Module,
    layers: list[nn.Module],
    weights: dict[str, Tensor] | None,
    device: torch.device,
) -> None:
    """Shard a model on the meta device and fill it, in place.

    weights: its parameters and buffers by name, in rank 0. The device holds one full tensor at a
        time.
    """
    skeleton.requires_grad_(False)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = {weight for layer in layers for weight in layer.parameters()}
    others = {weight for weight in decoder.parameters() if weight not in inside}
    fully_shard(decoder, mesh=mesh, ignored_params=others)  # so that layers are fetched ahead
    skeleton.to_empty(device=device)
    skeleton.tie_weights()  # type: ignore[operator]
    for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()]:
        _fill(tensor, None if weights is None else weights[name], device)


@torch.no_grad()
def _fill(tensor: Tensor, given: Tensor | None, device: torch.device) -> None:
    value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if given is not None:
        value.copy_(given)
    if isinstance(tensor, DTensor):
        part = distribute_tensor(value, tensor.device_mesh, tensor.placements)
        tensor.to_local().copy_(part.to_local())
    else:
        dist.broadcast(value, src=0)
        tensor.copy_(value)
