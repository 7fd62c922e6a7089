"""Grouped-query attention without copies of keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention B H T C; mask is boolean (True: may see) or additive, the same for all
    heads (B 1 T S).

    Under a mask the kernels copy each key for every query head that shares it. Here those heads
    stand side by side as more queries instead, and nothing is copied.
    """
    heads, groups = queries.shape[1], keys.shape[1]
    if mask is None or heads == groups:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
    batch, _, rows, channels = queries.shape
    shared = heads // groups
    folded = queries.reshape(batch, groups, shared * rows, channels)
    mask = mask[:, :, None].expand(-1, -1, shared, -1, -1).flatten(2, 3)
    attended = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return attended.reshape(batch, heads, rows, values.shape[-1])
