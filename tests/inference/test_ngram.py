"""Guesses from earlier text: which they are, how sure they are, and how they join a tree.

Legend: B batch rows, N tree nodes, T prompt positions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from decoding import SHAPES, batch, reference, speculative, target_of
from oracle import Known, Oracle

from headstart.inference.ngram import (
    FIRST_DRAFT_RATES,
    HEAD_DISAGREES,
    LATER_DRAFT_RATES,
    MAX_NGRAM,
    NgramDraft,
    NgramIndex,
    merge_ngrams,
    ngram_tree,
)
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree


def matches(text: list[int]) -> list[tuple[int, int]]:
    """(match length up to MAX_NGRAM, place after it) of every earlier match, best first; the slow
    and simple way."""
    found = []
    for place in range(1, len(text)):
        length = 0
        while length < min(MAX_NGRAM, place) and text[place - 1 - length] == text[-1 - length]:
            length += 1
        if length:
            found.append((length, place))
    return sorted(found, reverse=True)


def continued(text: list[int], place: int, depth: int) -> list[int]:
    whole = list(text)
    for index in range(depth):
        whole.append(whole[place + index])
    return whole[len(text) :]


def tokens(candidates: Sequence[NgramDraft]) -> list[list[int]]:
    return [draft.tokens for draft in candidates]


def random_text(seed: int, length: int, words: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(words) for _ in range(length)]


def test_the_longest_match_comes_first_and_among_equals_the_latest() -> None:
    text = [1, 2, 3, 10, 0, 2, 3, 11, 0, 2, 3, 12, 9, 3, 13, 1, 2, 3]
    assert tokens(NgramIndex(text).drafts(1, 1)) == [[10]], "three tokens match there"
    assert tokens(NgramIndex(text[1:]).drafts(1, 9)) == [[12], [11], [10], [13]]
    assert tokens(NgramIndex(text).drafts(4, 2)) == [[10, 0, 2, 3], [12, 9, 3, 13]]


def test_first_tokens_differ() -> None:
    text = [5, 1, 6, 5, 2, 7, 5, 1, 8, 5]
    assert tokens(NgramIndex(text).drafts(2, 3)) == [[1, 8], [2, 7]]


def test_a_match_that_reaches_the_end_repeats_itself() -> None:
    assert tokens(NgramIndex([1, 2, 1, 2]).drafts(5, 1)) == [[1, 2, 1, 2, 1]]
    assert tokens(NgramIndex([7, 7]).drafts(3, 1)) == [[7, 7, 7]]


def test_without_a_match_nothing_is_guessed() -> None:
    for text in ([], [1], [1, 2, 1, 3]):
        assert NgramIndex(text).drafts(4, 2) == []
    assert NgramIndex([1, 1]).drafts(0, 2) == NgramIndex([1, 1]).drafts(2, 0) == []


@pytest.mark.parametrize("words", [2, 4, 20])
def test_guesses_are_what_a_plain_search_finds(words: int) -> None:
    tried = 0
    for seed in range(60):
        text = random_text(seed, 3 + seed, words)
        candidates = NgramIndex(text).drafts(5, 3)
        found = matches(text)
        assert bool(candidates) == bool(found)
        if not found:
            continue
        tried += 1
        assert candidates[0].tokens == continued(text, found[0][1], 5)
        everything = [continued(text, place, 5) for _, place in found]
        assert all(draft.tokens in everything for draft in candidates)
        firsts = [draft.tokens[0] for draft in candidates]
        assert len(set(firsts)) == len(firsts) <= 3
    assert tried > 40


def test_text_that_comes_in_pieces_is_the_same_text() -> None:
    text = random_text(0, 200, 5)
    pieces = NgramIndex([])
    draw, end = random.Random(1), 0
    while end < len(text):
        start, end = end, end + draw.randrange(4)
        pieces.extend(text[start:end])
        assert pieces.drafts(6, 3) == [] or end
        pieces.extend([])  # tells nothing, so that chances stay what they are in a new text
        assert tokens(pieces.drafts(6, 3)) == tokens(NgramIndex(text[:end]).drafts(6, 3))


def test_a_fresh_text_goes_by_the_tables() -> None:
    """Every right token makes the match one longer; a second guess gets what the first leaves."""
    first, second = NgramIndex([1, 8, 2, 1, 5, 6, 1]).drafts(3, 2)
    assert (first.tokens, second.tokens) == ([5, 6, 1], [8, 2, 1])
    begun = [FIRST_DRAFT_RATES[0], (1 - FIRST_DRAFT_RATES[0]) * LATER_DRAFT_RATES[0]]
    for draft, chance in zip((first, second), begun, strict=True):
        expected = [
            chance,
            chance * FIRST_DRAFT_RATES[1],
            chance * FIRST_DRAFT_RATES[1] * FIRST_DRAFT_RATES[2],
        ]
        assert [math.exp(logp) for logp in draft.logp] == pytest.approx(expected)
    long = list(range(40)) * 2  # far more tokens match than are indexed
    assert NgramIndex(long).drafts(2, 1)[0].logp == pytest.approx(
        [math.log(FIRST_DRAFT_RATES[-1]), 2 * math.log(FIRST_DRAFT_RATES[-1])]
    )


def told(
    text: list[int], known: int, depth: int, chains: int
) -> tuple[list[NgramDraft], NgramIndex]:
    """The last guesses of a row that decodes `text` one token at a time."""
    lookup = NgramIndex(text[:known])
    candidates: list[NgramDraft] = []
    for token in text[known:]:
        candidates = lookup.drafts(depth, chains) or candidates
        lookup.extend([token])
    return candidates, lookup


def test_a_text_that_repeats_gets_certain() -> None:
    text = list(range(10)) * 30
    before = NgramIndex(text[:30]).drafts(4, 1)[0]
    after = told(text, 30, 4, 1)[0][0]
    assert after.tokens == [(text[-1] + d) % 10 for d in range(4)]
    assert math.exp(after.logp[3]) > 0.98 > math.exp(before.logp[3])


def test_a_text_that_does_not_repeat_gets_sceptical() -> None:
    """Tokens drawn from five words at random: whatever matches, one guess in five is right."""
    text = random_text(3, 3000, 5)
    start = NgramIndex(text[:100]).drafts(3, 1)[0]
    draft = told(text, 100, 3, 1)[0][0]
    assert len(matches(text[:100])) > 5
    assert math.exp(start.logp[0]) > 0.4
    assert 0.1 < math.exp(draft.logp[0]) < 0.35
    assert math.exp(draft.logp[2]) < 0.06


def test_chances_are_what_comes_true() -> None:
    """A text with some order: each token is followed by the next one three times of four."""
    draw, text = random.Random(5), [0]
    for _ in range(4000):
        text.append((text[-1] + 1) % 30 if draw.random() < 0.75 else draw.randrange(30))
    lookup, expected, right = NgramIndex(text[:1000]), [0.0] * 2, [0] * 2
    for place in range(1000, len(text) - 1, 2):
        for rank, draft in enumerate(lookup.drafts(2, 2)):
            expected[rank] += math.exp(draft.logp[1])
            right[rank] += draft.tokens == text[place : place + 2]
        lookup.extend(text[place : place + 2])
    assert right[0] > 300 and right[1] > 20
    assert expected[0] == pytest.approx(right[0], rel=0.15)
    assert expected[1] == pytest.approx(right[1], rel=0.4)


def test_chances_only_fall_along_a_guess_and_share_what_there_is() -> None:
    for seed in range(50):
        candidates, _ = told(random_text(seed, 80, 4), 20, 5, 4)
        for draft in candidates:
            assert all(a >= b for a, b in zip([0.0, *draft.logp], draft.logp, strict=False))
        assert sum(math.exp(draft.logp[0]) for draft in candidates) <= 1


def test_a_second_guess_is_judged_only_when_the_first_was_wrong() -> None:
    """In this text the second guess never comes true after a miss, for there are no misses."""
    text = [1, 2, 3, 1, 4] + [1, 2, 3] * 3 + [1]
    first, second = NgramIndex(text).drafts(1, 2)
    lookup = NgramIndex(text)
    lookup.drafts(1, 2)
    lookup.extend([2, 3, 1])
    surer, then = lookup.drafts(1, 2)
    assert first.tokens == surer.tokens == [2] and second.tokens == then.tokens == [4]
    assert surer.logp[0] > first.logp[0]
    share = [
        math.exp(b.logp[0]) / (1 - math.exp(a.logp[0])) for a, b in ((first, second), (surer, then))
    ]
    assert share[0] == pytest.approx(share[1])


def test_a_guess_that_is_asked_for_twice_is_judged_once() -> None:
    once, twice = NgramIndex([1, 2, 3, 1]), NgramIndex([1, 2, 3, 1])
    for lookup, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            lookup.drafts(3, 2)
        lookup.extend([9, 1])
    assert once.drafts(3, 2) == twice.drafts(3, 2)
    assert once.drafts(3, 2)[0].logp[0] < math.log(FIRST_DRAFT_RATES[0])


def paths(tree: Tree, row: int) -> dict[tuple[int, ...], float]:
    """Token path to every node that is not padding, and its score; asserts that no path is there
    twice, that parents come first, and that none scores below its child."""
    numbers = tree.tokens_BN[row].tolist()
    parents, scores = tree.parents_BN[row].tolist(), tree.scores_BN[row].tolist()
    assert parents[0] == -1 and scores[0] == 0
    found = {0: ()}
    for node in range(1, tree.nodes):
        if parents[node] < 0:
            assert scores[node] == -math.inf
            continue
        assert parents[node] < node and scores[node] <= scores[parents[node]]
        found[node] = (*found[parents[node]], numbers[node])
    assert len(set(found.values())) == len(found)
    return {path: scores[node] for node, path in found.items()}


def drafted(rows: list[list[tuple[int, int, float]]]) -> Tree:
    """A tree from (token, parent, score) per node."""
    parts = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    return Tree(parts[0].long(), parts[1].long(), parts[2].float())


ROOT, GAP = (7, -1, 0.0), (0, -1, -math.inf)


def test_known_nodes_are_shared_and_new_ones_come_behind() -> None:
    tree = drafted([[ROOT, (1, 0, -0.5), (2, 0, -1.5), (3, 1, -0.75)]])
    candidates = [NgramDraft([1, 3, 4], [-1.0, -1.125, -2.125]), NgramDraft([5], [-3.0])]
    merged = merge_ngrams(tree, [candidates])
    assert merged.tokens_BN.tolist() == [[7, 1, 2, 3, 4, 5]]
    assert merged.parents_BN.tolist() == [[-1, 0, 0, 1, 3, 0]]
    # What follows a known token counts from the known score: -0.5 - 0.125, then 1 less.
    # The draft has children of the root, and 5 is none of them.
    assert merged.scores_BN.tolist() == [[0, -0.5, -1.5, -0.625, -1.625, -3 - HEAD_DISAGREES]]
    assert merged.depths_BN.tolist() == [[0, 1, 1, 2, 3, 1]]
    assert merged.ancestors_BNN[0, 4].tolist() == [True, True, False, True, True, False]
    assert merged.tokens_BN.dtype == merged.parents_BN.dtype == torch.long
    assert merged.scores_BN.dtype == torch.float32


def test_a_guess_can_make_a_node_likelier() -> None:
    tree = drafted([[ROOT, (1, 0, -2.0), (2, 1, -2.5)]])
    assert merge_ngrams(tree, [[NgramDraft([1], [-0.5])]]).scores_BN.tolist() == [[0, -0.5, -2.5]]
    assert tree.scores_BN.tolist() == [[0, -2, -2.5]], "the tree that was given stays as it is"


def test_two_guesses_share_their_beginning() -> None:
    merged = ngram_tree(
        torch.tensor([7]), [[NgramDraft([1, 2], [-0.5, -1.0]), NgramDraft([1, 3], [-0.5, -2.0])]]
    )
    assert merged.tokens_BN.tolist() == [[7, 1, 2, 3]]
    assert merged.parents_BN.tolist() == [[-1, 0, 1, 1]]
    assert merged.scores_BN.tolist() == [[0, -0.5, -1, -2]], "guesses do not doubt each other"


def test_padding_is_no_place_for_a_guess() -> None:
    """Neither as a node that is there already (both are token 0), nor among the path's nodes."""
    tree = drafted([[ROOT, (1, 0, -0.5), GAP], [ROOT, (1, 0, -0.5), (2, 0, -1.0)]])
    merged = merge_ngrams(tree, [[NgramDraft([0], [-1.0])], []])
    assert merged.parents_BN.tolist() == [[-1, 0, -1, 0], [-1, 0, 0, -1]]
    assert merged.valid_BN.tolist() == [[True, True, False, True], [True, True, True, False]]
    assert paths(merged, 0) == {(): 0, (1,): -0.5, (0,): -1.0 - HEAD_DISAGREES}
    assert paths(merged, 1) == {(): 0, (1,): -0.5, (2,): -1.0}


def test_without_guesses_the_tree_stays() -> None:
    tree = drafted([[ROOT, (1, 0, -0.5)], [ROOT, GAP]])
    assert merge_ngrams(tree, [[], []]) is tree
    assert ngram_tree(torch.tensor([3, 4]), [[], []]).tokens_BN.tolist() == [[3], [4]]


def random_case(seed: int, rows: int) -> tuple[Tree, list[list[NgramDraft]]]:
    draw = random.Random(seed)
    nodes, made = draw.randrange(1, 12), []
    for _ in range(rows):
        row, taken = [ROOT], set()
        while len(row) < nodes:
            parent, token = draw.randrange(len(row)), draw.randrange(4)
            if row[parent] == GAP or (parent, token) in taken or draw.random() < 0.1:
                row.append(GAP)
                continue
            taken.add((parent, token))
            row.append((token, parent, row[parent][2] - draw.random()))
        made.append(row)
    candidates = [
        [
            NgramDraft(tokens, [-sum(steps[: d + 1]) for d in range(len(tokens))])
            for tokens, steps in (
                ([draw.randrange(4) for _ in range(depth)], [draw.random() for _ in range(depth)])
                for depth in (draw.randrange(1, 6) for _ in range(draw.randrange(3)))
            )
        ]
        for _ in range(rows)
    ]
    return drafted(made), candidates


@pytest.mark.parametrize("rows", [1, 3])
def test_merging_keeps_what_a_tree_is(rows: int) -> None:
    grown = 0
    for seed in range(150):
        tree, candidates = random_case(seed, rows)
        merged = merge_ngrams(tree, candidates)
        for row in range(rows):
            before, after = paths(tree, row), paths(merged, row)
            drafted = {
                tuple(draft.tokens[: depth + 1]): logp
                for draft in candidates[row]
                for depth, logp in enumerate(draft.logp)
            }
            assert set(after) == set(before) | set(drafted)
            assert all(after[path] >= score for path, score in before.items())
            for path, logp in drafted.items():
                # Once, where the path leaves the tree.
                doubts = 0 if path in before else HEAD_DISAGREES
                assert after[path] >= logp - doubts - 1e-6
            assert all(after[path] == before[path] for path in set(before) - set(drafted))
            lengths = [len(path) for path in after]
            assert merged.depths_BN[row][merged.valid_BN[row]].tolist() == lengths
            single = merge_ngrams(drafted_row(tree, row), candidates[row : row + 1])
            assert paths(single, 0) == after, "a row is what it is ngram_tree"
            grown += len(after) > len(before)
        used = merged.valid_BN.any(0).nonzero().max().item() + 1
        assert merged.nodes == max(tree.nodes, used), "no wider than needed"
    assert grown > 50


def drafted_row(tree: Tree, row: int) -> Tree:
    return Tree(tree.tokens_BN[[row]], tree.parents_BN[[row]], tree.scores_BN[[row]])


class Reader(Oracle):
    """Looks up its guesses, in a text that holds each answer with some tokens changed. drafts:
    whether they join the drafts of the oracle."""

    def __init__(self, family: str, rows: int, told: list[list[int]], drafts: bool):
        super().__init__(target_of(family), told, right=0.5)
        ids_BT, mask_BT = batch(family, rows)
        draw = random.Random(rows)
        self.drafts, self.before = drafts, []
        for ids, mask, answer in zip(ids_BT, mask_BT, told, strict=True):
            changed = [0 if draw.random() < 0.1 else token for token in answer]
            self.before.append(ids[mask == 1].tolist() + changed + ids[mask == 1].tolist())

    def draft(self, state: Known, shape: TreeShape, should_deepen: object = None) -> Tree:
        texts = [
            self.before[row] + self.answers[row][:told]
            for row, told in zip(state.rows, state.told, strict=True)
        ]
        candidates = [NgramIndex(text).drafts(shape.depth, 2) for text in texts]
        if self.drafts:
            return merge_ngrams(super().draft(state, shape), candidates)
        return ngram_tree(torch.tensor([text[-1] for text in texts]), candidates)


@pytest.mark.parametrize("drafts", [True, False], ids=["merged", "alone"])
@pytest.mark.parametrize("sampling", ["", "temperature"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "gpt2"])
def test_decoding_stays_exact(family: str, sampling: str, drafts: bool) -> None:
    for rows in (1, 3):
        expected = reference(family, rows, sampling)
        head = Reader(family, rows, expected, drafts)
        told, stats = speculative(family, head, rows, SHAPES["dynamic"], sampling=sampling)
        assert told == expected
        assert stats.acceptance_length > 1.5 and sum(stats.accepted_per_position) < sum(
            stats.tried_per_position
        )
