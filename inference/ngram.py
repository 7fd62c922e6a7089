"""Guesses for free: what followed earlier in the text where it read as it reads now.

Code, summaries and lists repeat what the prompt or the answer said before. `NgramIndex` finds
earlier occurrences of the text's last tokens and proposes what came after them (prompt lookup; with
the longest match first as in SuffixDecoding, arXiv 2411.04975, and SAM-Decoding, arXiv 2411.10666).
`merge` adds the guesses to the tree that a head drafted; `alone` makes a tree of nothing else.

How likely a guess is depends on how long the match is. A guessed token that is right makes the
match one longer, so one table, by match length, serves every depth; measured on real answers the
chances of depth d after a match of n tokens and of depth 1 after n + d - 1 are the same.

Legend: B batch rows, N tree nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.model.tree.tree import NO_PARENT, Tree

LONGEST = 6  # longest run of tokens that is indexed: longer ones choose no better (0.2 %)
STEPS = 4  # earlier occurrences of a run that are looked at, so that the time does not grow

# Match lengths that share a chance: from each of these up to the next.
LENGTHS = (1, 2, 3, 4, 5, 7, 10, 17)
# How often the guessed token was right, and how often a later guess's first token was where the
# guesses before it were wrong. From 438 greedy answers of SmolLM2-135M-Instruct (37,000 tokens;
# the demo's prompts, HumanEval, GSM8K, MT-bench, Spec-Bench), two guesses of 8 tokens per round,
# 27,000 guessed tokens judged. From 2 tokens on the later guesses are few and share one figure.
FIRST = (0.20, 0.49, 0.63, 0.73, 0.80, 0.84, 0.91, 0.97)
OTHER = (0.12, 0.27, 0.27, 0.27, 0.27, 0.27, 0.27, 0.27)
# How many guesses of a row's own weigh as much as the tables: the best of 6, 12, 24 and 50 by the
# likelihood of those answers.
STRENGTH = 24.0
# A token that the head could have proposed, and did not, came true 0.6 times as often as a match of
# its length says (natural log; the shipped head, trees of 8 nodes, 293 such tokens).
DOUBT = 0.5


class NgramDraft(NamedTuple):
    """tokens: what may come next, in order. logp: for each of them the log of the estimated
    probability that it and all before it come (natural log, never rising)."""

    tokens: list[int]
    logp: list[float]


class _Rate:
    """How often guesses of one kind were right, as the mean of a Beta distribution: what was
    measured beforehand counts like `STRENGTH` guesses, each guess of this row like one."""

    __slots__ = ("chance", "tries")

    def __init__(self, chance: float):
        self.chance, self.tries = chance, STRENGTH

    def learn(self, right: bool) -> None:
        self.tries += 1
        self.chance += (right - self.chance) / self.tries


def _by_length(chances: Sequence[float]) -> list[_Rate]:
    """The rate of each match length up to the last of LENGTHS; there is no length 0."""
    rates = [_Rate(chance) for chance in chances]
    return [rates[bisect_right(LENGTHS, length) - 1] for length in range(LENGTHS[-1] + 1)]


class NgramIndex:
    """One row's text so far, prompt and answer, and where each run of its tokens came last.

    Lives on the host. Time per token and per guess does not grow with the text; memory is about a
    kilobyte per token.
    """

    def __init__(self, tokens: Sequence[int]):
        self._text: list[int] = []
        # Where the text went on after a run of tokens when the run came last.
        self._latest: dict[tuple[int, ...], int] = {}
        # [place][length - 1]: the same for the time before; 0, which follows no run, for none.
        self._earlier: list[tuple[int, ...]] = []
        # By match length; lengths of one group share a rate.
        self._first = _by_length(FIRST)
        self._other = _by_length(OTHER)
        self._asked: list[tuple[list[int], list[_Rate]]] = []
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens. The last guesses are compared with them."""
        self._learn(tokens)
        text, latest = self._text, self._latest
        for token in tokens:
            # The end of the text is entered only now that something follows it.
            runs = _ends(text)
            self._earlier.append(tuple([latest.get(run, 0) for run in runs]))
            latest.update(dict.fromkeys(runs, len(text)))
            text.append(token)

    def _learn(self, tokens: Sequence[int]) -> None:
        for drafted, rates in self._asked:
            for token, came, rate in zip(drafted, tokens, rates, strict=False):
                rate.learn(token == came)
                if token != came:
                    break
            if tokens and drafted[0] == tokens[0]:
                break  # chances of other guesses are those after a miss of the ones before
        self._asked = []

    def drafts(self, depth: int, chains: int) -> list[NgramDraft]:
        """Up to `chains` continuations of `depth` tokens, each with a first token of its own.

        The longest match comes first, among equals (and all of LONGEST and more) the latest. None
        where the last token is new. What comes next, which `extend` will tell, is held against the
        guesses of the last call, so that the row's chances become those of its own text.
        A match that runs into the end of the text repeats itself: after "a b a b" comes "a b".
        """
        self._asked = []
        if depth < 1 or chains < 1:
            return []
        made: list[NgramDraft] = []
        missed = 1.0  # chance that all guesses before this one are wrong
        for place, matched in self._places(chains):
            tokens = self._continued(place, depth)
            rates = self._rates(place, matched, depth, first=not made)
            chance, logp = missed, []
            missed *= 1 - rates[0].chance
            for rate in rates:
                chance *= rate.chance
                logp.append(math.log(chance))
            made.append(NgramDraft(tokens, logp))
            self._asked.append((tokens, rates))
        return made

    def _places(self, chains: int) -> list[tuple[int, int]]:
        """Where the continuations start, and how many tokens before there match."""
        found: dict[int, tuple[int, int]] = {}  # by first token
        for run in reversed(_ends(self._text)):
            place = self._latest.get(run, 0)
            for _ in range(STEPS):
                if place == 0:
                    break
                found.setdefault(self._text[place], (place, len(run)))
                if len(found) == chains:
                    return list(found.values())
                place = self._earlier[place][len(run) - 1]
        return list(found.values())

    def _continued(self, place: int, depth: int) -> list[int]:
        tokens = self._text[place : place + depth]
        for index in range(depth - len(tokens)):
            tokens.append(tokens[index])
        return tokens

    def _rates(self, place: int, matched: int, depth: int, first: bool) -> list[_Rate]:
        """The rate that each token of a continuation belongs to. first: of the first guess."""
        text, most = self._text, LENGTHS[-1]
        while matched < min(most, place) and text[place - 1 - matched] == text[-1 - matched]:
            matched += 1
        rates = self._first[matched : matched + depth]
        rates += rates[-1:] * (depth - len(rates))
        if not first:
            rates[0] = self._other[matched]
        return rates


def _ends(text: list[int]) -> list[tuple[int, ...]]:
    """The last token, the last two, and so on up to the last LONGEST."""
    last = tuple(text[-LONGEST:])
    return [last[start:] for start in range(len(last) - 1, -1, -1)]


def ngram_tree(root_B: Tensor, guesses_B: Sequence[Sequence[NgramDraft]]) -> Tree:
    """A tree of guesses only. root_B: the last committed tokens. guesses_B: each row's guesses."""
    return merge_ngrams(Tree.root(root_B), guesses_B)


def merge_ngrams(tree: Tree, guesses_B: Sequence[Sequence[NgramDraft]]) -> Tree:
    """The tree with the guesses in it, `guesses_B[b]` in row b.

    A guessed token that the tree has at that place already is not added again: the node takes the
    greater of both log-probabilities. What a guess says of a token, given the tokens before it,
    counts from its parent's score in the tree, so no node scores above its parent. Where the tree
    has other children there, the new one is less likely: `DOUBT`. New nodes come behind the old
    ones, rows with fewer are padded.

    Reads the tree on the host, once: an accelerator is waited for.
    """
    if not any(guesses_B):
        return tree
    # One transfer each way; float32, which every device has, holds ids up to 2**24 exactly.
    parts = (tree.tokens_BN, tree.parents_BN, tree.scores_BN)
    rows = torch.stack([part.float() for part in parts], 1).tolist()
    for (tokens, parents, scores), candidates in zip(rows, guesses_B, strict=True):
        _graft(tokens, parents, scores, candidates)
    nodes = max(len(row[0]) for row in rows)
    for tokens, parents, scores in rows:
        missing = nodes - len(tokens)
        tokens += [0] * missing
        parents += [NO_PARENT] * missing
        scores += [-math.inf] * missing
    merged = torch.tensor(rows, dtype=torch.float32, device=tree.tokens_BN.device)
    tokens_BN, parents_BN, scores_BN = merged.unbind(1)
    return Tree(tokens_BN.long(), parents_BN.long(), scores_BN)


def _graft(
    tokens: list[float], parents: list[float], scores: list[float], candidates: Sequence[NgramDraft]
) -> None:
    """Add guesses to one row's nodes, in place."""
    nodes = {place: node for node, place in enumerate(zip(parents, tokens, strict=True))}
    expanded = set(parents)
    for draft in candidates:
        parent, before = 0, 0.0
        for token, logp in zip(draft.tokens, draft.logp, strict=True):
            score = scores[parent] + logp - before
            node = nodes.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                scores.append(score - DOUBT if parent in expanded else score)
            else:
                scores[node] = max(scores[node], score)
            parent, before = node, logp
