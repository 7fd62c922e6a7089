"""The teacher of a head: computes the hidden states that it learns from.

The training loop does not know which teacher it has. A teacher may have parameters of its own that
are trained too, and an extra loss on them (training/objective/joint_lora.py).

Legend: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.training.data.batching import Batch, rank_slices
from headstart.training.data.hidden_states import target_output


class Teacher:
    """A frozen target in the same process.

    parameters: the teacher's own trained weights by name; a frozen target has none.
    extra_loss_name, extra_loss_weight: its metric's name, None without one, and its weight in the
    objective.
    """

    parameters: Mapping[str, nn.Parameter]
    extra_loss_name: str | None = None
    extra_loss_weight = 0.0

    def __init__(self, head: DraftHead):
        self.head, self.target = head, head.target
        self.parameters = {}

    def begin_step(self, step: int, total: int) -> None:
        """Prepare for optimizer step `step` of `total`."""

    def forward(self, batch: Batch) -> TargetOutput:
        """Return the target's hidden states of a batch; with a graph where it is trained."""
        return self._forward(batch)

    @torch.no_grad()
    def _forward(self, batch: Batch) -> TargetOutput:
        return self.target.forward_train(batch.tokens_BT, batch.lengths_B, self.head.taps)

    def extra_loss(self, output: TargetOutput, batch: Batch) -> Tensor:
        """Return the sum of an extra loss over the labels of the first draft step: 0 without one.

        output: what `forward` returned for the batch.
        """
        return output.lm_head_input_BTD.new_zeros(())

    def learning_rate(self, lr: float) -> float:
        """Return the learning rate of `parameters` where the head's is `lr`."""
        return 0.0

    def metadata(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return fields of the head's metadata (`HeadMeta`), given metrics of an evaluation."""
        return {}

    def save(self, folder: Path) -> None:
        """Write the trained parameters into the head's folder."""

    def close(self) -> None:
        """Restore the target as it was before."""


class StoredTeacher(Teacher):
    """A frozen target whose hidden states come with each batch, from disk. layers: stored ones."""

    def __init__(self, head: DraftHead, layers: Sequence[int]):
        super().__init__(head)
        self.layers = layers

    def forward(self, batch: Batch) -> TargetOutput:
        assert batch.stored_LBTD is not None
        return target_output(batch.stored_LBTD, self.layers)


class TensorParallelTeacher(Teacher):
    """A frozen target that all ranks compute together: each runs the global batch and keeps its
    own part."""

    def __init__(self, head: DraftHead, rank: int, world_size: int):
        super().__init__(head)
        self.rank, self.world_size = rank, world_size

    def forward(self, batch: Batch) -> TargetOutput:
        assert batch.whole is not None
        slices = rank_slices(len(batch.whole.lengths_B), self.rank, self.world_size)
        return self._forward(batch.whole).slice(*slices)
