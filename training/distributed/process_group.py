"""The processes that train together: rank, collective operations, DDP."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from headstart.model.target.sharding import long_timeout_group

from .launcher import LAUNCHED_FOR, world_size

# Ranks do the same work at the same time, so a collective operation that takes longer has lost a
# rank on another machine.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class WorkerGroup:
    """One or more processes that train the same head on the same target.

    Started by `torchrun` or `accelerate launch`, otherwise one alone. The recipe decides precision
    and parallel strategy (training/distributed/launcher.py), so accelerate's own are off.
    """

    def __init__(self, device: torch.device):
        settings = InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)
        with _without(LAUNCHED_FOR):
            self.accelerator = Accelerator(
                cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[settings]
            )
        if self.world_size != world_size():
            raise ValueError(
                f"This is one of {world_size()} processes (WORLD_SIZE), but accelerate counts "
                f"{self.world_size}: each would train its own head. Start them with `torchrun`."
            )
        own = self.device
        if own.type != device.type or (own.index or 0) != (device.index or 0):
            raise ValueError(
                f"The target is on {device}, but this process trains on {own}. Load the target "
                f"with device={str(own)!r}."
            )

    @property
    def device(self) -> torch.device:
        """This rank's device, with an index, which accelerate leaves out for a process alone."""
        device: torch.device = self.accelerator.device
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and decodes for evaluation."""
        return self.rank == 0

    def wrap_ddp(self, module: nn.Module, backward_done: Callable[[], None]) -> nn.Module:
        """Return the module under DDP, if there are several ranks.

        backward_done: called in a backward pass when the last gradients are sent; what follows is
        waiting for other ranks.
        """
        prepared: nn.Module = self.accelerator.prepare_model(module)
        if isinstance(prepared, DistributedDataParallel):
            # A lambda, since DDP refuses hooks whose annotations are strings, as they are here.
            prepared.register_comm_hook(
                prepared.process_group,
                lambda group, bucket: _all_reduce(group, bucket, backward_done),
            )
        return prepared

    def no_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[object]:
        """Accumulate gradients on this rank only while entered, if enabled."""
        return self.accelerator.no_sync(module) if enabled else nullcontext()

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank."""
        if self.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def any_rank(self, value: bool) -> bool:
        """Return whether the value is true on any rank."""
        return bool(self.all_reduce(torch.tensor(float(value), device=self.device)) > 0)

    def check_same_on_all_ranks(self, values: Mapping[str, str]) -> None:
        """ValueError on all ranks where values differ. values: by the name to report."""
        if self.world_size == 1:
            return
        everyone = gather_object([dict(values)])
        differing = [name for name in values if len({one[name] for one in everyone}) > 1]
        if differing:
            raise ValueError(
                f"The processes differ in {' and '.join(differing)}, so they would train different "
                "heads. Give all of them the same files and settings."
            )

    def barrier(self) -> None:
        """Wait for all ranks, and so for the main one, which alone writes files and decodes."""
        if self.world_size > 1:
            dist.barrier(long_timeout_group())


def local_device() -> torch.device:
    """Return the GPU that the launcher assigns to this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _all_reduce(
    group: ProcessGroup, bucket: GradBucket, backward_done: Callable[[], None]
) -> Future[Tensor]:
    """Start the all-reduce of some gradients, as DDP itself would."""
    if bucket.is_last():
        backward_done()
    return allreduce_hook(group, bucket)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """Remove some environment variables while entered."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
