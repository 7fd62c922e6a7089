"""Sampling follows the target's distribution: chi-square against exact probabilities.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.stats import Stats
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

VOCAB = 7
PROMPT = torch.tensor([[1, 4, 2]])
BATCH, SEEDS, NEW_TOKENS = 500, 8, 3
SETTINGS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 1.3},
    "top-k": {"temperature": 0.9, "top_k": 4},
    "top-p": {"temperature": 1.1, "top_p": 0.8},
    "both": {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
}


@pytest.fixture(scope="module")
def target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    return wrap_target(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def head(target: Target) -> DraftHead:
    torch.manual_seed(1)
    return make_head(target, "mtp", {}).eval()


def processed(logits_V: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities by the definitions, written without the library."""
    chances = (logits_V.double() / temperature).softmax(-1)
    ranked = chances.sort(descending=True)
    kept = torch.ones(VOCAB, dtype=torch.bool)
    if top_k:
        kept[top_k:] = False
    # The smallest set that reaches top_p, among what top-k left.
    before = (ranked.values * kept / (ranked.values * kept).sum()).cumsum(0).roll(1)
    before[0] = 0
    kept &= before < top_p
    result = torch.zeros(VOCAB, dtype=torch.float64)
    result[ranked.indices[kept]] = ranked.values[kept]
    return result / result.sum()


def exact(target: Target, settings: dict[str, float]) -> dict[tuple[int, ...], float]:
    """The probability of every continuation by three tokens."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NEW_TOKENS):
        longer: dict[tuple[int, ...], float] = {}
        for path, chance in chances.items():
            text = torch.cat([PROMPT[0], torch.tensor(path, dtype=torch.int64)])[None]
            with torch.no_grad():
                logits_V = target.model(text).logits[0, -1]
            for token, next_chance in enumerate(processed(logits_V, **settings).tolist()):
                longer[(*path, token)] = chance * next_chance
        chances = longer
    return chances


def drawn(
    target: Target, head: DraftHead, settings: dict[str, float], stats: Stats
) -> Counter[tuple[int, ...]]:
    """Many answers by a tree; the rows of a batch and the seeds have noise of their own."""
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(SEEDS):
        told: list[list[int]] = [[] for _ in range(BATCH)]
        for step in decode(
            target,
            PROMPT.expand(BATCH, -1),
            sampling=SamplingParams(NEW_TOKENS, **settings, seed=seed),
            speculative=SpeculativeConfig(head, TreeShape.dynamic(nodes=5, depth=2, width=3)),
            stats=stats,
        ):
            for answer, tokens in zip(told, step, strict=True):
                answer += tokens
        counts.update(tuple(answer) for answer in told)
    return counts


def p_value(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Chi-square with rare outcomes put together."""
    total = counts.total()
    rest_seen = rest_expected = statistic = 0.0
    cells = 0
    for outcome, chance in chances.items():
        expected = chance * total
        if expected < 5:
            rest_seen += counts[outcome]
            rest_expected += expected
            continue
        statistic += (counts[outcome] - expected) ** 2 / expected
        cells += 1
    if rest_expected:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        cells += 1
    freedom = torch.tensor((cells - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


@pytest.mark.parametrize("name", SETTINGS)
def test_follows_the_targets_distribution(target: Target, head: DraftHead, name: str) -> None:
    settings = SETTINGS[name]
    stats = Stats()
    counts = drawn(target, head, settings, stats)
    chances = exact(target, settings)
    assert abs(sum(chances.values()) - 1) < 1e-9 and len(chances) == VOCAB**NEW_TOKENS
    assert all(chances[outcome] > 0 for outcome in counts), "a token that was cut off was drawn"
    # The test says something only if guesses were both accepted and rejected, and it can fail.
    assert 0.1 < stats.acceptance_rates[0] < 0.95
    assert p_value(counts, chances) > 0.005
    other = exact(target, settings | {"temperature": settings["temperature"] * 1.3})
    assert p_value(counts, other) < 1e-4


def test_neighbouring_draws_are_independent() -> None:
    """Noise of neighbouring rows and positions: pairs of draws from a uniform law."""
    rows, positions = [row for row in range(3000) for _ in range(2)], [0, 1] * 3000
    noise_MV = Sampler(sample=True).noise(rows, positions, torch.empty(6000, VOCAB))
    draws = noise_MV.argmax(-1).view(3000, 2)
    uniform = {pair: 1 / VOCAB**2 for pair in product(range(VOCAB), repeat=2)}
    by_position = Counter(tuple(pair) for pair in draws.tolist())
    by_row = Counter(tuple(pair) for pair in draws[:, 0].reshape(-1, 2).tolist())
    assert p_value(by_position, uniform) > 0.005
    assert p_value(by_row, uniform) > 0.005
