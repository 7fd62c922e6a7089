"""The processes that train together. The only file that knows there may be several."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn


class Team:
    """One or more processes with the same head and the same frozen target.

    Started by `torchrun` or `accelerate launch`; alone otherwise. Precision is the recipe's
    business, so accelerate's own is off.
    """

    def __init__(self, device: torch.device):
        # The others wait while the main process decodes, which may take long.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        self.accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=[patience]
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

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in each of them."""
        if self.count == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def local_device() -> torch.device:
    """Where this process should put the target: the GPU its launcher means for it, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scale the gradients down to a norm of at most `limit`; returns the norm before."""
    return float(nn.utils.clip_grad_norm_(module.parameters(), limit))
