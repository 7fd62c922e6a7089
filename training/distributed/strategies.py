"""How what is trained is spread over the processes: the head's weights, gradients and optimizer.

An engine runs the training computation and the optimizer step; the loop does not know which. What
is saved is the same for all, whole tensors under names that no number of processes enters, so a run
may go on with another engine or on more or fewer processes.

    ddp      each process holds everything; gradients are averaged (also: one process alone)
    fsdp2    each process holds a part of every tensor (torch's `fully_shard`)
    zero1/2/3   DeepSpeed (training/zero.py): the optimizer state is spread; gradients too; all
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from headstart.training.reporting.step_timer import StepTimer

from .process_group import WorkerGroup

ADAPTER = "adapter"  # how the names of the adapters' weights begin in a checkpoint


class Unrolled(nn.Module):
    """The training computation as a module's forward, which is where engines step in."""

    def __init__(self, head: DraftHead, recipe: Recipe, adapters: Iterable[nn.Parameter] = ()):
        """adapters: of the target, in joint training. They work outside, and learn along."""
        super().__init__()
        self.head, self.steps = head, recipe.loss.steps
        self.adapters = nn.ParameterList(adapters)
        head.recompute = recipe.loss.recompute
        self.halved = recipe.train.precision == "bfloat16"

    def forward(self, seen: TargetOutput, tokens_BT: Tensor) -> list[Tensor]:
        # Within the module: DeepSpeed switches off what was set around it.
        with self.autocast():
            return self.head.unroll(seen, tokens_BT, self.steps)

    def autocast(self) -> torch.autocast:
        device = self.head.target.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.halved)


class Engine(ABC):
    """Every method is called by all processes at the same time."""

    def __init__(
        self,
        head: DraftHead,
        recipe: Recipe,
        team: WorkerGroup,
        adapters: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ):
        self.head, self.team, self.adapters = head, team, adapters
        self.clip = recipe.train.clip
        self.unrolled = Unrolled(head, recipe, adapters.values())

    @abstractmethod
    def forward(self, seen: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        """`DraftHead.unroll`, by the spread-out head. last: as for the `backward` that follows."""

    @abstractmethod
    def backward(self, total: Tensor, *, last: bool) -> None:
        """Add up gradients, averaged over the processes behind the last batch of a step."""

    @abstractmethod
    def update(self, rate: float, adapters: float = 0.0) -> float:
        """Clip the gradients, step the optimizers and drop the gradients; the norm before.

        adapters: their learning rate. A norm that is no finite number changes nothing.
        """

    def is_finite(self) -> bool:
        """Whether all weights of this process are numbers."""
        return all(
            bool(local_tensor(weight).isfinite().all()) for weight in self.unrolled.parameters()
        )

    @abstractmethod
    def whole_head(self) -> DraftHead | None:
        """The head with all its weights, at least in the main process. Not to be trained."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole tensors by name, at least in the main process; with the adapters' weights."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave. ValueError where it does not fit."""


class Replicated(Engine):
    """Every process holds everything. A process alone is one of them."""

    def __init__(
        self,
        head: DraftHead,
        recipe: Recipe,
        team: WorkerGroup,
        clock: StepTimer,
        adapters: Mapping[str, nn.Parameter] = MappingProxyType({}),
    ):
        super().__init__(head, recipe, team, adapters)
        self.clock, self.waiting = clock, False
        self.module = self._spread(self.unrolled)
        self.optimizers = make_optimizers(head, recipe.train, adapters.values())

    def _spread(self, module: nn.Module) -> nn.Module:
        return self.team.prepare(module, self._computed)

    def _computed(self) -> None:
        """Our own gradients are there; those of the others may not be."""
        self.clock.mark("backward")
        self.waiting = True

    def forward(self, seen: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        with self._exchanging(last):  # DDP decides here what its backward pass will do
            hidden: list[Tensor] = self.module(seen, tokens_BT)
        return hidden

    def backward(self, total: Tensor, *, last: bool) -> None:
        with self._exchanging(last):
            total.backward()
        if self.waiting:
            self.clock.mark("exchange")
            self.waiting = False

    def _exchanging(self, last: bool) -> AbstractContextManager[object]:
        """Gradients are exchanged behind the last batch of a step only."""
        return self.team.backward_alone(self.module, not last)

    def update(self, rate: float, adapters: float = 0.0) -> float:
        norm = nn.utils.clip_grad_norm_(self.unrolled.parameters(), self.clip)
        norm = full_tensor(norm)
        if bool(norm.isfinite()):
            set_learning_rate(self.optimizers, rate, adapters)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def whole_head(self) -> DraftHead | None:
        return self.head

    # Not by torch.distributed.checkpoint.state_dict: it steps an optimizer without state to give it
    # one, so weights that had no gradient yet (adapters before joint.start) would resume with a
    # step counted and learn otherwise; and it takes moments of another shape without a word.
    def optimizer_state(self) -> dict[str, Tensor]:
        state = {f"{ADAPTER}.{name}": one.detach() for name, one in self.adapters.items()}
        for place, optimizer, weight in places(self.optimizers):
            for key, value in optimizer.state.get(weight, {}).items():
                together = full_tensor(value)
                if self.team.main:  # on the CPU, so that one tensor at a time is whole on a GPU
                    state[f"{place}.{key}"] = together.detach().cpu()
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in under(state, ADAPTER).items():
            self.adapters[name].data.copy_(value)
        for place, optimizer, weight in places(self.optimizers):
            values = under(state, place)
            check_state(place, weight.shape, values)
            if values:  # none before the first step
                placed = {key: _like(value, weight) for key, value in values.items()}
                optimizer.state[weight] = placed


class Sharded(Replicated):
    """Each process holds a part of every weight, gradient and optimizer tensor (FSDP2)."""

    def _spread(self, module: nn.Module) -> nn.Module:
        mesh = init_device_mesh(self.head.target.device.type, (self.team.count,))
        # Between forward and backward stand the logits, which need the memory more.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)  # in place
        return module

    def _exchanging(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def whole_head(self) -> DraftHead | None:
        weights: dict[str, Tensor] = {}
        for name, value in self.head.state_dict().items():
            together = full_tensor(value)
            if self.team.main:
                weights[name] = together
        return filled(self.head, weights) if self.team.main else None


def make_engine(
    head: DraftHead,
    recipe: Recipe,
    team: WorkerGroup,
    clock: StepTimer,
    adapters: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> Engine:
    """The engine that `parallel.engine` names. The head holds the weights to start from.

    clock: told when a backward pass only waits for other processes, where the engine knows (ddp).
    adapters: of the target, by name, in joint training (ddp only).
    """
    kind = recipe.parallel.engine
    if kind == "ddp":
        return Replicated(head, recipe, team, clock, adapters)
    if kind == "fsdp2":
        return Sharded(head, recipe, team, clock)
    from .deepspeed_zero import Zero  # DeepSpeed is optional

    return Zero(head, recipe, team)


def filled(head: DraftHead, weights: Mapping[str, Tensor]) -> DraftHead:
    """A head like this one with other weights, bound to the same target."""
    copy = type(head)(head.config).to(head.target.device)
    copy.load_state_dict(dict(weights))
    copy.bind(head.target)
    return copy


def places(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    """Name, optimizer and weight of everything that optimizers keep state for."""
    for number, optimizer in enumerate(optimizers):
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, weight in enumerate(weights):
            yield f"optimizer.{number}.{index}", optimizer, weight


def under(state: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """The tensors of one place, by their own names."""
    prefix = f"{place}."
    found = {name: value for name, value in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def check_state(place: str, shape: torch.Size, values: Mapping[str, Tensor]) -> None:
    wrong = [key for key, value in values.items() if value.dim() and value.shape != shape]
    if wrong:
        raise ValueError(
            f"The checkpoint's optimizer state does not fit this head ({place}: {', '.join(wrong)} "
            f"for a weight of {list(shape)}). Use the recipe it was made with, or another "
            "train.output."
        )


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """Where and how the weight is. Counters (no dimensions) stay as they are, on the CPU."""
    if not value.dim():
        return value
    value = value.to(weight.device)
    if isinstance(weight, DTensor):
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value
