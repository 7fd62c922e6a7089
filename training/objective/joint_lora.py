"""Training the target along with its head: Medusa-2's way (arXiv 2401.10774, section 2.2.2).

The head's loss flows through what the target sees into adapters beside its weights. What it says
is held by the original, which is the same model without adapters: the Kullback-Leibler divergence
of the changed distribution from the original one, over the rows of the answers, is part of the
loss.

Legend: B batch rows, T positions, F flat rows b * T + t, R rows of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headstart.model.checkpoint.metadata import Lora
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import ADAPTER, adapted
from headstart.model.target.output import TargetOutput
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import JointConfig, Recipe
from headstart.training.data.batching import Batch
from headstart.training.distributed.process_group import WorkerGroup

from .losses import Loss, answer_rows, chunk_rows
from .teacher import Teacher


class Joint(Teacher):
    """A target with adapters, which it has until `close`."""

    def __init__(self, config: JointConfig, recipe: Recipe, head: DraftHead, team: WorkerGroup):
        super().__init__(head, team)
        self.config, self.chunk_rows, self.learns = config, recipe.loss.chunk_rows, True
        target_hash(self.target)  # worked out and remembered before its weights get other names
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            self.model = adapted(self.target.model, config.rank, config.alpha, config.modules)
        named = self.model.named_parameters()
        self.adapters = {name: one for name, one in named if one.requires_grad}
        if recipe.loss.recompute:
            for layer in self.target.layers:
                layer.forward = _recomputed(layer)

    def begin(self, step: int, total: int) -> None:
        self.learns = step >= self.config.start * total

    def read(self, whole: Batch, ours: Batch) -> TargetOutput:
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return self._read(ours)

    def _read(self, batch: Batch) -> TargetOutput:
        return self.target.forward_train(batch.tokens_BT, batch.lengths_B, self.head.taps)

    def held(self, loss: Loss, seen: TargetOutput, batch: Batch) -> Loss:
        with self.model.disable_adapter(), torch.no_grad():
            original = self._read(batch) if self.learns else seen
        rows_R = answer_rows(batch)
        original_RD = original.lm_head_input_BTD.flatten(0, 1)[rows_R]
        changed_RD = seen.lm_head_input_BTD.flatten(0, 1)[rows_R]
        # Also where there are no rows: every process has to have gradients to exchange.
        total = torch.stack([weight.sum() for weight in self.adapters.values()]).sum() * 0
        size = self.chunk_rows or chunk_rows(self.head, changed_RD.is_cuda)
        for chunk_RD, original_chunk_RD in zip(
            changed_RD.split(size), original_RD.split(size), strict=True
        ):
            total = total + checkpoint(
                self._divergence, chunk_RD, original_chunk_RD, use_reentrant=False
            )
        divergence_2 = torch.stack([total.detach(), total.new_tensor(len(rows_R))]).double()
        return Loss(loss.total, replace(loss.sums, divergence_2=divergence_2), total)

    def _divergence(self, changed_RD: Tensor, original_RD: Tensor) -> Tensor:
        """Sum over rows of KL(original || changed), in float32 or wider."""
        with torch.autocast(changed_RD.device.type, enabled=False):
            p_RV, q_RV = self._log_probs(original_RD), self._log_probs(changed_RD)
            return (p_RV.exp() * (p_RV - q_RV)).sum()

    def _log_probs(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = self.target.unembed(hidden_RD)
        wide = torch.promote_types(torch.float32, logits_RV.dtype)
        return logits_RV.log_softmax(-1, dtype=wide)

    def objective(self, loss: Loss, weight: float, rows: int) -> Tensor:
        assert loss.divergence is not None
        return loss.total / weight + self.config.keep * loss.divergence / rows

    def rate(self, rate: float) -> float:
        return rate * self.config.lr if self.learns else 0.0

    def meta(self, divergence: float | None) -> Lora:
        config = self.config
        return Lora(
            rank=config.rank,
            alpha=config.alpha,
            divergence_weight=config.keep,
            divergence=divergence,
        )

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder / ADAPTER))

    def close(self) -> None:
        self.model.unload()
        for layer in self.target.layers:
            vars(layer).pop("forward", None)  # what `_recomputed` put there


def _recomputed(layer: nn.Module) -> Callable[..., Any]:
    """A layer's forward that keeps its input only and recomputes the rest in the backward pass."""
    return partial(checkpoint, layer.forward, use_reentrant=False)
