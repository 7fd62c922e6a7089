"""Quantise a target to 8-bit integers; its own output is then the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .probe import probe
from .sparse_attention import indexers

if TYPE_CHECKING:
    from .target import Target
from headstart.model.backends.int8 import (
    available,
    full_precision,
    quantize_linears,
)
from headstart.model.backends.torch_ops import exact_attention

KINDS = ("int8",)
EXACT = "headstart_exact"  # the attention of quantised models, as transformers calls it
UNKNOWN = ("softcap", "s_aux", "position_bias")  # what else an attention of transformers can have


def check_kind(kind: str | None) -> None:
    """ValueError for a quantisation that does not exist."""
    if kind not in (None, *KINDS):
        raise ValueError(f"Unknown quantisation {kind!r}. There is: {', '.join(KINDS)}.")


def quantize(target: Target, kind: str) -> None:
    """Let a target compute in 8-bit integers from now on. ValueError if it cannot.

    kind: one of `KINDS`. The float32 weights stay, so what is saved, hashed and borrowed does not
    change. The integers come to them, made at the first read: they add a quarter to the memory.
    """
    model, name = target.model, target.name
    check_kind(kind)
    _refuse(model, name)
    _take_attention(model, name)
    probe(target)  # trees too are read with another attention now
    quantize_linears(model)


@dataclass(frozen=True)
class Change:
    """What quantising changed on some texts.

    tokens: read. agreement: share of them after which the likeliest next token stayed the same.
    divergence: mean KL divergence of the quantised distribution from the full one, in nats.
    """

    tokens: int
    agreement: float
    divergence: float


@torch.no_grad()
def quantization_report(model: PreTrainedModel, texts: Sequence[Tensor]) -> Change:
    """Read texts (1-D token ids) with a quantised model and with its float32 weights."""
    tokens, same, divergence = 0, 0, 0.0
    for text_T in texts:
        ours_TV = model(text_T[None], use_cache=False).logits[0].log_softmax(-1)
        with full_precision(model):
            full_TV = model(text_T[None], use_cache=False).logits[0].log_softmax(-1)
        tokens += len(text_T)
        same += int((ours_TV.argmax(-1) == full_TV.argmax(-1)).sum())
        divergence += float((full_TV.exp() * (full_TV - ours_TV)).sum())
    return Change(tokens, same / tokens, divergence / tokens)


def _refuse(model: PreTrainedModel, name: str) -> None:
    """ValueError for what integers do not work with."""
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
def _take_attention(model: PreTrainedModel, name: str) -> None:
    """Replace a model's attention. ValueError if its code does not let us."""
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
    """The modules whose attention is computed here, while the model runs."""
    calls: list[nn.Module] = []

    def attend(module: nn.Module, *states: Any, **options: Any) -> tuple[Tensor, None]:
        calls.append(module)
        return _attend(module, *states, **options)

    AttentionInterface.register(EXACT, attend)
    try:
        yield calls
    finally:
        AttentionInterface.register(EXACT, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`exact_attention` as transformers calls it: gives B x N x H x C."""
    odd = [name for name in UNKNOWN if options.get(name) is not None]
    if odd:
        raise ValueError(f"its attention has {odd[0]}, which is not known here.")
    attended = exact_attention(query, key, value, attention_mask, scaling)
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXACT, _attend)
AttentionMaskInterface.register(EXACT, sdpa_mask)
