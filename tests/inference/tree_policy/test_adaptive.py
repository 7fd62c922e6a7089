"""How large trees become: by what they cost and give, never at the price of another answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import answers, batch, target_of
from families import FAMILIES, padded, prompts
from oracle import Oracle
from step_costs import DEAR, FREE, USUAL, costs
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.graph_pool import graph_pool
from headstart.inference.engine.loop import decode
from headstart.inference.engine.measure_costs import NODES, measure_graphs, measured_costs
from headstart.inference.engine.stats import Stats
from headstart.inference.tree_policy.adaptive import (
    HEAD_BACKOFF,
    NGRAM_BACKOFF,
    REPROBE_STEPS,
    AdaptivePolicy,
)
from headstart.inference.tree_policy.cost_model import Costs
from headstart.inference.tree_policy.defaults import (
    DEFAULT_TREE,
    WIDEST_TREE,
    clamp_to_head,
    fixed_tree,
)
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.scripts.options.tree_budget import check_budget, default_budget

NEW_TOKENS = 24
ARITHMETIC = Costs((1, 8, 64), (1.0, 1.2, 8.0), advance=0.1, deepen=0.1, rest=0.0)


def scores(*probabilities: list[float]) -> Tensor:
    return torch.tensor(probabilities).log()


def test_between_and_past_the_measured_counts() -> None:
    known = Costs((1, 4, 8), (10.0, 16.0, 20.0), advance=2.0, deepen=1.0, rest=0.5)
    assert [known.verify_seconds(n) for n in (1, 2, 4, 6, 8, 12)] == [10, 12, 16, 18, 20, 24]
    flat = Costs((1, 4, 8, 16), (10.0, 16.0, 22.0, 22.0), advance=2.0, deepen=1.0, rest=0.5)
    assert flat.verify_seconds(28) == 28  # nothing gets cheaper with its size
    assert Costs((1, 4), (10.0, 16.0), advance=2.0, deepen=1.0, rest=0.5).verify_seconds(8) == 24
    assert known.step_seconds(4, depth=3) == 16 + 2 + 2 + 0.5


def test_where_rounds_are_played_back_trees_have_one_size() -> None:
    def target(device: str, recurrent: bool = False) -> Any:
        return SimpleNamespace(device=torch.device(device), recurrent=recurrent)

    size = default_budget(target("cuda"))
    assert check_budget(size) == size == "16/5/4"
    for other in (target("cpu"), target("cuda", recurrent=True)):
        assert fixed_tree(other) is None and default_budget(other) == "auto+ngram"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("speedup", [1.0, 1.7])
def test_nodes_are_read_while_they_pay(rows: int, speedup: float) -> None:
    """The best count by trying all of them, at the rate that is reached."""
    generator = torch.Generator().manual_seed(0)
    for per_node in (0.02, 0.1, 0.3):
        policy = AdaptivePolicy(costs(per_node), speedup=speedup)
        probabilities_BN = torch.rand(rows, 20, generator=generator) ** 3
        probabilities_BN[:, 0] = 1
        sorted_BN = probabilities_BN.sort(1, descending=True).values
        rate = speedup * rows / policy.costs.verify_seconds(rows)
        values = [
            float(sorted_BN[:, :count].sum()) - rate * policy.costs.verify_seconds(rows * count)
            for count in range(1, 21)
        ]
        assert policy.num_nodes(probabilities_BN.log()) == values.index(max(values)) + 1


def test_easy_text_gets_large_trees_and_hard_text_none() -> None:
    easy, hard = scores([1.0, 0.9, 0.8, 0.7, 0.6, 0.05]), scores([1.0, 0.08, 0.05, 0.01, 0.0, 0.0])
    assert AdaptivePolicy(USUAL).num_nodes(easy) == 5
    assert AdaptivePolicy(USUAL).num_nodes(hard) == 1
    assert AdaptivePolicy(FREE).num_nodes(hard) > 3  # where reading costs nothing, everything helps
    assert AdaptivePolicy(DEAR).num_nodes(easy) == 1


def test_drafting_ends_where_a_guess_is_worth_less_than_its_time() -> None:
    policy = AdaptivePolicy(USUAL)
    likely, unlikely = scores([1.0, 0.9]), scores([1.0, 0.2])
    assert policy.should_deepen(likely, likely[:, 1:])
    assert not policy.should_deepen(unlikely, unlikely[:, 1:])


def test_a_head_that_costs_more_than_it_gives_is_left_alone_longer_and_longer() -> None:
    policy = AdaptivePolicy(USUAL)
    gaps, since = [], 0
    for _ in range(400):
        asked = policy.uses_head(0.0)
        if asked:
            gaps.append(since)
        since = 0 if asked else since + 1
        policy.update(batch=1, emitted=1, nodes=4 if asked else 1, depth=2 if asked else 0)
    pauses = [gap for gap in gaps if gap]
    assert (
        pauses[:3] == [HEAD_BACKOFF[0], 2 * HEAD_BACKOFF[0], 4 * HEAD_BACKOFF[0]]
        and max(pauses) == HEAD_BACKOFF[1]
    )
    policy._head_paused = 0
    for _ in range(5):  # the text gets easy
        assert policy.uses_head(0.0)
        policy.update(batch=1, emitted=4, nodes=4, depth=3)
    assert policy._head_backoff == HEAD_BACKOFF[0] and policy.speedup > 1


def test_guesses_that_disappoint_count_for_less_until_they_come_true_again() -> None:
    policy, easy = AdaptivePolicy(USUAL), scores([1.0, 0.9, 0.8, 0.7, 0.6, 0.2])
    assert policy.num_nodes(easy) == 6
    for _ in range(20):  # three of four were to come, one does
        policy.update(batch=2, emitted=4, nodes=5, depth=4, expected=6.0)
    assert 1 < policy.num_nodes(easy) < 6
    for _ in range(40):
        policy.update(batch=2, emitted=9, nodes=5, depth=4, expected=6.0)
    policy.speedup = 1.0
    assert policy.num_nodes(easy) == 6


def test_the_head_is_not_asked_where_other_guesses_are_better() -> None:
    policy = AdaptivePolicy(USUAL, accepted_per_step=1.5)
    assert policy.uses_head(1.0) and not policy.uses_head(2.0)


def test_where_reading_is_arithmetic_the_head_is_not_even_tried_at_first() -> None:
    """With many rows, each node costs as much as a row."""
    few, many = AdaptivePolicy(ARITHMETIC), AdaptivePolicy(ARITHMETIC)
    assert few.uses_head(0.0, 1)
    assert not any(many.uses_head(0.0, 8) for _ in range(REPROBE_STEPS))
    assert many.uses_head(0.0, 8)  # texts can be easier than that
    late = AdaptivePolicy(ARITHMETIC)
    assert not late.uses_head(0.0, 8) and late.uses_head(0.0, 1)  # the others are complete


def test_texts_in_which_nothing_is_found_are_searched_less_often() -> None:
    policy, searched = AdaptivePolicy(USUAL), []
    for _ in range(100):
        searched.append(policy.searches_ngrams(8))
        policy.update(batch=8, emitted=8, nodes=1, depth=0)
    assert all(searched[: NGRAM_BACKOFF[0]]) and not any(
        searched[NGRAM_BACKOFF[0] : NGRAM_BACKOFF[0] + NGRAM_BACKOFF[1]]
    )
    assert searched[NGRAM_BACKOFF[0] + NGRAM_BACKOFF[1]] and sum(searched[50:]) < 6
    assert policy.searches_ngrams(1)  # one text is searched at once
    policy._ngrams_paused = 0
    policy.update(batch=8, emitted=20, nodes=4, depth=0)  # something was found
    found = []
    for _ in range(NGRAM_BACKOFF[0]):
        found.append(policy.searches_ngrams(8))
        policy.update(batch=8, emitted=8, nodes=1, depth=0)
    assert all(found)


def test_guesses_that_promise_less_than_the_first_node_costs_are_dropped() -> None:
    policy = AdaptivePolicy(USUAL)
    most = USUAL.verify_seconds(2) / USUAL.verify_seconds(1) - 1
    assert policy.could_pay(1.01 * most, 1) and not policy.could_pay(0.99 * most, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("price", [FREE, USUAL, DEAR], ids=["free", "usual", "dear"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_budget_changes_an_answer(family: str, price: Costs, lookup: bool, rows: int) -> None:
    target = target_of(family)
    ids_BT, mask_BT = batch(family, rows)
    sampling = SamplingParams(NEW_TOKENS)
    truth = answers(decode(target, ids_BT, mask_BT, sampling=sampling), rows)
    heads = [Oracle(target, truth, right=right) for right in (0.9, 0.2)]
    heads += [make_head(target, kind, {}) for kind in kinds()]
    for head in heads:
        stats = Stats()
        steps = decode(
            target,
            ids_BT,
            mask_BT,
            sampling=sampling,
            speculative=SpeculativeConfig(
                head.for_decoding(target) if not isinstance(head, Oracle) else head,
                WIDEST_TREE,
                costs=price,
                ngram=lookup,
            ),
            stats=stats,
        )
        assert answers(steps, rows) == truth
        assert stats.num_tokens == sum(map(len, truth))


@pytest.mark.parametrize("kind", kinds())
def test_a_head_that_was_away_has_missed_nothing(kind: str) -> None:
    """What was read meanwhile is taken in at once: its next tree is the one of a head that was
    asked in every round."""
    target = target_of("llama")
    torch.manual_seed(0)
    head = make_head(target, kind, {}).for_decoding(target)
    ids_BT, mask_BT = batch("llama", 3)

    def trees(away: range) -> list[Tensor]:
        seen: list[Tensor] = []
        rounds = 0

        class Away(AdaptivePolicy):
            def uses_head(self, ngram_tokens: float, batch: int = 1) -> bool:
                nonlocal rounds
                rounds += 1
                return rounds not in away

            def should_deepen(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
                return True

            def num_nodes(self, scores_BN: Tensor) -> int:
                seen.append(scores_BN)
                return 1

        config = SpeculativeConfig(head, DEFAULT_TREE, FREE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("headstart.inference.engine.loop.AdaptivePolicy", Away)
            list(decode(target, ids_BT, mask_BT, sampling=SamplingParams(12), speculative=config))
        return seen

    always, sometimes = trees(range(0)), trees(range(2, 7))
    assert len(sometimes) == len(always) - 5
    for left, right in zip(always[6:], sometimes[1:], strict=True):
        torch.testing.assert_close(left, right)


def test_looked_up_guesses_alone_are_exact_and_help_with_repetitions() -> None:
    target = target_of("llama")
    ids_BT, _ = padded(prompts([12, 7]))
    ids_BT = torch.cat([ids_BT[:, :7]] * 5, 1)  # the same again and again
    sampling = SamplingParams(32)
    truth = answers(decode(target, ids_BT, sampling=sampling), 2)
    stats = Stats()
    config = SpeculativeConfig(shape=WIDEST_TREE, ngram=True)
    steps = decode(target, ids_BT, sampling=sampling, speculative=config, stats=stats)
    assert answers(steps, 2) == truth and stats.num_steps <= stats.num_tokens


def test_costs_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.inference.engine.measure_costs.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(
        "headstart.inference.engine.measure_costs.BUSY_RATIO", 1e9
    )  # whatever else runs beside the tests
    target = wrap_target(FAMILIES["llama"]())
    head = make_head(target, "eagle3", {}).for_decoding(target)
    first = measured_costs(target, head)
    assert first.nodes == NODES[: len(first.verify)] and len(first.verify) > 1
    assert list(first.verify) == sorted(first.verify) and first.verify[0] > 0
    assert min(first.advance, first.rest) > 0 and first.deepen >= 0
    (file,) = (tmp_path / "costs").glob("*.json")
    assert measured_costs(target, head) == first
    kept = json.loads(file.read_text())
    kept["costs"]["advance"] = 7.0
    file.write_text(json.dumps(kept))
    assert measured_costs(target, head) == replace(first, advance=7.0)
    other = make_head(target, "medusa", {}).for_decoding(target)
    measured_costs(target, other)
    assert len(list((tmp_path / "costs").glob("*.json"))) == 2
    file.write_text("{")  # damaged
    assert measured_costs(target, head).advance < 7.0


@pytest.mark.parametrize("busy", [False, True])
def test_costs_of_a_busy_moment_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    monkeypatch.setattr("headstart.inference.engine.measure_costs.cache_folder", lambda: tmp_path)
    target = wrap_target(FAMILIES["llama"]())
    head = make_head(target, "eagle3", {}).for_decoding(target)
    measured_costs(target, head)
    (file,) = (tmp_path / "costs").glob("*.json")
    kept = json.loads(file.read_text())
    # A plain step that takes far longer or shorter than it can.
    verify = [seconds * (1e4 if busy else 1e-4) for seconds in kept["costs"]["verify"]]
    kept["costs"] |= {"verify": verify, "advance": 7.0}
    file.write_text(json.dumps(kept))
    again = measured_costs(target, head)
    assert (again.advance < 7.0) == busy
    assert (json.loads(file.read_text())["costs"]["advance"] < 7.0) == busy


def test_a_budget_for_sampling_keeps_every_draw() -> None:
    target = target_of("llama")
    ids_BT, mask_BT = batch("llama", 3)
    sampling = SamplingParams(NEW_TOKENS, 1.0, seed=3)
    truth = answers(decode(target, ids_BT, mask_BT, sampling=sampling), 3)
    config = SpeculativeConfig(Oracle(target, truth), costs=USUAL)
    steps = decode(target, ids_BT, mask_BT, sampling=sampling, speculative=config)
    assert answers(steps, 3) == truth


@pytest.mark.parametrize("kind", kinds())
def test_costs_of_rounds_that_are_played_back(kind: str) -> None:
    """Here their parts are called as they are."""
    target = wrap_target(FAMILIES["llama"]())
    head = make_head(target, kind, {}).for_decoding(target)
    costs = measure_graphs(target, head)
    assert costs.nodes[0] == 1 and len(costs.nodes) == len(costs.verify) > 4
    assert sorted(costs.verify) == [*costs.verify] and costs.verify[0] > 0 < costs.advance
    (graphs,) = graph_pool(target).free
    deepest = clamp_to_head(WIDEST_TREE, head).depth
    assert graphs.shape.depth == deepest and [*graphs.draft_graphs] == [deepest, 1]


def test_depths_are_chosen_beforehand() -> None:
    policy = AdaptivePolicy(replace(USUAL, advance=0.0, deepen=0.05))
    depths = []
    for policy.next_depth_rate in (0.1, 0.5, 0.8, 0.99):
        depths.append(policy.depth(8, 1))
    assert depths == sorted(depths) and depths[0] == 1 and depths[-1] == 8 and depths[1] < depths[2]
