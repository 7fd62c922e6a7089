"""Processed logits and noise: a tree node gets what its prefix would get.

Legend: B batch rows, N tree nodes, C depths, T positions, V vocabulary.
"""

from __future__ import annotations

import math

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

from headstart.inference.sampling import Sampler
from headstart.model.tree import Tree

VOCAB = 11
TREE = Tree(
    torch.tensor([[3, 1, 2, 1, 5], [4, 6, 7, 0, 0]]),
    torch.tensor([[-1, 0, 0, 2, 3], [-1, 0, 1, -1, -1]]),
    torch.zeros(2, 5),
)
PATHS = [[[], [1], [2], [2, 1], [2, 1, 5]], [[], [6], [6, 7]]]  # behind the root, padding left out
PREFIXES = [torch.tensor([1, 2, 9, 3]), torch.tensor([0, 0, 0, 5, 6, 7, 6, 4])]


def one_by_one(processors: LogitsProcessorList, logits_BNV: Tensor) -> Tensor:
    """Every node's prefix through the list, alone."""
    expected_BNV = torch.full_like(logits_BNV, torch.nan)
    for row, paths in enumerate(PATHS):
        for node, path in enumerate(paths):
            ids_T = torch.cat([PREFIXES[row], torch.tensor(path, dtype=torch.int64)])
            scores = processors(ids_T[None], logits_BNV[row, node][None].clone())
            expected_BNV[row, node] = scores[0]
    return expected_BNV


class Shifted(LogitsProcessor):
    """A processor of a user's own: forbids the token that comes after the last one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, (input_ids[:, -1:] + 1) % VOCAB, -math.inf)


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
def test_a_node_gets_what_its_prefix_gets(processors: list[LogitsProcessor]) -> None:
    logits_BNV = torch.randn(2, 5, VOCAB) * 3
    before = logits_BNV.clone()
    scores_BNV = Sampler(processors).scores(TREE, logits_BNV, PREFIXES, [0, 1])
    expected_BNV = one_by_one(LogitsProcessorList(processors), logits_BNV)
    real_BN = ~expected_BNV.isnan().any(-1)
    assert real_BN.sum() == 8
    torch.testing.assert_close(scores_BNV[real_BN], expected_BNV[real_BN], rtol=0, atol=0)
    assert not scores_BNV[real_BN].equal(before[real_BN])
    assert logits_BNV.equal(before), "the logits were written to"


def test_prefixes_are_read_only_where_they_matter() -> None:
    assert not Sampler.of(0.7, top_k=3, top_p=0.9).reads_prefix
    assert Sampler.of(0.7, repetition_penalty=1.2).reads_prefix
    assert Sampler([Shifted()]).reads_prefix


def test_left_padding_of_each_row_is_not_penalised() -> None:
    logits_BNV = torch.randn(2, 5, VOCAB)
    shared = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=torch.tensor([9, 0, 3]))
    # The two rows left of a batch of three: numbers 1 and 2.
    scores_BNV = Sampler([shared]).scores(TREE, logits_BNV, PREFIXES, [1, 2])
    for row, ignored in enumerate([0, 3]):
        own = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=ignored)
        expected_BNV = one_by_one(LogitsProcessorList([own]), logits_BNV)
        nodes = len(PATHS[row])
        assert scores_BNV[row, :nodes].equal(expected_BNV[row, :nodes])
    assert scores_BNV[1, 0, 0] == logits_BNV[1, 0, 0]  # token 0 occurs as padding only


def test_allowed_tokens_know_their_row() -> None:
    asked: list[tuple[int, list[int]]] = []

    def allowed(row: int, ids_T: Tensor) -> list[int]:
        asked.append((row, ids_T.tolist()))
        return [row]

    sampler = Sampler([PrefixConstrainedLogitsProcessor(allowed, 1)])
    scores_BNV = sampler.scores(TREE, torch.randn(2, 5, VOCAB), PREFIXES, [4, 7])
    assert scores_BNV[0].argmax(-1).tolist() == [4] * 5
    assert scores_BNV[1, :3].argmax(-1).tolist() == [7] * 3
    assert (4, [1, 2, 9, 3, 2, 1, 5]) in asked and len(asked) == 8


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
    logits = torch.empty(1, 1, VOCAB)

    def noise(seed: int, rows: list[int], positions: list[int], depths: int) -> Tensor:
        noise_BCV = Sampler(sample=True, seed=seed).noise(rows, positions, depths, logits)
        assert noise_BCV is not None
        return noise_BCV

    base = noise(0, [2], [10], 4)
    assert base.shape == (1, 4, VOCAB)
    assert noise(0, [2], [12], 1)[0, 0].equal(base[0, 2])
    assert noise(0, [1, 2], [5, 11], 2)[1].equal(base[0, 1:3])
    for other in (noise(1, [2], [10], 4), noise(0, [3], [10], 4), noise(0, [2], [14], 4)):
        assert not torch.isclose(other, base).any()


def test_unused_noise_is_kept_for_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    fresh = Sampler._fresh

    def counted(self: Sampler, row: int, position: int, *rest: object) -> Tensor:
        made.append((row, position))
        return fresh(self, row, position, *rest)

    monkeypatch.setattr(Sampler, "_fresh", counted)
    sampler, logits = Sampler.of(1.0), torch.empty(1, 1, VOCAB)
    first = sampler.noise([0], [7], 3, logits)
    second = sampler.noise([0], [8], 3, logits)
    assert first is not None and second is not None and second[0, :2].equal(first[0, 1:])
    assert made == [(0, 7), (0, 8), (0, 9), (0, 10)]


def test_greedy_makes_no_noise() -> None:
    assert Sampler.of(0.0).noise([0], [7], 3, torch.empty(1, 1, VOCAB)) is None
    assert Sampler.of(0.0, top_k=3).processors == []


def test_noise_is_gumbel() -> None:
    noise = Sampler(sample=True).noise([0], [0], 40, torch.empty(1, 1, 5000))
    assert noise is not None
    values = noise.flatten().double()
    assert abs(values.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(values.var() - math.pi**2 / 6) < 0.03
    for level in (-1.0, 0.0, 1.0, 3.0):
        expected = math.exp(-math.exp(-level))
        assert abs((values < level).double().mean() - expected) < 0.005
