"""Processed logits and noise: a tree node gets what its prefix would get.

Legend: B batch rows, N tree nodes, M texts, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.logits_process import LogitsProcessor

from headstart.inference.config import SamplingParams
from headstart.inference.engine.sampler import Sampler, argmax
from headstart.model.tree.tree import Tree

VOCAB = 11
TREE = Tree(
    torch.tensor([[3, 1, 2, 1, 5], [4, 6, 7, 0, 0]]),
    torch.tensor([[-1, 0, 0, 2, 3], [-1, 0, 1, -1, -1]]),
    torch.zeros(2, 5),
)
PREFIXES = [torch.tensor([1, 2, 9, 3]), torch.tensor([0, 0, 0, 5, 6, 7, 6, 4])]
TEXTS = [[1, 2, 9, 3], [4, 4, 1, 2, 5], [2, 2, 9, 8], [0, 0, 5, 6, 7, 6, 4, 6]]


def one_by_one(processors: list[LogitsProcessor], logits_MV: Tensor) -> Tensor:
    """Every text through the processors, alone."""
    through = LogitsProcessorList(processors)
    rows = zip(TEXTS, logits_MV.clone(), strict=True)
    return torch.cat([through(torch.tensor([text]), logits_V[None]) for text, logits_V in rows])


class Shifted(LogitsProcessor):
    """A processor of a user's own: forbids the token that comes after the last one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, (input_ids[:, -1:] + 1) % VOCAB, -math.inf)


def sampler_of(temperature: float, **settings: Any) -> Sampler:
    return Sampler.of(SamplingParams(temperature=temperature, **settings))


@pytest.mark.parametrize(
    "processors",
    [
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.8)],
        [RepetitionPenaltyLogitsProcessor(1.7)],
        [NoRepeatNGramLogitsProcessor(2)],
        [MinLengthLogitsProcessor(6, torch.tensor([2, 3]))],
        [RepetitionPenaltyLogitsProcessor(1.3), TopKLogitsWarper(4), Shifted()],
        [Shifted(), TemperatureLogitsWarper(2.0), NoRepeatNGramLogitsProcessor(3)],
    ],
    ids=lambda processors: "+".join(type(one).__name__[:12] for one in processors),
)
def test_a_text_gets_what_it_gets_alone(processors: list[LogitsProcessor]) -> None:
    logits_MV = torch.randn(4, VOCAB) * 3
    before = logits_MV.clone()
    texts = [torch.tensor(text) for text in TEXTS]
    scores_MV = Sampler(processors).scores(logits_MV, texts, [0, 1, 2, 3])
    torch.testing.assert_close(scores_MV, one_by_one(processors, before), rtol=0, atol=0)
    assert not scores_MV.equal(before)
    assert logits_MV.equal(before), "the logits were written to"


def test_a_tree_is_drawn_from_along_the_path_only() -> None:
    """Row 0 goes by node 2 to node 3 and on to node 4; row 1 stays at the root."""
    logits_BNV = torch.zeros(2, 5, VOCAB)
    for node, token in ((0, 2), (2, 1), (3, 5), (4, 9)):
        logits_BNV[0, node, token] = 5
    logits_BNV[1, 0, 8] = 5
    seen: list[tuple[int, list[int]]] = []

    def allowed(row: int, ids_T: Tensor) -> list[int]:
        seen.append((row, ids_T.tolist()))
        return list(range(VOCAB))

    sampler = Sampler([PrefixConstrainedLogitsProcessor(allowed, 1)])
    draws_BN = sampler.sample_tree(TREE, logits_BNV, [4, 7], [4, 5], PREFIXES)
    assert draws_BN.tolist() == [[2, -1, 1, 5, 9], [8, -1, -1, -1, -1]]
    assert seen == [
        (4, [1, 2, 9, 3]),
        (7, PREFIXES[1].tolist()),
        (4, [1, 2, 9, 3, 2]),
        (4, [1, 2, 9, 3, 2, 1]),
        (4, [1, 2, 9, 3, 2, 1, 5]),
    ]
    assert Sampler().sample_tree(TREE, logits_BNV, [4, 7], [4, 5], [])[0].tolist() == [
        2,
        0,
        1,
        5,
        9,
    ]


def test_draws_are_those_of_plain_steps() -> None:
    """At each node of the path: the node's own logits with the noise of its position."""
    torch.manual_seed(3)
    deep = 0
    for seed in range(60):
        sampler = sampler_of(1.0, top_k=4, seed=seed)
        logits_BNV = torch.randn(2, 5, VOCAB)
        draws_BN = sampler.sample_tree(TREE, logits_BNV, [1, 0], [6, 9], PREFIXES)
        for row, (number, position) in enumerate([(1, 6), (0, 9)]):
            for node, drawn in enumerate(draws_BN[row].tolist()):
                if drawn >= 0:
                    depth = int(TREE.depths_BN[row, node])
                    root = Tree.root(TREE.tokens_BN[row, node][None])
                    logits = logits_BNV[row, node][None, None]
                    alone = sampler.sample_tree(root, logits, [number], [position + depth], [])
                    assert alone.tolist() == [[drawn]]
                    deep += depth > 0
    assert deep >= 10


def test_prefixes_are_read_only_where_they_matter() -> None:
    assert not sampler_of(0.7, top_k=3, top_p=0.9).reads_prefix
    assert sampler_of(0.7, repetition_penalty=1.2).reads_prefix
    assert Sampler([Shifted()]).reads_prefix


def test_left_padding_of_each_row_is_not_penalised() -> None:
    logits_MV = torch.randn(2, VOCAB)
    try:
        shared = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([9, 0, 3]))
    except ValueError:
        pytest.skip("this transformers takes one length for all rows, as 5.17 does")
    # Two rows are left of a batch of three: numbers 1 and 2.
    scores_MV = Sampler([shared]).scores(logits_MV, PREFIXES, [1, 2])
    for row, ignored in enumerate([0, 3]):
        own = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=ignored)
        assert scores_MV[row].equal(own(PREFIXES[row][None], logits_MV[row][None])[0])
    assert scores_MV[1, 0] == logits_MV[1, 0]  # token 0 occurs as padding only


def test_processors_with_a_memory_are_refused() -> None:
    stateful = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=5,
        keys=[1, 2],
        sampling_table_size=64,
        sampling_table_seed=0,
        context_history_size=8,
        device=torch.device("cpu"),
    )
    with pytest.raises(ValueError, match="SynthID"):
        Sampler([stateful])


def test_noise_depends_on_seed_row_and_position_only() -> None:
    def noise(seed: int, rows: list[int], positions: list[int]) -> Tensor:
        like_MV = torch.empty(len(rows), VOCAB)
        return Sampler(sample=True, seed=seed).noise(rows, positions, like_MV)

    base = noise(0, [2, 2, 1], [10, 11, 10])
    assert noise(0, [1, 2], [10, 11]).equal(base[[2, 1]])
    same = torch.isclose(base[:, None], base[None]).any(-1)
    assert same.equal(torch.eye(3, dtype=torch.bool))
    assert not torch.isclose(noise(1, [2, 2, 1], [10, 11, 10]), base).any()


def test_greedy_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Sampler, "noise")
    logits_BNV = torch.randn(2, 5, VOCAB)
    for greedy in (sampler_of(0.0), sampler_of(0.0, repetition_penalty=1.2)):
        assert greedy.sample_tree(TREE, logits_BNV, [0, 1], [4, 8], PREFIXES).shape == (2, 5)
    assert sampler_of(0.0, top_k=3).processors == []
    with pytest.raises(AttributeError):
        sampler_of(1.0).sample_tree(TREE, logits_BNV, [0, 1], [4, 8], PREFIXES)


def test_noise_is_gumbel() -> None:
    noise = Sampler(sample=True).noise([0] * 40, list(range(40)), torch.empty(40, 5000))
    values = noise.flatten().double()
    assert abs(values.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(values.var() - math.pi**2 / 6) < 0.03
    for level in (-1.0, 0.0, 1.0, 3.0):
        expected = math.exp(-math.exp(-level))
        assert abs((values < level).double().mean() - expected) < 0.005


@pytest.mark.parametrize("vocabulary", [1, 7, 33, 96, 1000, 1184, 49152])
@pytest.mark.parametrize("rows", [(), (1,), (3, 5)])
def test_the_argmax_is_the_first_of_the_largest(vocabulary: int, rows: tuple[int, ...]) -> None:
    whole = torch.randint(0, 5, (*rows, vocabulary)).float()
    for scores_RV in (torch.randn(*rows, vocabulary), whole, whole - torch.inf):
        for dtype in (torch.float32, torch.bfloat16):
            scores_RV = scores_RV.to(dtype)
            first_R = (scores_RV == scores_RV.amax(-1, keepdim=True)).int().argmax(-1)
            assert torch.equal(argmax(scores_RV), first_R)
