"""How the head's weights, gradients and optimizer state are laid out over the ranks.

A strategy runs the head's training computation and the optimizer step; the training loop does not
know which it has. Checkpoints are the same for all: full tensors under names that do not depend on
the number of ranks, so that a run may resume with another strategy or on more or fewer ranks.

    ddp         every rank holds everything; gradients are averaged (also: one process alone)
    fsdp2       every rank holds a shard of every tensor (torch's `fully_shard`)
    zero1/2/3   DeepSpeed (training/distributed/deepspeed_zero.py) shards the optimizer state; the
                gradients too; the weights too

Legend: B sequences, T positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.sharding import full_tensor, local_tensor
from headstart.training.config.schema import Recipe
from headstart.training.optim.optimizers import make_optimizers, set_learning_rate

from .process_group import WorkerGroup

TEACHER = "adapter"  # prefix of the teacher's parameters in a checkpoint
MarkTime = Callable[[str], None]  # assigns the time since the last mark to a part of the step


class UnrolledHead(nn.Module):
    """The head's training computation as a module's forward, which the strategies wrap."""

    def __init__(self, head: DraftHead, recipe: Recipe, teacher: Iterable[nn.Parameter] = ()):
        """teacher: its trained parameters. They are used outside of `forward`, and trained here."""
        super().__init__()
        self.head, self.steps = head, recipe.loss.steps
        self.teacher = nn.ParameterList(teacher)
        head.recompute = recipe.loss.recompute
        self.bf16 = recipe.train.precision == "bfloat16"

    def forward(self, output: TargetOutput, tokens_BT: Tensor) -> list[Tensor]:
        # Within the module: DeepSpeed disables autocast that is set around it.
        with self.autocast():
            return self.head.unroll(output, tokens_BT, self.steps)

    def autocast(self) -> torch.autocast:
        device = self.head.target.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)


class ParallelStrategy(ABC):
    """All ranks call every method at the same time."""

    def __init__(
        self,
        head: DraftHead,
        recipe: Recipe,
        workers: WorkerGroup,
        teacher: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ):
        """teacher: its trained parameters by name."""
        self.head, self.workers, self.teacher = head, workers, teacher
        self.clip = recipe.train.clip
        self.unrolled = UnrolledHead(head, recipe, teacher.values())

    @abstractmethod
    def forward(self, output: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        """Run `DraftHead.unroll`. last: as in the `backward` that follows."""

    def autocast(self) -> torch.autocast:
        """Return the precision of the head's matrix products as a context."""
        return self.unrolled.autocast()

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients; average them over the ranks after the last batch of a step."""

    @abstractmethod
    def step(self, lr: float, teacher_lr: float = 0.0) -> float:
        """Clip the gradients, step the optimizers, reset the gradients; return the norm before.

        A norm that is not finite changes no weight.
        """

    def is_finite(self) -> bool:
        """Return whether all weights of this rank are finite."""
        return all(
            bool(local_tensor(weight).isfinite().all()) for weight in self.unrolled.parameters()
        )

    @abstractmethod
    def full_head(self) -> DraftHead | None:
        """Return the head with full weights, at least on the main rank. It must not be trained."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Return full tensors by name, at least on the main rank, with the teacher's weights."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load what `optimizer_state` returned. ValueError where it does not fit."""


class DDPStrategy(ParallelStrategy):
    """Every rank holds everything. A process alone is such a rank."""

    def __init__(
        self,
        head: DraftHead,
        recipe: Recipe,
        workers: WorkerGroup,
        mark_time: MarkTime,
        teacher: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ):
        """mark_time: called when a backward pass only waits for other ranks."""
        super().__init__(head, recipe, workers, teacher)
        self.mark_time, self.waiting = mark_time, False
        self.module = self._wrap(self.unrolled)
        self.optimizers = make_optimizers(head, recipe.train, teacher.values())

    def _wrap(self, module: nn.Module) -> nn.Module:
        return self.workers.wrap_ddp(module, self._backward_done)

    def _backward_done(self) -> None:
        self.mark_time("backward")
        self.waiting = True

    def forward(self, output: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        with self._sync(last):  # DDP decides here what its backward pass will do
            hidden: list[Tensor] = self.module(output, tokens_BT)
        return hidden

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._sync(last):
            loss.backward()
        if self.waiting:
            self.mark_time("all_reduce")
            self.waiting = False

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        """All-reduce gradients after the last batch of a step only."""
        return self.workers.no_sync(self.module, not last)

    def step(self, lr: float, teacher_lr: float = 0.0) -> float:
        norm = nn.utils.clip_grad_norm_(self.unrolled.parameters(), self.clip)
        norm = full_tensor(norm)
        if bool(norm.isfinite()):
            set_learning_rate(self.optimizers, lr, teacher_lr)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def full_head(self) -> DraftHead | None:
        return self.head

    # Not by torch.distributed.checkpoint.state_dict: it steps an optimizer without state to give it
    # one, so weights that had no gradient yet (adapters before joint.start) would resume with a
    # step counted and learn otherwise; and it accepts moments of another shape without an error.
    def optimizer_state(self) -> dict[str, Tensor]:
        state = {f"{TEACHER}.{name}": one.detach() for name, one in self.teacher.items()}
        for name, optimizer, weight in named_weights(self.optimizers):
            for key, value in optimizer.state.get(weight, {}).items():
                gathered = full_tensor(value)
                if self.workers.is_main:  # on the CPU: one full tensor at a time is on a GPU
                    state[f"{name}.{key}"] = gathered.detach().cpu()
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in tensors_under(state, TEACHER).items():
            self.teacher[name].data.copy_(value)
        for name, optimizer, weight in named_weights(self.optimizers):
            values = tensors_under(state, name)
            check_state(name, weight.shape, values)
            if values:  # none before the first step
                placed = {key: _placed_like(value, weight) for key, value in values.items()}
                optimizer.state[weight] = placed


class FSDP2Strategy(DDPStrategy):
    """Every rank holds a shard of every weight, gradient and optimizer tensor."""

    def _wrap(self, module: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.head.target.device.type, (self.workers.world_size,))
        # Between forward and backward pass the logits need the memory more.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # in place
        return module

    def _sync(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def full_head(self) -> DraftHead | None:
        weights: dict[str, Tensor] = {}
        for name, value in self.head.state_dict().items():
            gathered = full_tensor(value)
            if self.workers.is_main:
                weights[name] = gathered
        return head_with_weights(self.head, weights) if self.workers.is_main else None


def head_with_weights(head: DraftHead, weights: Mapping[str, Tensor]) -> DraftHead:
    """Return a head like this one with other weights, bound to the same target."""
    copy = type(head)(head.config).to(head.target.device)
    copy.load_state_dict(dict(weights))
    copy.bind(head.target)
    return copy


def named_weights(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    """Yield every optimized weight with its optimizer and the name of its state in a checkpoint."""
    for number, optimizer in enumerate(optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, weight in enumerate(weights):
            yield f"optimizer.{number}.{index}", optimizer, weight


def tensors_under(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `name.`, without that prefix."""
    prefix = f"{name}."
    found = {key: value for key, value in state.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}


def check_state(name: str, shape: torch.Size, values: Mapping[str, Tensor]) -> None:
    """ValueError for optimizer state of another shape than its weight."""
    wrong = [key for key, value in values.items() if value.dim() and value.shape != shape]
    if wrong:
        raise ValueError(
            f"The checkpoint's optimizer state does not fit this head ({name}: {', '.join(wrong)} "
            f"for a weight of {list(shape)}). Use the recipe it was made with, or another "
            "train.output."
        )


def _placed_like(value: Tensor, weight: Tensor) -> Tensor:
    """Move to the weight's device and shard like it. Counters (no dimensions) stay on the CPU."""
    if not value.dim():
        return value
    value = value.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value
