"""Which way a decoder is read: `Native` or `Lean` on a CPU, `Accelerated` on a GPU, or its own
modules.

No family is known by name. A model qualifies if two texts, one of them at the far end of its
context, come out as from its own modules. That is tried in float32 for bfloat16 models too: on
texts without sense their own rounding is off by 40 %, which would hide what a model does otherwise.

Legend: N new rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headstart.model.cache.kv_cache import KVCache

from . import cuda_ops as accelerated
from .cpu_ops import Native
from .cuda_ops import Accelerated
from .fused_decoder import Layer, Lean, Norm, Turn, rms_norm
from .int8 import QuantizedLinear, full_precision
from .visibility import AttentionWindows, Visibility

TEXT = (5, 3, 7, 2, 6, 4, 1)
# Largest error of a probe's outputs, by their norm. Lean and Accelerated are tried in float32;
# Native only adds its functions to Lean, and rounds as it will.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
ON_A_GPU = (torch.float32, torch.bfloat16, torch.float16)
OTHER_PARTS = (
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ValueError,
    AssertionError,
)


def shorter_way(
    decoder: nn.Module, layers: nn.ModuleList, config: PretrainedConfig
) -> Accelerated | Native | Lean | None:
    """None for a model that is built otherwise, or computes something else."""
    weight = next(decoder.parameters())
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    try:
        built = accelerated.functions(weight.device)
        if built is not None:
            return _on_a_gpu(decoder, layers, kinds, config, built)
        if not weight.is_cpu or weight.dtype not in CLOSE:
            return None
        with full_precision(decoder):  # integers would make a step of a last bit
            probe = _Probe(decoder, config)
            lean = Lean(decoder, layers, kinds)
            if not probe.agrees(_in_float32(decoder, layers, kinds), CLOSE[torch.float32]):
                return None
            native = Native.suits(lean) and probe.agrees(Native(lean), CLOSE[weight.dtype])
        if any(type(one) is QuantizedLinear for one in decoder.modules()):
            lean = Lean(decoder, layers, kinds)
        return Native(lean) if native else lean
    except OTHER_PARTS:
        return None  # or parts that work together in another way


def _on_a_gpu(
    decoder: nn.Module,
    layers: nn.ModuleList,
    kinds: Sequence[str],
    config: PretrainedConfig,
    built: ModuleType,
) -> Accelerated | None:
    alike = {(one.device, one.dtype) for one in decoder.parameters()}
    dtype = next(decoder.parameters()).dtype
    if len(alike) > 1 or dtype not in ON_A_GPU or not AttentionWindows.of(config).full_only:
        return None
    probe, lean = _Probe(decoder, config), Lean(decoder, layers, kinds)
    if not all(one.usual for one in lean.layers):
        return None
    wide = _in_float32(decoder, layers, kinds)
    wide.layers = cast(list[Layer], _Widened(layers, kinds))
    wide.norm = Norm(lean.norm.weight.float(), lean.norm.eps)
    try:
        agrees = probe.agrees(Accelerated(wide, built), CLOSE[torch.float32])
    except OTHER_PARTS:
        raise
    except Exception as error:  # a GPU may be too small for a kernel: Triton's own errors
        raise LookupError("the functions cannot be used for this model") from error
    return Accelerated(lean, built) if agrees else None


class _Probe:
    """Two short texts, and what the model's own modules make of them in float32."""

    def __init__(self, decoder: Any, config: PretrainedConfig):
        words = decoder.embed_tokens.num_embeddings
        device = decoder.embed_tokens.weight.device
        self.ids_1N = torch.tensor([[token % words for token in TEXT]], device=device)
        self.layers = config.num_hidden_layers
        self.windows = AttentionWindows.of(config)
        far = (getattr(config, "max_position_embeddings", None) or 1 << 16) - len(TEXT)
        self.seen: list[tuple[Tensor, Tensor]] = []
        for start in (0, max(far, 0)):
            positions_1N = (torch.arange(len(TEXT), device=device) + start)[None]
            with torch.no_grad(), _hooked(decoder):
                theirs = decoder(
                    input_ids=self.ids_1N, position_ids=positions_1N, use_cache=False
                ).last_hidden_state
            self.seen.append((positions_1N, theirs))

    def agrees(self, way: Accelerated | Native | Lean, tolerance: float) -> bool:
        for positions_1N, theirs_1ND in self.seen:
            cache = KVCache(1, self.layers, self.ids_1N.device)
            with torch.no_grad():
                parts = [slice(0, None)]
                if isinstance(way, Accelerated):  # which has another way for one row
                    parts = [slice(0, -1), slice(-1, None)]
                ours_1ND = torch.cat(
                    [self._forward(way, positions_1N, cache, part) for part in parts], 1
                )
            if not (ours_1ND - theirs_1ND).norm() <= tolerance * theirs_1ND.norm():
                return False
        return True

    def _forward(
        self,
        way: Accelerated | Native | Lean,
        positions_1N: Tensor,
        cache: KVCache,
        part: slice,
    ) -> Tensor:
        ids_1N = self.ids_1N[:, part]
        new = ids_1N.shape[1]
        depths_1N = torch.arange(new, device=ids_1N.device)[None]
        cache.reserve(new)
        visibility = Visibility(depths_1N, None, cache, self.windows)
        output_1ND, _ = way.forward(ids_1N, positions_1N[:, part], cache, visibility)
        cache.commit(None, torch.full_like(cache.lengths_B, new))
        return output_1ND


def _in_float32(decoder: Any, layers: nn.ModuleList, kinds: Sequence[str]) -> Lean:
    """`Lean` with wide weights, of one layer at a time."""
    lean = Lean(decoder, layers, kinds)
    lean.embed = lambda ids_BN: decoder.embed_tokens(ids_BN).float()
    wide = [_Wide(one, kind) for one, kind in zip(layers, kinds, strict=True)]

    def norm(hidden: Tensor) -> Tensor:
        with _wide(decoder.norm):
            return rms_norm(decoder.norm)(hidden)

    lean.layers, lean.norm = cast(list[Layer], wide), cast(Norm, norm)
    return lean


class _Wide:
    """A layer that is made when it is called, of weights in float32."""

    def __init__(self, module: nn.Module, kind: str):
        self.module, self.kind = module, kind

    def __call__(
        self, hidden: Tensor, turn: Turn, index: int, cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        with _wide(self.module):
            return Layer(self.module, self.kind)(hidden, turn, index, cache, mask)


class _Widened:
    """Layers with wide weights, one at a time."""

    def __init__(self, layers: nn.ModuleList, kinds: Sequence[str]):
        self.layers, self.kinds = layers, kinds

    def __iter__(self) -> Iterator[Layer]:
        for module, kind in zip(self.layers, self.kinds, strict=True):
            with _wide(module):
                yield Layer(module, kind)


@contextmanager
def _wide(*modules: nn.Module) -> Iterator[None]:
    """Within it, the weights of modules are float32."""
    weights = dict.fromkeys(weight for module in modules for weight in module.parameters())
    before = {weight: weight.data for weight in weights}
    try:
        for weight in weights:
            weight.data = weight.data.float()
        yield
    finally:
        for weight, values in before.items():
            weight.data = values


@contextmanager
def _hooked(decoder: Any) -> Iterator[None]:
    """Within it, a decoder computes in float32, with wide weights of one layer at a time."""
    open_now: list[Any] = []

    def widen(module: nn.Module, *_: object) -> None:
        open_now.append(_wide(module))
        open_now[-1].__enter__()

    def narrow(*_: object) -> None:
        open_now.pop().__exit__(None, None, None)

    modules = dict.fromkeys([*decoder.layers, decoder.norm])
    hooks = [decoder.embed_tokens.register_forward_hook(lambda _, __, hidden: hidden.float())]
    hooks += [module.register_forward_pre_hook(widen) for module in modules]
    hooks += [module.register_forward_hook(narrow, always_call=True) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
