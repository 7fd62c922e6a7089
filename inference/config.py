"""How to decode: `SamplingParams` for one request, `SpeculativeConfig` for where drafts come from.

The command line, `SpeculativeModel.generate`, the benchmark, the server and the evaluation during
training describe a decoding run with these two classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import StoppingCriteria

from headstart.model.heads.common.base import DraftHead
from headstart.model.tree.shape import TreeShape

from .tree_policy.cost_model import Costs

LogitsProcessor = Callable[..., Any]  # of transformers, or your own: (input_ids, scores) -> scores


@dataclass(frozen=True)
class SamplingParams:
    """How the target samples its tokens, and when a response ends.

    max_new_tokens: maximum tokens per response, at least 1.
    temperature: 0 is greedy decoding.
    top_k: sample from the k likeliest tokens only; None: from all.
    top_p: sample from the smallest set of tokens with this probability, in (0, 1]; None: from all.
    repetition_penalty: of tokens that the sequence already has; above 0, 1 or None: none.
    logits_processors: further processors of transformers, applied before temperature.
    seed: of the sampling noise. The same seed gives the same tokens with and without drafts.
    stop_token_ids: tokens that end a response and belong to it; None: the target's end-of-sequence
        tokens; empty: none.
    stopping_criteria: further criteria of transformers (`StopStringCriteria` for stop strings).
        They are called for one sequence at a time and get None for the scores.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    seed: int = 0
    stop_token_ids: frozenset[int] | None = None
    stopping_criteria: tuple[StoppingCriteria, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}, so there is nothing to do. Set at least "
                "1."
            )
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature is {self.temperature}. Give a finite number of at least 0, which is "
                "greedy decoding."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}. Give at least 1, or None for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}. Give a number above 0 and up to 1, or None for all tokens."
            )
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}. Give a number above 0, or None "
                "for no penalty."
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def generate_options(self) -> dict[str, Any]:
        """The same as options of `SpeculativeModel.generate` and `stream`.

        What is None here keeps the default of the model's generation config; but top_k and top_p
        are off (transformers' own default of top_k would be 50).
        """
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "seed": self.seed}
        if self.is_greedy:
            options["do_sample"] = False
        else:
            options |= {"do_sample": True, "temperature": self.temperature}
            options |= {"top_k": self.top_k or 0, "top_p": self.top_p or 1.0}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = self.repetition_penalty
        if self.logits_processors:
            options["logits_processor"] = list(self.logits_processors)
        if self.stop_token_ids is not None:
            if not self.stop_token_ids:
                raise ValueError(
                    "transformers' generate cannot be told to ignore the end-of-sequence token. "
                    "Leave stop_token_ids at None, or call `decode` of the engine."
                )
            options["eos_token_id"] = sorted(self.stop_token_ids)
        if self.stopping_criteria:
            options["stopping_criteria"] = list(self.stopping_criteria)
        return options


@dataclass(frozen=True)
class SpeculativeConfig:
    """Where drafts come from, and how many are verified. The default: none, which is
    autoregressive decoding.

    head: drafts trees; None: no head.
    shape: the draft trees; with `costs` the largest one. None: the default for the target
        (`tree_policy.defaults`).
    costs: of a decode step on this machine (`engine.measure_costs.measured_costs`); the policy then
        verifies as many draft tokens as pay. None: every tree has the whole shape.
    ngram: also draft from earlier occurrences of the sequence's last tokens (prompt lookup);
        without a head, only that.
    eager: on CUDA, launch every kernel from the host instead of replaying CUDA graphs. Decoding
        that CUDA graphs do not support (`supports_cuda_graphs`) is eager anyway.
    name: for tables and reports.
    """

    head: DraftHead | None = None
    shape: TreeShape | None = None
    costs: Costs | None = None
    ngram: bool = False
    eager: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        if self.shape is not None and not isinstance(self.shape, TreeShape):
            raise ValueError(
                f"A tree is given as a TreeShape, got {self.shape!r}. For example "
                "TreeShape.chain(4)."
            )
        if not self.drafts and (self.shape is not None or self.costs is not None):
            raise ValueError(
                "A tree shape or step costs are given, but nothing drafts. Pass a head or "
                "ngram=True, or leave both away for autoregressive decoding."
            )

    @property
    def drafts(self) -> bool:
        """Whether anything drafts; if not, decoding is autoregressive."""
        return self.head is not None or self.ngram
