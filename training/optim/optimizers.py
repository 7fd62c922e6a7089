"""Optimizers, and a learning rate that depends on the step alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from headstart.training.config.schema import TrainConfig

from .muon import Float32Muon
from .precision import native_bfloat16

TEACHER = "teacher"  # marks the group of the teacher's parameters


def make_optimizers(
    head: nn.Module, config: TrainConfig, teacher: Iterable[nn.Parameter] = ()
) -> list[Optimizer]:
    """Return AdamW (arXiv 1711.05101) for all weights, or Muon for matrices and AdamW for the rest.

    Norms, biases and the teacher's parameters have no weight decay; the latter have their own
    learning rate. Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that one
    learning rate serves both.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    rest = [p for p in trained if p.dim() <= 1]
    if config.optimizer == "muon":
        muon = [p for p in matrices if p.dim() == 2]
        adamw = [p for p in matrices if p.dim() != 2]
        first: list[Optimizer] = [_muon(muon, config)]
    else:
        first, adamw = [], matrices
    groups = [
        {"params": adamw, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
        {"params": list(teacher), "weight_decay": 0.0, TEACHER: True},
    ]
    groups = [group for group in groups if group["params"]]
    return [*first, *([AdamW(groups, lr=config.lr, betas=config.betas)] if groups else [])]


def _muon(matrices: list[nn.Parameter], config: TrainConfig) -> Muon:
    settings: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "momentum": config.betas[1],
    }
    if all(one.device.type == "cpu" for one in matrices) and not native_bfloat16():
        return Float32Muon(matrices, **settings)
    return Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the rate of step `step` (0-based) of `total`: linear warm-up, cosine to the floor."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    part = (step - warm) / max(1, total - warm)
    cosine = (1 + math.cos(math.pi * part)) / 2
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)


def set_learning_rate(optimizers: Sequence[Optimizer], lr: float, teacher_lr: float = 0.0) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = teacher_lr if group.get(TEACHER) else lr
