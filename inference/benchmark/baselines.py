"""transformers' own `generate` as a runner of the benchmark.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from headstart.inference.config import SamplingParams

from .metrics import RunMetrics


class TransformersRunner:
    """transformers' `generate` on a copy of the model that Headstart has not touched.

    options: of `generate`, such as prompt_lookup_num_tokens or use_mtp. With any of them it takes
        one prompt at a time, as `generate` demands.

    A decode step is a forward pass of the model; its acceptance length counts the prefill too.
    """

    same_noise = False

    def __init__(self, model: PreTrainedModel, eos_ids: Sequence[int], pad_id: int, **options: Any):
        # A model's own settings may ask for penalties, which Headstart's runs do not apply.
        model.generation_config = GenerationConfig(
            eos_token_id=list(eos_ids) or None, pad_token_id=pad_id
        )
        self.model, self.eos_ids, self.options = model, frozenset(eos_ids), options
        self.device = model.device
        self.max_batch_size: int | None = 1 if options else None

    def generate(
        self, tokens_BT: Tensor, mask_BT: Tensor, sampling: SamplingParams, metrics: RunMetrics
    ) -> list[list[int]]:
        options: dict[str, Any] = {"do_sample": False}
        if not sampling.is_greedy:
            torch.manual_seed(sampling.seed)
            options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0}
        passes: list[None] = []
        hook = self.model.register_forward_pre_hook(lambda *_: passes.append(None))
        try:
            generate: Any = self.model.generate
            ids_BT = generate(
                tokens_BT.to(self.device),
                attention_mask=mask_BT.to(self.device),
                max_new_tokens=sampling.max_new_tokens,
                **options,
                **self.options,
            )
        finally:
            hook.remove()
        responses = [self._without_padding(ids) for ids in ids_BT[:, tokens_BT.shape[1] :].tolist()]
        tokens = sum(map(len, responses))
        metrics.stats.num_tokens += tokens
        metrics.stats.num_steps += len(passes) if len(responses) == 1 else tokens
        metrics.decode_steps += len(passes) - 1
        return responses

    def _without_padding(self, tokens: list[int]) -> list[int]:
        """A response up to its first end-of-sequence token."""
        ends = (place for place, token in enumerate(tokens) if token in self.eos_ids)
        return tokens[: next(ends, len(tokens)) + 1]
