"""The processes that train together. The only file that knows there may be several."""

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
from headstart.training.data.batching import Batch

from .launcher import LAUNCHED_FOR, world_size

# The longest that a process may let the others wait with its part of an exchange: they do the same
# work at the same time. One on another machine that is gone without a word is given up after that.
EXCHANGE = timedelta(minutes=10)


class WorkerGroup:
    """One or more processes with the same head and the same frozen target.

    Started by `torchrun` or `accelerate launch`; alone otherwise. Precision and engine are the
    recipe's business (training/launch.py), so accelerate's own are off.
    """

    def __init__(self, device: torch.device):
        exchange = InitProcessGroupKwargs(timeout=EXCHANGE)
        with _without(LAUNCHED_FOR):
            self.accelerator = Accelerator(
                cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[exchange]
            )
        if self.count != world_size():
            raise ValueError(
                f"This is one of {world_size()} processes (WORLD_SIZE), but accelerate counts "
                f"{self.count}: each would train a head of its own. Start them with `torchrun`."
            )
        ours = self.device
        if ours.type != device.type or (ours.index or 0) != (device.index or 0):
            raise ValueError(
                f"The target is on {device}, but this process trains on {ours}. Load the target "
                f"with device={str(ours)!r}."
            )

    @property
    def device(self) -> torch.device:
        """With an index, which accelerate leaves out where a process is alone."""
        device: torch.device = self.accelerator.device
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    @property
    def index(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def main(self) -> bool:
        """True in the process that writes files and decodes for evaluation."""
        return self.index == 0

    def prepare(self, module: nn.Module, computed: Callable[[], None]) -> nn.Module:
        """The module, with gradients averaged over the processes.

        computed: told in a backward pass when the last gradients go out: what is left is to wait.
        """
        prepared: nn.Module = self.accelerator.prepare_model(module)
        if isinstance(prepared, DistributedDataParallel):
            # A lambda, since DDP takes no hook whose annotations are texts, as they are here.
            prepared.register_comm_hook(
                prepared.process_group, lambda group, bucket: _send(group, bucket, computed)
            )
        return prepared

    def backward_alone(self, module: nn.Module, alone: bool) -> AbstractContextManager[object]:
        """Keep the gradients of a micro-batch to ourselves until the last one."""
        return self.accelerator.no_sync(module) if alone else nullcontext()

    def part(self, batch: Batch) -> Batch:
        """Our rows of a batch, where the target is."""
        return batch.part(self.index, self.count).to(self.device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in each of them."""
        if self.count == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def any_rank(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all stop together."""
        return bool(self.sum(torch.tensor(float(asked), device=self.device)) > 0)

    def check_same_on_all_ranks(self, values: Mapping[str, str]) -> None:
        """ValueError in all processes where one of them has something else.

        values: what it is, by what to call it.
        """
        if self.count == 1:
            return
        everyone = gather_object([dict(values)])
        differing = [name for name in values if len({one[name] for one in everyone}) > 1]
        if differing:
            raise ValueError(
                f"The processes differ in {' and '.join(differing)}, so they would train different "
                "heads. Give all of them the same files and settings."
            )

    def wait(self) -> None:
        """For all, and so for the main process, which alone writes files and decodes."""
        if self.count > 1:
            dist.barrier(long_timeout_group())


def local_device() -> torch.device:
    """Where this process should put the target: the GPU its launcher means for it, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _send(group: ProcessGroup, bucket: GradBucket, computed: Callable[[], None]) -> Future[Tensor]:
    """Start to exchange some gradients, as DDP itself would."""
    if bucket.is_last():
        computed()
    return allreduce_hook(group, bucket)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """With some variables of the environment taken out."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
