"""Shared by tests: decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from families import FAMILIES, padded, prompts
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.engine.stats import Stats
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

NEW_TOKENS = 24
LENGTHS = {1: [13], 3: [11, 4, 17]}
SHAPES = {
    "chain": TreeShape.chain(4),
    "static": TreeShape.static(
        [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    ),
    "dynamic": TreeShape.dynamic(nodes=10, depth=4, width=3),
}
SAMPLINGS = {
    "temperature": SamplingParams(temperature=1.0, seed=5),
    "top-k": SamplingParams(temperature=0.8, top_k=12, seed=6),
    "top-p": SamplingParams(temperature=1.2, top_p=0.8, seed=7),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.3, top_k=20, seed=8),
    "greedy penalty": SamplingParams(repetition_penalty=1.5),
}
GREEDY = SamplingParams(NEW_TOKENS)


def sampling_of(name: str, new_tokens: int = NEW_TOKENS) -> SamplingParams:
    """One of SAMPLINGS; greedy without a name."""
    return replace(SAMPLINGS[name] if name else GREEDY, max_new_tokens=new_tokens)


@cache
def target_of(family: str) -> Target:
    return wrap_target(FAMILIES[family]())


@cache
def batch(family: str, rows: int) -> tuple[Tensor, Tensor]:
    """Ragged prompts and their mask: the first whose answers prove something.

    A target that repeats itself would not, and where two tokens are all but equally likely,
    rounding decides, which is not the same for one row as for ten.
    """
    for seed in range(40):
        ids_BT, lengths_B = padded(prompts(LENGTHS[rows], seed))
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        steps = decode(target_of(family), ids_BT, mask_BT, sampling=GREEDY)
        told = answers(steps, rows)
        varied = all(len(set(answer)) > 3 for answer in told)
        if varied and smallest_margin(family, prompts(LENGTHS[rows], seed), told) > 1e-3:
            return ids_BT, mask_BT
    raise AssertionError(f"{family} repeats itself or wavers after every prompt")


@torch.no_grad()
def smallest_margin(family: str, texts: list[Tensor], told: list[list[int]]) -> float:
    """Between the likeliest and the next token, over all tokens of the answers."""
    margins = []
    for text_T, answer in zip(texts, told, strict=True):
        whole_1T = torch.cat([text_T, torch.tensor(answer)])[None]
        logits_TV = target_of(family).model(whole_1T).logits[0, len(text_T) - 1 : -1]
        best_T2 = logits_TV.topk(2).values
        margins.append(float((best_T2[:, 0] - best_T2[:, 1]).min()))
    return min(margins)


def answers(steps: Iterator[list[list[int]]], rows: int) -> list[list[int]]:
    told: list[list[int]] = [[] for _ in range(rows)]
    for step in steps:
        for answer, tokens in zip(told, step, strict=True):
            answer += tokens
    return told


@cache
def reference(family: str, rows: int, sampling: str = "") -> list[list[int]]:
    steps = decode(target_of(family), *batch(family, rows), sampling=sampling_of(sampling))
    told = answers(steps, rows)
    assert all(len(answer) == NEW_TOKENS and len(set(answer)) > 3 for answer in told)
    return told


def speculative(
    family: str,
    head: DraftHead,
    rows: int,
    shape: TreeShape,
    *,
    sampling: str = "",
    new_tokens: int = NEW_TOKENS,
) -> tuple[list[list[int]], Stats]:
    stats = Stats()
    steps = decode(
        target_of(family),
        *batch(family, rows),
        sampling=sampling_of(sampling, new_tokens),
        speculative=SpeculativeConfig(head, shape),
        stats=stats,
    )
    return answers(steps, rows), stats
