"""A target in 8-bit integers, for reads of a few rows on a CPU, where reading the weights is what
costs the time.

A weight is a whole number from -127 to 127 times a scale per output row. An activation is a whole
number times a scale per token, in two digits: 63 coarse steps, each of 64 fine ones. Both digits go
through the same integer product as two rows, and on a CPU a second row costs little. One digit
alone would not do; SmolLM2-135M-Instruct against float32 on 2,179 tokens of its chats:

    weights   activations          same likeliest token   divergence (nats)
    float32   one digit            78.5 %                 0.177
    8 bits    one digit            77.3 %                 0.197
    8 bits    8 bits               89.0 %                 0.050
    8 bits    two digits           96.3 %                 0.0053
    8 bits    float32              96.4 %                 0.0053

With 64 added, a digit is at most 127: on processors without VNNI the kernel adds two products in 16
bits, and larger ones would not fit.

Exact stays exact. Integer sums do not depend on their order, so a token's product is the same
number whether it is read alone or in a tree. Attention is not made of integers: it sums in another
order over a tree's columns, and a difference in the last bit that falls on the border between two
steps becomes a whole step in the next layer: logits of the same token differed by 0.1, and 3 of 10
answers. So it is computed in float64, where such a difference is lost when the result becomes
float32: logits agree to the last bit.

Legend: B batch rows, N new rows, H query heads, G key/value heads, C head channels, S columns,
R rows (any leading dimensions), K input width, V output width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from . import kernels
from .families import probe
from .layers import grouped_attention
from .sparse import indexers

if TYPE_CHECKING:
    from .target import Target

KINDS = ("int8",)
EXACT = "headstart_exact"  # the attention of quantised models, as transformers calls it
LEVELS = 127  # of a weight, to each side
SMALLEST = 1e-30  # scale of a row of zeros
SHORT = kernels.LONG  # tokens of a prompt whose attention is cheap in float64
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


def quantize_linears(module: nn.Module) -> None:
    """Let every linear layer compute in 8-bit integers."""
    for one in module.modules():
        if type(one) is nn.Linear:
            one.__class__ = QuantizedLinear


def available() -> bool:
    """Whether products of integers can be built here."""
    return kernels.functions() is not None


class QuantizedLinear(nn.Linear):
    """A linear layer in 8-bit integers. Made by `quantize`. Its weights must not change."""

    _int8: Int8 | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self._int8 is None:
            self._int8 = Int8(self.weight, self.bias)
        return self._int8(input)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which make their own integers."""
        return {name: value for name, value in vars(self).items() if name != "_int8"}


class Int8:
    """The product of linear layers that read the same input, their outputs side by side."""

    def __init__(self, weight_VK: Tensor, bias_V: Tensor | None):
        """RuntimeError where the functions in C cannot be built."""
        built = kernels.functions()
        if built is None:
            raise RuntimeError("Products of 8-bit integers need a C compiler.")
        self._built = built
        self.outputs, self.inputs = weight_VK.shape
        # in float64, so that the largest weight of a row is exactly the last level
        wide_VK = weight_VK.detach().double()
        scale_V1 = wide_VK.abs().amax(1, keepdim=True).clamp_min(SMALLEST) / LEVELS
        levels_VK = (wide_VK / scale_V1).round().to(torch.int8).contiguous()
        self._scales_V = scale_V1[:, 0].float()
        self._bias_V = None if bias_V is None else bias_V.detach().float().contiguous()
        columns = built.packed_outputs(self.outputs)
        self._packed = torch.empty(columns * padded(self.inputs), dtype=torch.int8)
        self._zeros = torch.empty(columns, dtype=torch.int32)
        room = self._packed.data_ptr(), self._zeros.data_ptr()
        built.pack(self.outputs, self.inputs, levels_VK.data_ptr(), *room)

    def __call__(self, hidden_RK: Tensor) -> Tensor:
        """R x V; each row depends on the same row of the input alone, to the last bit."""
        if hidden_RK.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "A quantised target has no gradients. Load it without quantisation to train with."
            )
        shape = hidden_RK.shape[:-1]
        hidden_RK = hidden_RK.reshape(-1, self.inputs).float().contiguous()
        rows = len(hidden_RK)
        digits, scales_R = empty_digits(rows, self.inputs)
        room = digits.data_ptr(), kernels.DIGITS, scales_R.data_ptr()
        self._built.convert(rows, self.inputs, hidden_RK.data_ptr(), *room)
        return self.product(digits, scales_R).view(*shape, self.outputs)

    def product(self, digits: Tensor, scales_R: Tensor) -> Tensor:
        """R x V of rows of digits."""
        rows = len(scales_R)
        result_RV = torch.empty(rows, self.outputs)
        bias = None if self._bias_V is None else self._bias_V.data_ptr()
        self._built.multiply(
            rows, self.outputs, self.inputs, digits.data_ptr(), scales_R.data_ptr(),
            self._packed.data_ptr(), self._zeros.data_ptr(), self._scales_V.data_ptr(), bias,
            result_RV.data_ptr(),
        )  # fmt: skip
        return result_RV


def padded(width: int) -> int:
    """The length of a row of digits."""
    return -(-width // kernels.GROUP) * kernels.GROUP


def empty_digits(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Room for the digits and the scales of rows, in the order of c/rows.h."""
    return torch.empty(2 * rows, padded(width), dtype=torch.uint8), torch.empty(rows)


def exact_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Softmax attention B H N C, the same for a row whatever is read beside it.

    mask: boolean (True: may see) or additive, B 1 N S. None: every row sees the columns up to its
    own. A prompt that nothing is in front of is the same in plain and in tree decoding, so long
    ones stay in float32.
    """
    new, columns = queries.shape[2], keys.shape[2]
    causal = mask is None and new > 1
    assert not causal or new == columns, "nothing says which columns a row sees"
    if SHORT < new == columns:
        return grouped_attention(queries, keys, values, mask, causal, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    wide = queries.double(), keys.double(), values.double()
    return grouped_attention(*wide, mask, causal, scale).to(queries.dtype)


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


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within it, a quantised model computes with its float32 weights."""
    layers: list[nn.Module] = [one for one in model.modules() if type(one) is QuantizedLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = QuantizedLinear


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
