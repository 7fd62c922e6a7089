"""The LM head of a target: logits of all tokens, or of a subset of the vocabulary.

Legend: R any leading dimensions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from headstart.model.backends.int8 import Int8
from headstart.model.backends.linear import packed, weight_version


@dataclass(frozen=True)
class LogitsRule:
    """What a family does to the LM head's output: divide, multiply, cap. 0 leaves a step out."""

    divide: float = 0.0
    multiply: float = 0.0
    cap: float = 0.0

    @staticmethod
    def of(config: PretrainedConfig) -> LogitsRule:
        settings = config.to_dict()
        return LogitsRule(
            divide=settings.get("logits_scaling") or 0.0,  # Granite
            multiply=settings.get("logit_scale") or 0.0,  # Cohere
            cap=settings.get("final_logit_softcapping") or 0.0,  # Gemma
        )

    def __call__(self, logits: Tensor) -> Tensor:
        if self.divide:
            logits = logits / self.divide
        if self.multiply:
            logits = logits * self.multiply
        if self.cap:
            logits = (logits / self.cap).tanh() * self.cap
        return logits


SUBSETS = 4  # token subsets whose rows are cached


class LMHead:
    """linear: the model's own LM head. finish: how the family scales or caps logits."""

    def __init__(self, linear: nn.Linear, finish: LogitsRule):
        self.linear, self.finish = linear, finish
        self._subsets: list[tuple[Tensor, tuple[int, int], nn.Linear]] = []

    def __call__(self, hidden_RD: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Logits R x V of all tokens, or of `token_ids`."""
        return self.finish(self.rows(token_ids)(hidden_RD))

    def draft_logits(
        self, token_ids: Tensor | None, *, rounded: bool
    ) -> Callable[[Tensor], Tensor]:
        """As a call with these tokens, for draft tokens. rounded: compute in 8-bit integers."""
        if not rounded:
            rows = self.rows(token_ids)  # held by the closure
            return lambda hidden_RD: self.finish(rows(hidden_RD))
        weight_VD: Tensor = self.linear.weight
        bias_V: Tensor | None = self.linear.bias
        if token_ids is not None:
            weight_VD = weight_VD[token_ids]
        if bias_V is not None and token_ids is not None:
            bias_V = bias_V[token_ids]
        product = Int8(weight_VD.float(), None if bias_V is None else bias_V.float())
        return lambda hidden_RD: self.finish(product(hidden_RD))

    def rows(self, token_ids: Tensor | None) -> nn.Linear:
        """The rows of some tokens, cached for the tensors that were passed last."""
        if token_ids is None:
            return self.linear
        content = weight_version(token_ids)
        for ids, seen_content, rows in self._subsets:
            if ids is token_ids and seen_content == content:
                return rows
        # Rows made in inference mode could not be trained through afterwards.
        with torch.inference_mode(False), torch.no_grad():
            rows = self._gathered(token_ids)
        self._subsets = [(token_ids, content, rows), *self._subsets[: SUBSETS - 1]]
        return rows

    def _gathered(self, token_ids: Tensor) -> nn.Linear:
        whole = self.linear
        rows = nn.Linear(whole.in_features, len(token_ids), whole.bias is not None, "meta")
        rows.weight = nn.Parameter(whole.weight[token_ids], requires_grad=False)
        if whole.bias is not None:
            rows.bias = nn.Parameter(whole.bias[token_ids], requires_grad=False)
        return packed(rows)
