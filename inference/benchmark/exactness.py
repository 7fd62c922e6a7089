"""Compares responses with the autoregressive ones: the first difference, and its margin.

Legend: B sequences, T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headstart.inference.config import SamplingParams
from headstart.inference.engine.sampler import Sampler
from headstart.model.target.target import Target

from .metrics import Case, Difference, RunMetrics


def compare_responses(
    target: Target,
    batch: Sequence[Case],
    sampling: SamplingParams,
    expected: Sequence[list[int]],
    responses: Sequence[list[int]],
    metrics: RunMetrics,
) -> None:
    """Count identical responses of a batch, and note where the others first differ.

    expected: the autoregressive responses, decoded with the same sampling parameters.
    """
    for number, (case, right, response) in enumerate(zip(batch, expected, responses, strict=True)):
        metrics.compared += 1
        metrics.identical += response == right
        if response != right:
            position = first_difference(response, right)
            margin = top2_margin(target, [*case.tokens, *right[:position]], sampling, number)
            metrics.differences.append(Difference(case.id, position, margin))


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    """The first position where two sequences differ, the end of the shorter one included."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))


def top2_margin(
    target: Target, token_ids: Sequence[int], sampling: SamplingParams, number: int
) -> float:
    """Distance of the two best scores of the next token, in logits, sampling noise included.

    number: of the sequence in its batch, which the noise depends on.
    """
    sampler = Sampler.of(sampling)
    output = target.forward(torch.tensor([token_ids], device=target.device), logits=False)
    with torch.no_grad():
        logits_1V = target.unembed(output.lm_head_input_BTD[:, -1])
        scores_1V = sampler.scores(logits_1V, [], [number])
    if sampler.sample:
        scores_1V = scores_1V + sampler.noise([number], [len(token_ids)], scores_1V)
    best, second = scores_1V[0].topk(2).values.tolist()
    return float(best - second)
