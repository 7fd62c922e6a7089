"""The layers of a target, run through the model's own modules.

`FusedDecoder` (model/backends/) computes the same behind the same `forward`, for the passes that it
accepts.

Legend: B sequences, N new positions, S cache slots, D hidden size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headstart.model.backends.visibility import AdditiveMask, AttentionWindows, Visibility
from headstart.model.cache.kv_cache import KVCache

from .modules import cache_kwarg

# Input of the LM head, B x N x D, and the outputs of the tapped layers by their index.
DecoderOutput = tuple[Tensor, dict[int, Tensor]]


class ModuleDecoder:
    """A decoder run through its own modules.

    module: the model below the LM head.
    layers: its decoder layers.
    dtype: of its hidden states.
    windows: how far each kind of layer looks back.
    recurrent: whether layers have states, so that it takes chains of one sequence and no trees.
    """

    recurrent = False

    def __init__(
        self,
        module: nn.Module,
        layers: nn.ModuleList,
        config: PretrainedConfig,
        dtype: torch.dtype,
    ):
        self.module, self.layers, self.dtype = module, layers, dtype
        self.windows = AttentionWindows.of(config)
        self._cache_kwarg = cache_kwarg(module)

    def new_cache(self, batch_size: int, device: torch.device) -> KVCache:
        """An empty cache."""
        return KVCache(batch_size, len(self.layers), device)

    def forward(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        cache: KVCache | None,
        visibility: Visibility | None,
        taps: Sequence[int] = (),
    ) -> DecoderOutput:
        """Run all layers.

        positions_BN: positions in the sequence.
        cache, visibility: None for whole sequences, of which nothing is kept.
        taps: layers (0-based) whose outputs are returned too.
        """
        mask: AdditiveMask | None = None  # None: the model makes its own causal mask
        if visibility is None:
            mask = self.windows.whole_sequence_mask(ids_BN, self.dtype)
        elif not visibility.is_causal:
            mask = visibility.additive(self.dtype)
        return self.run(ids_BN, positions_BN, mask, cache, taps)

    def run(
        self,
        ids_BN: Tensor,
        positions_BN: Tensor,
        mask: AdditiveMask | None,
        cache: KVCache | None,
        taps: Sequence[int],
    ) -> DecoderOutput:
        """Call the module with a mask B x 1 x N x S, or one for each kind of attention."""
        by_kind: Any = self._mask_argument(mask)
        with self._tapped(taps) as hidden_states:
            lm_head_input_BND: Tensor = self.module(
                input_ids=ids_BN,
                attention_mask=by_kind,
                position_ids=positions_BN,
                use_cache=cache is not None,
                **{self._cache_kwarg: cache},
            ).last_hidden_state
        return lm_head_input_BND, hidden_states

    def _mask_argument(self, mask: AdditiveMask | None) -> Any:
        """The mask as the module takes it."""
        return mask

    @contextmanager
    def _tapped(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of layers while the module runs in this thread."""
        hidden_states: dict[int, Tensor] = {}
        thread = threading.get_ident()  # others may run the same module

        def tap(layer: int) -> torch.utils.hooks.RemovableHandle:
            def keep(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                if threading.get_ident() == thread:
                    hidden_states[layer] = output if isinstance(output, Tensor) else output[0]

            return self.layers[layer].register_forward_hook(keep)

        handles = [tap(layer) for layer in taps]
        try:
            yield hidden_states
        finally:
            for handle in handles:
                handle.remove()
