"""Quantise a target to 8-bit integers; its own output is then the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from headstart.model.backends.int8 import available, full_precision
from headstart.model.backends.torch_ops import exact_attention

from .gqa_attention import UNKNOWN
from .sparse_attention import indexers

KINDS = ("int8",)
EXACT = "headstart_exact"  # the name under which transformers knows `_exact_attention`
_calls: ContextVar[list[nn.Module] | None] = ContextVar("calls", default=None)


def check_kind(kind: str | None) -> None:
    """ValueError for a quantisation that does not exist."""
    if kind not in (None, *KINDS):
        raise ValueError(f"Unknown quantisation {kind!r}. There is: {', '.join(KINDS)}.")


@dataclass(frozen=True)
class QuantizationError:
    """How far the quantised model is from its float32 weights on some sequences.

    tokens: number of positions compared.
    agreement: share of them whose top-1 next token is the same.
    divergence: mean KL divergence of the quantised from the float32 distribution, in nats.
    """

    tokens: int
    agreement: float
    divergence: float


@torch.no_grad()
def quantization_report(model: PreTrainedModel, sequences: Sequence[Tensor]) -> QuantizationError:
    """Compare a quantised model with its float32 weights on sequences (1-D token ids)."""
    tokens, same, divergence = 0, 0, 0.0
    for ids_T in sequences:
        ours_TV = model(ids_T[None], use_cache=False).logits[0].log_softmax(-1)
        with full_precision(model):
            full_TV = model(ids_T[None], use_cache=False).logits[0].log_softmax(-1)
        tokens += len(ids_T)
        same += int((ours_TV.argmax(-1) == full_TV.argmax(-1)).sum())
        divergence += float((full_TV.exp() * (full_TV - ours_TV)).sum())
    return QuantizationError(tokens, same / tokens, divergence / tokens)


def check_quantizable(model: PreTrainedModel, name: str) -> None:
    """ValueError for models that cannot be computed in 8-bit integers."""
    if not available():
        raise ValueError(
            f"{name} cannot be quantised here: products of integers are built with a C compiler, "
            "and that failed. Install gcc or clang, or leave quantisation out."
        )
    for weight in model.parameters():
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            kind = str(weight.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} has {kind} weights on {weight.device.type}, and only float32 weights on a "
                "CPU can be quantised. Load it with dtype float32 on the CPU, or leave "
                "quantisation out."
            )
    if indexers(model):
        raise ValueError(
            f"{name} has sparse attention, which is not computed in integers. Leave "
            "quantisation out."
        )
    for path, module in model.named_modules():
        matrices = [one for one in module.parameters(recurse=False) if one.dim() > 1]
        if matrices and type(module) is not nn.Linear and not isinstance(module, nn.Embedding):
            raise ValueError(
                f"{name} has weights outside plain linear layers ({path}, a "
                f"{type(module).__name__}), which cannot be quantised. Leave quantisation out."
            )


@torch.no_grad()
def use_exact_attention(model: PreTrainedModel, name: str) -> None:
    """Let a model sum its attention in float64 from now on (see backends/int8.py for why).

    ValueError where the model's code computes attention without transformers' interface.
    """
    ids_1T = torch.tensor([[1, 2, 3]])
    before = model(input_ids=ids_1T, use_cache=False).logits
    model.set_attn_implementation(EXACT)
    try:
        with _counted() as calls:
            after = model(input_ids=ids_1T, use_cache=False).logits
    except ValueError as error:
        raise ValueError(f"{name} cannot be quantised: {error} Leave quantisation out.") from error
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if len(calls) != layers or not (after - before).norm() <= 1e-3 * before.norm():
        raise ValueError(
            f"{name} computes its attention in its own way, which does not sum a tree of tokens "
            "like single ones to the last bit. Leave quantisation out."
        )


@contextmanager
def _counted() -> Iterator[list[nn.Module]]:
    """Collect the modules that call `_exact_attention` in this thread while the model runs."""
    calls: list[nn.Module] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def _exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`exact_attention` as transformers calls it; returns B x N x H x C."""
    calls = _calls.get()
    if calls is not None:
        calls.append(module)
    odd = [name for name in UNKNOWN if options.get(name) is not None]
    if odd:
        raise ValueError(f"its attention has {odd[0]}, which is not known here.")
    attended = exact_attention(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXACT, _exact_attention)
AttentionMaskInterface.register(EXACT, sdpa_mask)
