"""DeepSpeed's ZeRO (arXiv 1910.02054) as a parallel strategy. The only file that uses DeepSpeed.

DeepSpeed keeps the optimizer state of many weights in one flat tensor per rank, and saves it in a
form that depends on the number of ranks. Here it is gathered per weight instead, by functions that
DeepSpeed has for that, so that checkpoints are those of every other strategy.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.training.config.schema import Recipe
from headstart.training.optim.optimizers import make_optimizers, set_learning_rate

from .launcher import deepspeed_settings
from .process_group import WorkerGroup
from .strategies import (
    ParallelStrategy,
    check_state,
    head_with_weights,
    named_weights,
    tensors_under,
)

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a weight, beside the step count


class ZeROStrategy(ParallelStrategy):
    """Stages 1 to 3, by `parallel.engine`."""

    def __init__(self, head: DraftHead, recipe: Recipe, workers: WorkerGroup):
        super().__init__(head, recipe, workers)
        import deepspeed
        from deepspeed import utils

        if head.target.device.type == "cpu":
            # It would compile kernels for its communication, for minutes; gloo will do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.utils = utils
        (self.optimizer,) = make_optimizers(head, recipe.train)
        # Before DeepSpeed takes the weights out of the optimizer.
        named = named_weights([self.optimizer])
        self.named_weights = [(name, weight) for name, _, weight in named]
        self.engine, *_ = deepspeed.initialize(
            model=self.unrolled,
            optimizer=self.optimizer,
            config=deepspeed_settings(recipe),
            dist_init_required=False,
        )
        self._initialize_state()

    def forward(self, output: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        hidden: list[Tensor] = self.engine(output, tokens_BT)
        return hidden

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float, teacher_lr: float = 0.0) -> float:
        set_learning_rate([self.optimizer], lr)
        self.engine.step()  # it clips, and skips a step whose norm is not finite
        return float(self.engine.get_global_grad_norm())

    def is_finite(self) -> bool:
        weights = [getattr(weight, "ds_tensor", weight) for weight in self.head.parameters()]
        return all(bool(weight.isfinite().all()) for weight in weights)

    def full_head(self) -> DraftHead | None:
        kept = self.head.state_dict().keys()
        weights = {name: one for name, one in self.head.named_buffers() if name in kept}
        for name, weight in self.head.named_parameters():
            full = self.utils.safe_get_full_fp32_param(weight)
            if self.workers.is_main:
                weights[name] = full
        return head_with_weights(self.head, weights) if self.workers.is_main else None

    def optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        count = next(iter(self.optimizer.state.values()))["step"]
        for name, weight in self.named_weights:
            for key in MOMENTS:
                full = self.utils.safe_get_full_optimizer_state(weight, key)
                if self.workers.is_main:
                    state[f"{name}.{key}"] = full.detach().cpu().view(_shape(weight))
            state[f"{name}.step"] = count.detach().cpu().clone()
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, weight in self.named_weights:
            values = tensors_under(state, name)
            check_state(name, _shape(weight), values)
            for key in MOMENTS if values else ():  # none before the first step
                value = values[key].to(self.head.target.device)
                if hasattr(weight, "ds_tensor"):  # stage 3 takes this rank's shard
                    shard = self._shard(value, weight.ds_tensor.numel())
                    self.utils.safe_set_local_optimizer_state(weight, shard, key)
                else:
                    self.utils.safe_set_full_optimizer_state(weight, value, key)
            for flat in self.optimizer.state.values() if values else ():
                flat["step"].copy_(values["step"])

    def _shard(self, value: Tensor, size: int) -> Tensor:
        """Return this rank's shard of a tensor; shards have `size` numbers, zero-padded."""
        padded = torch.nn.functional.pad(
            value.flatten(), (0, size * self.workers.world_size - value.numel())
        )
        return padded[size * self.workers.rank :][:size]

    def _initialize_state(self) -> None:
        """Create the optimizer state as AdamW does in its first step. DeepSpeed links weights with
        it only once, after the step of the first group, when the other groups have none."""
        for flat in self._flat_weights():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros(()), **zeros}
        link = getattr(self.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # stages 1 and 2
            link()

    def _flat_weights(self) -> Iterator[Tensor]:
        wrapped = self.engine.optimizer
        third = getattr(wrapped, "fp32_partitioned_groups_flat", None)
        yield from wrapped.single_partition_of_fp32_groups if third is None else third


def _shape(weight: nn.Parameter) -> torch.Size:
    """Return a weight's shape: stage 3 replaces it by an empty tensor and keeps the shape."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
