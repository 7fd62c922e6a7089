"""AdamW, and a learning rate that is a function of the step alone."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer

from .recipe import TrainConfig


def make_optimizer(module: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW (arXiv 1711.05101); norms and biases do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """For optimizer step `step` (0-based) of `total`: linear warm-up, then cosine to the floor."""
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    part = (step - warm) / max(1, total - warm)
    cosine = (1 + math.cos(math.pi * part)) / 2
    return config.lr * (config.lr_floor + (1 - config.lr_floor) * cosine)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
