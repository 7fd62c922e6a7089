"""Whether `FusedDecoder` computes what a decoder's own modules do.

Two short sequences, one of them at the far end of the context, must come out the same. That is
tried in float32 for bfloat16 models too: on random inputs bfloat16 itself is 40 % off, which would
hide differences.

Legend: N new positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headstart.model.cache.kv_cache import KVCache

from .fused_decoder import FusedDecoder, FusedLayer, Norm
from .ops import Ops
from .visibility import AttentionWindows, Visibility

TOKENS = (5, 3, 7, 2, 6, 4, 1)
DEFAULT_CONTEXT = 1 << 16  # of models that name no limit
NOT_ALIKE = (
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ValueError,
    AssertionError,
)


class Probe:
    """Two short sequences, and what the model's own modules make of them in float32."""

    def __init__(self, decoder: Any, config: PretrainedConfig, windows: AttentionWindows):
        vocab_size = decoder.embed_tokens.num_embeddings
        device = decoder.embed_tokens.weight.device
        self.ids_1N = torch.tensor([[token % vocab_size for token in TOKENS]], device=device)
        self.num_layers, self.windows = config.num_hidden_layers, windows
        context = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.expected: list[tuple[Tensor, Tensor]] = []
        for start in (0, max(context - len(TOKENS), 0)):
            positions_1N = (torch.arange(len(TOKENS), device=device) + start)[None]
            with torch.no_grad(), _in_float32(decoder):
                theirs_1ND = decoder(
                    input_ids=self.ids_1N, position_ids=positions_1N, use_cache=False
                ).last_hidden_state
            self.expected.append((positions_1N, theirs_1ND))

    def agrees(self, fused: FusedDecoder, tolerance: float) -> bool:
        """Whether outputs agree: all tokens but the last in one pass, and then that one, for which
        some ops have kernels of their own."""
        for positions_1N, theirs_1ND in self.expected:
            cache = KVCache(1, self.num_layers, self.ids_1N.device)
            parts = [
                self._forward(fused, positions_1N, cache, part)
                for part in (slice(0, -1), slice(-1, None))
            ]
            ours_1ND = torch.cat(parts, 1)
            if not (ours_1ND - theirs_1ND).norm() <= tolerance * theirs_1ND.norm():
                return False
        return True

    @torch.no_grad()
    def _forward(
        self, fused: FusedDecoder, positions_1N: Tensor, cache: KVCache, part: slice
    ) -> Tensor:
        ids_1N = self.ids_1N[:, part]
        new = ids_1N.shape[1]
        cache.reserve(new)
        depths_1N = torch.arange(new, device=ids_1N.device)[None]
        visibility = Visibility(depths_1N, None, cache, self.windows)
        output_1ND, _ = fused.forward(ids_1N, positions_1N[:, part], cache, visibility)
        cache.commit(None, torch.full_like(cache.lengths_B, new))
        return output_1ND


def widened_decoder(
    decoder: Any, layers: nn.ModuleList, kinds: Sequence[str], ops: Ops
) -> FusedDecoder:
    """A `FusedDecoder` with weights in float32, of one layer at a time."""
    fused = FusedDecoder(decoder, layers, kinds, ops)
    fused.embed = lambda ids_BN: decoder.embed_tokens(ids_BN).float()
    fused.layers = cast(Sequence[FusedLayer], _WidenedLayers(layers, kinds))
    fused.norm = Norm(fused.norm.weight.float(), fused.norm.eps)
    fused.dtype = torch.float32
    return fused


class _WidenedLayers:
    """Layers whose weights are float32 while one is in use."""

    def __init__(self, layers: nn.ModuleList, kinds: Sequence[str]):
        self.layers, self.kinds = layers, kinds

    def __iter__(self) -> Iterator[FusedLayer]:
        for module, kind in zip(self.layers, self.kinds, strict=True):
            with _widened(module):
                yield FusedLayer(module, kind)


@contextmanager
def _widened(*modules: nn.Module) -> Iterator[None]:
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
def _in_float32(decoder: Any) -> Iterator[None]:
    """Within it, a decoder computes in float32, with wide weights of one layer at a time."""
    open_now: list[Any] = []

    def widen(module: nn.Module, *_: object) -> None:
        open_now.append(_widened(module))
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
