"""The law: speculative decoding writes what plain decoding writes, token for token.

In float32, for every family of targets, every head kind, chain, static and dynamic trees, one
prompt and a ragged batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from families import FAMILIES, padded, prompts
from oracle import Oracle
from torch import Tensor

from headstart.inference.decode import Stop, decode, plain
from headstart.inference.sampling import Sampler
from headstart.inference.stats import Stats
from headstart.model.head import DraftHead, kinds, make_head
from headstart.model.target import Target
from headstart.model.tree import TreeShape

NEW_TOKENS = 24
LENGTHS = {1: [13], 3: [11, 4, 17]}
SHAPES = {
    "chain": TreeShape.chain(4),
    "static": TreeShape.static(
        [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]]
    ),
    "dynamic": TreeShape.dynamic(nodes=10, depth=4, width=3),
}
SAMPLERS = {
    "temperature": lambda: Sampler.of(1.0, seed=5),
    "top-k": lambda: Sampler.of(0.8, top_k=12, seed=6),
    "top-p": lambda: Sampler.of(1.2, top_p=0.8, seed=7),
    "penalty": lambda: Sampler.of(1.0, repetition_penalty=1.3, top_k=20, seed=8),
    "greedy penalty": lambda: Sampler.of(0.0, repetition_penalty=1.5),
}


@cache
def target_of(family: str) -> Target:
    return Target.wrap(FAMILIES[family]())


@cache
def batch(family: str, rows: int) -> tuple[Tensor, Tensor]:
    """Ragged prompts and their mask: the first whose answers prove something.

    A target that repeats itself would not, and where two tokens are all but equally likely,
    rounding decides, which is not the same for one row as for ten.
    """
    for seed in range(40):
        ids_BT, lengths_B = padded(prompts(LENGTHS[rows], seed))
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        steps = plain(target_of(family), ids_BT, mask_BT, sampler=Sampler(), stop=Stop(NEW_TOKENS))
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
def reference(family: str, rows: int, sampler: str = "") -> list[list[int]]:
    drawn_by = SAMPLERS[sampler]() if sampler else Sampler()
    steps = plain(target_of(family), *batch(family, rows), sampler=drawn_by, stop=Stop(NEW_TOKENS))
    told = answers(steps, rows)
    assert all(len(answer) == NEW_TOKENS and len(set(answer)) > 3 for answer in told)
    return told


def speculative(
    family: str,
    head: DraftHead,
    rows: int,
    shape: TreeShape,
    *,
    sampler: str = "",
    new_tokens: int = NEW_TOKENS,
) -> tuple[list[list[int]], Stats]:
    stats = Stats()
    steps = decode(
        target_of(family),
        head,
        *batch(family, rows),
        sampler=SAMPLERS[sampler]() if sampler else Sampler(),
        stop=Stop(new_tokens),
        shape=shape,
        stats=stats,
    )
    return answers(steps, rows), stats


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_that_are_often_right(family: str) -> None:
    """Deep paths, side branches and rejections all occur, and none of them shows."""
    deep = rejected = side = 0
    for rows in LENGTHS:
        expected = reference(family, rows)
        for shape in SHAPES.values():
            oracle = Oracle(target_of(family), expected)
            told, stats = speculative(family, oracle, rows, shape)
            assert told == expected
            assert stats.tau > 1.2
            deep += stats.accepted[2]
            rejected += stats.tried[0] - stats.accepted[0]
            side += oracle.side_branches
    assert deep >= 5 and rejected >= 5 and side >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_kind(family: str) -> None:
    """Untrained heads: almost everything is rejected."""
    target, new_tokens = target_of(family), 8
    for kind in kinds():
        torch.manual_seed(0)
        head = make_head(target, kind, {}).eval()
        head.init_from_target()
        for shape in SHAPES.values():
            for rows in LENGTHS:
                told, stats = speculative(family, head, rows, shape, new_tokens=new_tokens)
                expected = [answer[:new_tokens] for answer in reference(family, rows)]
                assert told == expected, (kind, shape, rows)
                assert stats.tried[0] > 0, "nothing was drafted"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "glm_moe_dsa", "gpt2"])
def test_seeded_sampling_is_an_equality_too(family: str, sampler: str) -> None:
    for rows in LENGTHS:
        expected = reference(family, rows, sampler)
        assert expected != reference(family, rows)
        for shape in SHAPES.values():
            told, stats = speculative(
                family, Oracle(target_of(family), expected), rows, shape, sampler=sampler
            )
            assert told == expected
            assert sum(stats.accepted) > 5


def test_a_tree_of_one_child_per_node_is_the_chain() -> None:
    expected = reference("llama", 3)
    runs = []
    for shape in (TreeShape.chain(3), TreeShape.static([[0], [0, 0], [0, 0, 0]])):
        told, stats = speculative("llama", Oracle(target_of("llama"), expected), 3, shape)
        assert told == expected
        runs.append((stats.rounds, stats.accepted, stats.tried))
    assert runs[0] == runs[1]


def test_a_row_of_a_batch_is_what_it_is_alone() -> None:
    together = reference("mistral", 3)
    ids_BT, mask_BT = batch("mistral", 3)
    for row, expected in enumerate(together):
        text_1T = ids_BT[row, mask_BT[row] == 1][None]
        alone = plain(target_of("mistral"), text_1T, sampler=Sampler(), stop=Stop(NEW_TOKENS))
        assert answers(alone, 1) == [expected]
