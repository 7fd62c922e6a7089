"""Train the target jointly with its head by LoRA adapters, as Medusa-2 (arXiv 2401.10774, 2.2.2).

The head's loss flows through the target's hidden states into adapters beside its weights. An extra
loss keeps the target near the original, which is the same model without adapters: the
Kullback-Leibler divergence of the trained distribution from the original one, over the labels.

Legend: B sequences, T positions, R rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

from .losses import chunk_rows, label_rows
from .teacher import Teacher


class JointLoraTeacher(Teacher):
    """A target with trained adapters, which `close` removes again."""

    extra_loss_name = "divergence"

    def __init__(self, config: JointConfig, recipe: Recipe, head: DraftHead):
        super().__init__(head)
        self.config, self.chunk_rows, self.trains = config, recipe.loss.chunk_rows, True
        self.extra_loss_weight = config.keep
        target_hash(self.target)  # cached here, before peft renames the weights
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            self.model = adapted(self.target.model, config.rank, config.alpha, config.modules)
        named = self.model.named_parameters()
        self.parameters = {name: one for name, one in named if one.requires_grad}
        if recipe.loss.recompute:
            for layer in self.target.layers:
                layer.forward = _recomputed(layer)

    def begin_step(self, step: int, total: int) -> None:
        self.trains = step >= self.config.start * total

    def forward(self, batch: Batch) -> TargetOutput:
        with torch.set_grad_enabled(self.trains and torch.is_grad_enabled()):
            return self.target.forward_train(batch.tokens_BT, batch.lengths_B, self.head.taps)

    def extra_loss(self, output: TargetOutput, batch: Batch) -> Tensor:
        """Return the divergence from the original target, summed over the batch's labels."""
        with self.model.disable_adapter():
            original = self._forward(batch) if self.trains else output
        rows_R = label_rows(batch)
        original_RD = original.lm_head_input_BTD.flatten(0, 1)[rows_R]
        trained_RD = output.lm_head_input_BTD.flatten(0, 1)[rows_R]
        # Also without rows: every rank needs gradients to all-reduce.
        total = torch.stack([weight.sum() for weight in self.parameters.values()]).sum() * 0
        size = self.chunk_rows or chunk_rows(self.head, trained_RD.is_cuda)
        for trained_chunk_RD, original_chunk_RD in zip(
            trained_RD.split(size), original_RD.split(size), strict=True
        ):
            total = total + checkpoint(
                self._divergence, trained_chunk_RD, original_chunk_RD, use_reentrant=False
            )
        return total

    def _divergence(self, trained_RD: Tensor, original_RD: Tensor) -> Tensor:
        """Return the sum over rows of KL(original || trained), in float32 or wider."""
        with torch.autocast(trained_RD.device.type, enabled=False):
            p_RV, q_RV = self._log_probs(original_RD), self._log_probs(trained_RD)
            return (p_RV.exp() * (p_RV - q_RV)).sum()

    def _log_probs(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = self.target.unembed(hidden_RD)
        wide = torch.promote_types(torch.float32, logits_RV.dtype)
        return logits_RV.log_softmax(-1, dtype=wide)

    def learning_rate(self, lr: float) -> float:
        return lr * self.config.lr if self.trains else 0.0

    def metadata(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        config, divergence = self.config, metrics.get("holdout_divergence")
        lora = Lora(
            rank=config.rank,
            alpha=config.alpha,
            divergence_weight=config.keep,
            divergence=divergence,
        )
        return {"joint": lora}

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(str(folder / ADAPTER))

    def close(self) -> None:
        self.model.unload()
        for layer in self.target.layers:
            vars(layer).pop("forward", None)  # set by `_recomputed`


def _recomputed(layer: nn.Module) -> Callable[..., Any]:
    """Return a layer's forward with activation checkpointing."""
    return partial(checkpoint, layer.forward, use_reentrant=False)
