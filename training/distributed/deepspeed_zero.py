"""DeepSpeed's ZeRO (arXiv 1910.02054) as an engine. The only file that knows DeepSpeed.

DeepSpeed keeps the optimizer state of many weights in one flat tensor per process, and saves it in
a form that depends on how many there are. Here it is put together per weight instead, by functions
that DeepSpeed has for that, so that the checkpoint is that of every other engine.
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
from .strategies import Engine, check_state, filled, places, under

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each weight, beside the count of steps


class Zero(Engine):
    def __init__(self, head: DraftHead, recipe: Recipe, team: WorkerGroup):
        super().__init__(head, recipe, team)
        import deepspeed
        from deepspeed import utils

        if head.target.device.type == "cpu":
            # It would compile kernels for its processes to talk by, for minutes; gloo will do.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.utils = utils
        (self.optimizer,) = make_optimizers(head, recipe.train)
        # Before DeepSpeed takes the weights out of the optimizer.
        self.places = [(place, weight) for place, _, weight in places([self.optimizer])]
        self.engine, *_ = deepspeed.initialize(
            model=self.unrolled,
            optimizer=self.optimizer,
            config=deepspeed_settings(recipe),
            dist_init_required=False,
        )
        self._make_room()

    def forward(self, seen: TargetOutput, tokens_BT: Tensor, *, last: bool) -> list[Tensor]:
        hidden: list[Tensor] = self.engine(seen, tokens_BT)
        return hidden

    def backward(self, total: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(total, scale_wrt_gas=False)

    def update(self, rate: float, adapters: float = 0.0) -> float:
        set_learning_rate([self.optimizer], rate)
        self.engine.step()  # it clips, and leaves out a step whose norm is no number
        return float(self.engine.get_global_grad_norm())

    def is_finite(self) -> bool:
        weights = [getattr(weight, "ds_tensor", weight) for weight in self.head.parameters()]
        return all(bool(weight.isfinite().all()) for weight in weights)

    def whole_head(self) -> DraftHead | None:
        kept = self.head.state_dict().keys()
        weights = {name: one for name, one in self.head.named_buffers() if name in kept}
        for name, weight in self.head.named_parameters():
            whole = self.utils.safe_get_full_fp32_param(weight)
            if self.team.main:
                weights[name] = whole
        return filled(self.head, weights) if self.team.main else None

    def optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        count = next(iter(self.optimizer.state.values()))["step"]
        for place, weight in self.places:
            for key in MOMENTS:
                whole = self.utils.safe_get_full_optimizer_state(weight, key)
                if self.team.main:
                    state[f"{place}.{key}"] = whole.detach().cpu().view(_shape(weight))
            state[f"{place}.step"] = count.detach().cpu().clone()
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for place, weight in self.places:
            values = under(state, place)
            check_state(place, _shape(weight), values)
            for key in MOMENTS if values else ():  # none before the first step
                value = values[key].to(self.head.target.device)
                if hasattr(weight, "ds_tensor"):  # stage 3 wants this process's own part
                    part = self._part(value, weight.ds_tensor.numel())
                    self.utils.safe_set_local_optimizer_state(weight, part, key)
                else:
                    self.utils.safe_set_full_optimizer_state(weight, value, key)
            for flat in self.optimizer.state.values() if values else ():
                flat["step"].copy_(values["step"])

    def _part(self, value: Tensor, size: int) -> Tensor:
        """What this process has of a tensor that is cut into parts of `size`, the last ones filled
        up with zeros."""
        padded = torch.nn.functional.pad(
            value.flatten(), (0, size * self.team.count - value.numel())
        )
        return padded[size * self.team.index :][:size]

    def _make_room(self) -> None:
        """Optimizer state as AdamW makes it in its first step. DeepSpeed links weights with it once
        only, and behind the step of the first group, when the others have none."""
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
    """Stage 3 leaves an empty tensor in the place of a weight, and notes its shape."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape
