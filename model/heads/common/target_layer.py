"""A decoder layer of the target's own family inside a head: experts, latent attention and all.

Families whose multi-token prediction layer is no plain Llama layer (GLM-4.5, DeepSeek-V3) use one
of their target's layers there. It is built from transformers' own class and called without a cache
or a mask: its attention hands queries, keys and values to the head's `attend`, which knows them.
Sparse attention attends to all that it sees there: drafts need not be exact (sparse_attention.py).

Legend: B sequences, T positions, H query heads, C head dimension, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from headstart.model.target.sparse_attention import disable_indexer
from headstart.model.target.synthetic import one_layer

from .layers import Attend

ATTENTION = "headstart"  # the name under which transformers' layers find `_attention`
# Settings that do not describe a layer, or follow from the model type.
ELSEWHERE = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "transformers_version",
)
# Of a layer's attention, its experts, and its indexer.
KINDS = {"layer_types": "full_attention", "mlp_layer_types": "sparse", "indexer_types": "full"}


class FamilyConfig(BaseModel):
    """A family of targets, and its configuration of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_type: str = Field(description="transformers' name of the family.")
    settings: dict[str, Any] = Field(description="The family's configuration of one layer.")

    @staticmethod
    def of(config: PretrainedConfig) -> FamilyConfig:
        """From a target's configuration. The layer is one of the kind that has experts."""
        one = copy.deepcopy(config)
        one.num_hidden_layers = 1
        if hasattr(one, "first_k_dense_replace"):
            one.first_k_dense_replace = 0
        for name, kind in KINDS.items():
            if getattr(one, name, None) is not None:
                setattr(one, name, [kind])
        settings = {key: value for key, value in one.to_diff_dict().items() if key not in ELSEWHERE}
        return FamilyConfig(model_type=config.model_type, settings=settings)


class FamilyLayer(nn.Module):
    """One decoder layer of a family.

    block: transformers' layer. sparse: whether the family's attention is sparse.
    Its buffers keep their dtype when the head is converted: the biases that choose among experts
    differ by less than 16 bits can tell.
    """

    def __init__(self, config: FamilyConfig):
        super().__init__()
        self.block, self.rotary = one_layer(config.model_type, config.settings, ATTENTION)
        self.sparse = disable_indexer(self.block)
        for parameter in self.block.parameters():
            if parameter.dim() > 1:  # transformers leaves some of them as they come
                nn.init.normal_(parameter, std=0.02)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        places = positions_BT
        if hasattr(self.rotary, "mrope_section"):  # time, height and width: the same for plain text
            places = positions_BT.expand(3, *positions_BT.shape)
        output: Tensor | tuple[Tensor, ...] = self.block(
            hidden_BTD,
            # Sparse attention takes one apart; `attend` never sees it.
            attention_mask=hidden_BTD.new_zeros(1, 1, 1, 1) if self.sparse else None,
            position_ids=positions_BT,
            position_embeddings=self.rotary(hidden_BTD, places),
            attend=attend,
        )
        return output if isinstance(output, Tensor) else output[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FamilyLayer:
        kept = {id(owner): dict(owner._buffers) for owner in self.modules()}
        super()._apply(fn, recurse)
        for owner in self.modules():
            for name, before in kept[id(owner)].items():
                after = owner._buffers[name]
                if before is not None and after is not None and after.dtype != before.dtype:
                    owner._buffers[name] = before.to(after.device)
        return self


def _attention(
    module: nn.Module,
    queries_BHTC: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    attend: Attend,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """What transformers' layers call instead of attention of their own."""
    own = scaling * queries_BHTC.shape[-1] ** 0.5  # `attend` divides by the root of the channels
    if abs(own - 1) > 1e-6:
        queries_BHTC = queries_BHTC * own
    return attend(queries_BHTC, keys, values).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
