"""Probabilities that mean what they say: the fit, what it is fitted on, and drafting with it.

Legend: R rows, V vocabulary, B batch rows, T positions, D hidden size, N tree nodes.
"""

from __future__ import annotations

import pytest
import torch
from tiny_run import VOCAB, mixed_rows, rule_rows, rule_target, tiny_head, tiny_target
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.heads.common.base import DraftHead, kinds
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree
from headstart.training.data.batching import Batch, Corpus
from headstart.training.evaluation.calibration import (
    COLDEST,
    HOTTEST,
    Candidates,
    TooFewRows,
    calibrate,
    calibration_error,
    collect,
    fit_temperature,
    path_hits,
)

ROWS = 4000


def drawn(spread: float = 2.5) -> tuple[Tensor, Tensor]:
    """Logits of a source that knows its own distribution, and what it said."""
    torch.manual_seed(0)
    logits_RV = torch.randn(ROWS, 200) * spread
    return logits_RV, torch.distributions.Categorical(logits=logits_RV).sample()


# --- the fit


@pytest.mark.parametrize("factor", [0.7, 1.0, 2.0])
def test_a_known_temperature_is_found(factor):
    logits_RV, labels_R = drawn()
    assert fit_temperature(Candidates.of(factor * logits_RV, labels_R), 3) == pytest.approx(
        factor, rel=0.05
    )


def test_the_error_falls_to_noise():
    logits_RV, labels_R = drawn()
    candidates = Candidates.of(2 * logits_RV, labels_R)

    def error(temperature: float) -> float:
        probability_RW, hit_RW = candidates.children(temperature, 3)
        return calibration_error(probability_RW.flatten(), hit_RW.flatten())

    assert error(1.0) > 0.08
    assert error(fit_temperature(candidates, 3)) < 0.02


@pytest.mark.parametrize("temperature", [COLDEST, 0.8, 1.0, 1.7, HOTTEST])
@pytest.mark.parametrize("spread", [0.5, 2.5, 6.0])
def test_interpolated_probabilities_are_right(spread, temperature):
    logits_RV, labels_R = drawn(spread)
    probability_RW, hit_RW = Candidates.of(logits_RV, labels_R).children(temperature, 5)
    best_RW, tokens_RW = (logits_RV / temperature).softmax(1).topk(5)
    torch.testing.assert_close(probability_RW.float(), best_RW, rtol=0.01, atol=1e-6)
    assert torch.equal(hit_RW, tokens_RW == labels_R[:, None])


def test_calibration_error_of_worked_examples():
    half_N = torch.full((3000,), 0.5)
    hit_N = torch.arange(3000) % 2 == 0
    assert calibration_error(half_N, hit_N) == pytest.approx(0, abs=1e-3)
    assert calibration_error(half_N + 0.3, hit_N) == pytest.approx(0.3, abs=1e-3)
    # Too low by 0.2 where it is low and too high by 0.2 where it is high: nothing cancels.
    said_N = half_N + torch.where(torch.arange(3000) < 1000, -0.2, 0.2)  # 5 bins and 10
    assert calibration_error(said_N, hit_N) == pytest.approx(0.2, abs=2e-3)


# --- what is measured


class Knowing(DraftHead):
    """Knows the token that comes at some depths; at the others it names the one after it.

    With `rule_target` a hidden state that is the embedding of x drafts what follows x.
    """

    kind = "knowing"
    right: tuple[bool, ...] = (True, True, True)

    def unroll(self, seen, tokens_BT: Tensor, steps: int) -> list[Tensor]:
        hidden = []
        for step in range(steps):
            ahead = 1 + step if self.right[step] else 2 + step
            hidden.append(self.target.embed(tokens_BT.roll(-ahead, dims=1)))
        return hidden


Knowing.__abstractmethods__ = frozenset()  # only training computations are asked for


def knowing(right: tuple[bool, ...], draft_vocab: list[int] | None = None) -> Knowing:
    target = rule_target()
    settings = tiny_head(target).config.model_copy(
        update={"draft_vocab": len(draft_vocab) if draft_vocab else None}
    )
    head = Knowing(settings)
    head.bind(target)
    head.right = right
    if draft_vocab:
        head.set_draft_vocab(torch.tensor(draft_vocab))
    return head


def rule_batch(start: int = 5, rows: int = 4, length: int = 12) -> Batch:
    tokens_BT = torch.tensor(rule_rows(rows, length))
    mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    mask_BT[:, start:] = True
    return Batch(tokens_BT, torch.full((rows,), length), mask_BT)


def test_depths_and_labels_are_those_of_the_training_computation():
    """Right at the first depth, one token too far at the second: never right again."""
    found = collect(knowing((True, False, True)), [rule_batch()], 3, width=1)
    assert [len(candidates) for candidates in found] == [4 * 7, 4 * 6, 0]
    assert found[0].rank_acceptance() == (1.0, *[0.0] * 7)
    assert found[1].rank_acceptance()[0] == 0.0


def test_only_paths_that_a_tree_can_hold_are_measured():
    all_right = collect(knowing((True, True, True)), [rule_batch()], 3, width=1)
    assert [len(candidates) for candidates in all_right] == [4 * 7, 4 * 6, 4 * 5]
    assert all(candidates.rank_acceptance()[0] == 1.0 for candidates in all_right)
    wrong = collect(knowing((False, True, True)), [rule_batch()], 3, width=1)
    assert [len(candidates) for candidates in wrong] == [4 * 7, 0, 0]
    # More children than are told apart: what is none of those still ends its path.
    first, second = collect(knowing((False, True)), [rule_batch()], 2, width=40)
    assert 0 < int((first.rank_R == 8).sum()) and len(second) <= int((first.rank_R < 8).sum())


def test_a_label_outside_the_draft_vocabulary_is_no_child():
    """Tokens of the first two rows cannot be drafted where they are not in the vocabulary."""
    batch = rule_batch()
    left_out = batch.tokens_BT[0, 7].item()
    vocabulary = [token for token in range(VOCAB) if token != left_out]
    (found,) = collect(knowing((True,), vocabulary), [batch], 1, width=3)
    labels = batch.tokens_BT[:, 5:].flatten()
    assert found.rank_acceptance()[0] == pytest.approx(
        float((labels != left_out).float().mean()), abs=1e-4
    )
    assert int((found.rank_R == 8).sum()) == int((labels == left_out).sum())


def test_padding_and_prompts_are_left_out():
    batch = rule_batch(start=6)
    longer = Batch(
        torch.nn.functional.pad(batch.tokens_BT, (0, 5), value=3),
        batch.lengths_B,
        torch.nn.functional.pad(batch.loss_mask_BT, (0, 5), value=True),
    )
    (found,) = collect(knowing((True,)), [longer], 1, width=1)
    assert len(found) == 4 * 6 and found.rank_acceptance()[0] == 1.0


def test_paths_of_a_tree_that_a_text_says():
    tree = Tree(
        torch.tensor([[5, 6, 9, 7, 7, 8]]),
        torch.tensor([[-1, 0, 0, 1, 2, 3]]),
        torch.zeros(1, 6),
    )
    text_BT = torch.tensor([[1, 5, 6, 7, 9]])
    # 7 below the wrong 9 is not right either; 8 comes where the text says 9.
    assert path_hits(tree, text_BT, torch.tensor([1])).tolist() == [
        [True, True, False, True, False, False]
    ]


# --- a whole calibration


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus((row, [(3, len(row))]) for row in mixed_rows(60))


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def random_head(target: Target, kind: str) -> DraftHead:
    head = tiny_head(target, kind)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_is_calibrated(target, corpus, kind):
    head = random_head(target, kind).for_decoding(target)
    found = calibrate(head, corpus, steps=6, width=8, batch_tokens=128)
    assert head.temperatures == ()
    # Random candidates are right by chance: as many paths as chance lets reach the next depth.
    rows = found.calibration_positions
    assert rows[0] > 500 and 1 <= len(rows) < 6 and list(rows) == sorted(rows, reverse=True)
    assert min(rows) >= 100 and len(found.temperatures) == len(rows) == len(found.rank_acceptance)
    assert all(len(row) == 8 and sum(row) < 0.5 for row in found.rank_acceptance)
    # A head that knows nothing is made as unsure as can be, and errs less for it.
    assert found.temperatures[0] == pytest.approx(HOTTEST, abs=1e-3)
    before, after = found.path_errors
    assert after < 0.8 * before
    assert all(after < before for before, after in found.calibration_errors)
    assert calibrate(head, corpus, steps=6, width=8, batch_tokens=128) == found


def test_no_deeper_than_the_head_and_only_what_is_asked_for(target, corpus):
    head = random_head(target, "medusa").for_decoding(target)
    head.max_depth = 1
    told: list[tuple[int, int]] = []
    few = calibrate(
        head,
        corpus,
        steps=3,
        width=48,
        batch_tokens=64,
        max_rows=300,
        report=lambda *at: told.append(at),
    )
    assert len(few.temperatures) == 1 and 300 <= few.calibration_positions[0] < 400
    assert told[-1] == (300, 300) and told == sorted(told)
    ten = sum(len(row) - 3 for row in mixed_rows(60)[:10])
    part = calibrate(head, corpus, steps=1, conversations=10)
    assert part.calibration_positions == (ten,)


@torch.no_grad()
def late_rows(target: Target, count: int, length: int) -> list[list[int]]:
    """Texts in which x[t + 2] is drawn from what the target says for x[t + 1]."""
    torch.manual_seed(0)
    tokens_BT = torch.randint(VOCAB, (count, 2))
    while tokens_BT.shape[1] < length:
        logits_BV = target.forward(tokens_BT[:, :-1]).logits_BTV[:, -1]
        next_B1 = torch.distributions.Categorical(logits=logits_BV).sample()[:, None]
        tokens_BT = torch.cat([tokens_BT, next_B1], 1)
    return tokens_BT.tolist()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_head_that_knows_the_truth_but_says_it_too_loudly(target, monkeypatch, factor):
    """A fresh Medusa head is the target's LM head, so of such texts it knows the distribution."""
    texts = Corpus((row, [(2, len(row))]) for row in late_rows(target, 128, 40))
    head = tiny_head(target, "medusa", num_heads=1).for_decoding(target)
    quiet = head.logits
    monkeypatch.setattr(head, "logits", lambda hidden: factor * quiet(hidden))
    found = calibrate(head, texts, steps=1)
    assert found.temperatures[0] == pytest.approx(factor, rel=0.1)
    assert found.calibration_errors[0][1] < 0.02 and found.path_errors[1] < 0.03
    if factor == 2:
        assert found.calibration_errors[0][0] > 0.08 and found.path_errors[0] > 0.08


def test_too_little_is_refused(target):
    head = random_head(target, "mtp").for_decoding(target)
    little = Corpus((row, [(3, len(row))]) for row in mixed_rows(4))
    with pytest.raises(TooFewRows, match=r"response tokens .* 100 are needed"):
        calibrate(head, little, steps=2)


# --- in drafting


@pytest.mark.parametrize("kind", kinds())
def test_each_depth_has_its_temperature_and_the_last_one_repeats(target, kind):
    head = random_head(target, kind).for_decoding(target)
    tokens_BT = torch.tensor([mixed_rows(1)[0]])
    places_BP = torch.arange(5)[None]
    seen = target.forward(tokens_BT, taps=head.taps).gather(places_BP)
    state = head.advance(head.start(1), seen, tokens_BT.gather(1, places_BP + 1), torch.tensor([5]))
    shape = TreeShape.chain(3)

    def steps() -> Tensor:
        """Return the log-probability of each draft token."""
        return head.draft(state, shape).scores_BN.diff(dim=1)[0]

    cold_N = steps()
    head.temperatures = (2.0,)
    warm_N = steps()
    head.temperatures = (1.0, 2.0)
    mixed_N = steps()
    assert bool((warm_N < cold_N - 0.05).all())  # the argmax gets less likely
    torch.testing.assert_close(mixed_N, torch.cat([cold_N[:1], warm_N[1:]]))


@pytest.mark.parametrize("kind", kinds())
def test_decoding_stays_exact(target, kind):
    head = random_head(target, kind).for_decoding(target)
    head.temperatures = (0.5, 2.5, 0.8)
    ids_BT = torch.tensor([row[:6] for row in mixed_rows(3)])
    sampling = SamplingParams(20, 1.0, seed=3)

    def text(steps) -> list[list[int]]:
        told: list[list[int]] = [[], [], []]
        for step in steps:
            for answer, tokens in zip(told, step, strict=True):
                answer += tokens
        return told

    expected = text(decode(target, ids_BT, sampling=sampling))
    config = SpeculativeConfig(head, TreeShape.dynamic(nodes=9, depth=3, width=3))
    steps = decode(target, ids_BT, sampling=sampling, speculative=config)
    assert text(steps) == expected
