"""Reads of a tree without a copy of every key for each query head that shares it.

transformers repeats the keys and values of grouped heads whenever a mask is given, so a tree of a
few nodes behind a long text would spend its time on copies: 16 ms instead of 1 ms for a layer of
SmolLM2 with 8 nodes behind 2,048 tokens. `shared_keys` replaces its SDPA function while a target
reads; what this one does not know it hands on.

Legend: B batch rows, T new positions, H query heads, C head channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headstart.model.backends.torch_ops import grouped_attention

SDPA = "sdpa"


@contextmanager
def shared_keys() -> Iterator[None]:
    """Within it, models with SDPA attention leave shared keys where they are."""
    before = ALL_ATTENTION_FUNCTIONS[SDPA]
    ALL_ATTENTION_FUNCTIONS[SDPA] = _sdpa
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[SDPA] = before


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attended values B x T x H x C, as transformers' own function gives them."""
    known = (
        attention_mask is not None
        and attention_mask.shape[1] == 1
        and query.shape[1] != key.shape[1]
        and not dropout
        and options.get("position_bias") is None
    )
    if not known:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    attended_BHTC = grouped_attention(query, key, value, attention_mask, scale=scaling)
    return attended_BHTC.transpose(1, 2).contiguous(), None
