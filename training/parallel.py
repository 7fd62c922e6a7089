"""The processes that train together. The only file that knows there may be several."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

from .data import Batch
from .launch import LAUNCHED_FOR, world_size


class Team:
    """One or more processes with the same head and the same frozen target.

    Started by `torchrun` or `accelerate launch`; alone otherwise. Precision and engine are the
    recipe's business (training/launch.py), so accelerate's own are off.
    """

    def __init__(self, device: torch.device):
        # The others wait while the main process decodes, which may take long.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        with _without(LAUNCHED_FOR):
            self.accelerator = Accelerator(
                cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patience]
            )
        if self.count != world_size():
            raise ValueError(
                f"This is one of {world_size()} processes (WORLD_SIZE), but accelerate counts "
                f"{self.count}: each would train a head of its own. Start them with `torchrun`."
            )
        ours = self.accelerator.device
        if ours.type != device.type or (ours.index or 0) != (device.index or 0):
            raise ValueError(
                f"The target is on {device}, but this process trains on {ours}. Load the target "
                f"with device={str(ours)!r}."
            )

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

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module, with gradients averaged over the processes."""
        prepared: nn.Module = self.accelerator.prepare_model(module)
        return prepared

    def backward_alone(self, module: nn.Module, alone: bool) -> AbstractContextManager[object]:
        """Keep the gradients of a micro-batch to ourselves until the last one."""
        return self.accelerator.no_sync(module) if alone else nullcontext()

    def part(self, batch: Batch) -> Batch:
        """Our rows of a batch, where the target is."""
        return batch.part(self.index, self.count).to(self.accelerator.device)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in each of them."""
        if self.count == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def must_agree(self, values: Mapping[str, str]) -> None:
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
        self.accelerator.wait_for_everyone()


def local_device() -> torch.device:
    """Where this process should put the target: the GPU its launcher means for it, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """With some variables of the environment taken out."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
