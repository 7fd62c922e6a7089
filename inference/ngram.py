"""N-gram drafts (prompt lookup): what followed earlier where the sequence had the same last tokens.

Code, summaries and lists repeat what the prompt or the response had before. `NgramIndex` finds
earlier occurrences of the last tokens and drafts what came after them (the longest match first, as
in SuffixDecoding, arXiv 2411.04975, and SAM-Decoding, arXiv 2411.10666). `merge_ngrams` adds the
drafts to the tree of a head; `ngram_tree` makes a tree of nothing else.

The probability of a draft token depends on the length of the match. An accepted draft token makes
the match one longer, so one table, by match length, serves every depth; measured on real responses
the probabilities at depth d after a match of n tokens and at depth 1 after n + d - 1 are the same.

Legend: B sequences, N tree nodes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.model.backends.select import select_ops
from headstart.model.tree.tree import NO_PARENT, Tree

MAX_NGRAM = 6  # longest n-gram that is indexed: longer ones choose no better (0.2 %)
MAX_OCCURRENCES = 4  # earlier occurrences of an n-gram that are considered, which bounds the time

# Match lengths that share a rate: from each of these up to the next.
MATCH_LENGTHS = (1, 2, 3, 4, 5, 7, 10, 17)
# How often a draft token was accepted, and how often the first token of a later draft was where the
# drafts before it were rejected. From 438 greedy responses of SmolLM2-135M-Instruct (37,000 tokens;
# the demo's prompts, HumanEval, GSM8K, MT-bench, Spec-Bench), two drafts of 8 tokens per step,
# 27,000 draft tokens. From 2 tokens on the later drafts are few and share one rate.
FIRST_DRAFT_RATES = (0.20, 0.49, 0.63, 0.73, 0.80, 0.84, 0.91, 0.97)
LATER_DRAFT_RATES = (0.12, 0.27, 0.27, 0.27, 0.27, 0.27, 0.27, 0.27)
# How many drafts of a sequence's own weigh as much as the tables: the best of 6, 12, 24 and 50 by
# the likelihood of those responses.
PRIOR_WEIGHT = 24.0
# A token that the head could have drafted, and did not, was accepted 0.6 times as often as the
# match length predicts (natural log; the shipped head, trees of 8 nodes, 293 such tokens).
HEAD_DISAGREES = 0.5


class NgramDraft(NamedTuple):
    """A draft from earlier in the sequence.

    tokens: draft tokens, in order.
    logp: for each, the estimated log-probability that it and all before it are accepted (natural
        log, never rising).
    """

    tokens: list[int]
    logp: list[float]


class _Rate:
    """An acceptance rate, as the mean of a Beta distribution: the tables count like `PRIOR_WEIGHT`
    drafts, each draft of this sequence like one."""

    __slots__ = ("mean", "weight")

    def __init__(self, mean: float):
        self.mean, self.weight = mean, PRIOR_WEIGHT

    def update(self, accepted: bool) -> None:
        self.weight += 1
        self.mean += (accepted - self.mean) / self.weight


def _by_length(rates: Sequence[float]) -> list[_Rate]:
    """The rate for each match length up to the last of MATCH_LENGTHS; there is no length 0."""
    shared = [_Rate(rate) for rate in rates]
    longest = MATCH_LENGTHS[-1]
    return [shared[bisect_right(MATCH_LENGTHS, length) - 1] for length in range(longest + 1)]


class NgramIndex:
    """The tokens of one sequence, prompt and response, and where each n-gram occurred last.

    Lives on the host. Time per token and per draft does not grow with the sequence; memory is about
    a kilobyte per token.
    """

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        # For each n-gram, the position after its last occurrence.
        self._latest: dict[tuple[int, ...], int] = {}
        # [position][length - 1]: the position after the occurrence before; 0 for none.
        self._earlier: list[tuple[int, ...]] = []
        # By match length; lengths of one group share a rate.
        self._first = _by_length(FIRST_DRAFT_RATES)
        self._later = _by_length(LATER_DRAFT_RATES)
        self._pending: list[tuple[list[int], list[_Rate]]] = []  # drafts of the last call
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence. They update the rates of the last drafts."""
        self._update_rates(tokens)
        known, latest = self._tokens, self._latest
        for token in tokens:
            # The n-grams at the end are indexed only now that something follows them.
            ngrams = _last_ngrams(known)
            self._earlier.append(tuple([latest.get(ngram, 0) for ngram in ngrams]))
            latest.update(dict.fromkeys(ngrams, len(known)))
            known.append(token)

    def drafts(self, depth: int, count: int) -> list[NgramDraft]:
        """Up to `count` drafts of `depth` tokens, each with another first token.

        The longest match comes first, among equals (and all of MAX_NGRAM and more) the latest. None
        where the last token is new. The tokens of the next `extend` are compared with these drafts,
        so that the rates become those of this sequence. A match that reaches the end of the
        sequence repeats itself: after "a b a b" comes "a b".
        """
        self._pending = []
        if depth < 1 or count < 1:
            return []
        made: list[NgramDraft] = []
        all_rejected = 1.0  # probability that all drafts before this one are rejected
        for position, matched in self._positions(count):
            tokens = self._continuation(position, depth)
            rates = self._rates(position, matched, depth, is_first=not made)
            probability, logp = all_rejected, []
            all_rejected *= 1 - rates[0].mean
            for rate in rates:
                probability *= rate.mean
                logp.append(math.log(probability))
            made.append(NgramDraft(tokens, logp))
            self._pending.append((tokens, rates))
        return made

    def _update_rates(self, tokens: Sequence[int]) -> None:
        for drafted, rates in self._pending:
            for token, actual, rate in zip(drafted, tokens, rates, strict=False):
                rate.update(token == actual)
                if token != actual:
                    break
            if tokens and drafted[0] == tokens[0]:
                break  # rates of later drafts are those after the ones before were rejected
        self._pending = []

    def _positions(self, count: int) -> list[tuple[int, int]]:
        """Where the continuations start, and how many tokens before there match."""
        found: dict[int, tuple[int, int]] = {}  # by first token
        for ngram in reversed(_last_ngrams(self._tokens)):
            position = self._latest.get(ngram, 0)
            for _ in range(MAX_OCCURRENCES):
                if position == 0:
                    break
                found.setdefault(self._tokens[position], (position, len(ngram)))
                if len(found) == count:
                    return list(found.values())
                position = self._earlier[position][len(ngram) - 1]
        return list(found.values())

    def _continuation(self, position: int, depth: int) -> list[int]:
        tokens = self._tokens[position : position + depth]
        for index in range(depth - len(tokens)):
            tokens.append(tokens[index])
        return tokens

    def _rates(self, position: int, matched: int, depth: int, is_first: bool) -> list[_Rate]:
        """The rate of each token of a draft. is_first: of the first draft."""
        known, longest = self._tokens, MATCH_LENGTHS[-1]
        while matched < min(longest, position):
            if known[position - 1 - matched] != known[-1 - matched]:
                break
            matched += 1
        rates = self._first[matched : matched + depth]
        rates += rates[-1:] * (depth - len(rates))
        if not is_first:
            rates[0] = self._later[matched]
        return rates


def _last_ngrams(tokens: list[int]) -> list[tuple[int, ...]]:
    """The last token, the last two, and so on up to the last MAX_NGRAM."""
    last = tuple(tokens[-MAX_NGRAM:])
    return [last[start:] for start in range(len(last) - 1, -1, -1)]


def ngram_tree(root_B: Tensor, drafts_B: Sequence[Sequence[NgramDraft]]) -> Tree:
    """A tree of n-gram drafts only.

    root_B: the last committed tokens.
    drafts_B: those of each sequence.
    """
    return merge_ngrams(Tree.root(root_B, select_ops(root_B.device)), drafts_B)


def merge_ngrams(tree: Tree, drafts_B: Sequence[Sequence[NgramDraft]]) -> Tree:
    """The trees with the n-gram drafts of each sequence merged into them.

    A draft token that the tree has at that place already is not added again: the node takes the
    greater of both log-probabilities. The probability of a draft token, given the tokens before it,
    is multiplied with its parent's in the tree, so no node scores above its parent. Where the tree
    has other children there, the new one is less likely: `HEAD_DISAGREES`. New nodes come after the
    old ones; smaller trees are padded.

    Copies the tree to the host, so it waits for an accelerator.
    """
    if not any(drafts_B):
        return tree
    # One transfer each way; float32, which every device has, holds ids up to 2**24 exactly.
    parts = (tree.tokens_BN, tree.parents_BN, tree.scores_BN)
    rows = torch.stack([part.float() for part in parts], 1).tolist()
    for (tokens, parents, scores), drafts in zip(rows, drafts_B, strict=True):
        _add_nodes(tokens, parents, scores, drafts)
    nodes = max(len(row[0]) for row in rows)
    for tokens, parents, scores in rows:
        missing = nodes - len(tokens)
        tokens += [0] * missing
        parents += [NO_PARENT] * missing
        scores += [-math.inf] * missing
    merged = torch.tensor(rows, dtype=torch.float32, device=tree.tokens_BN.device)
    tokens_BN, parents_BN, scores_BN = merged.unbind(1)
    return Tree(tokens_BN.long(), parents_BN.long(), scores_BN, tree.ops)


def _add_nodes(
    tokens: list[float], parents: list[float], scores: list[float], drafts: Sequence[NgramDraft]
) -> None:
    """Add drafts to the nodes of one sequence, in place."""
    nodes = {place: node for node, place in enumerate(zip(parents, tokens, strict=True))}
    expanded = set(parents)
    for draft in drafts:
        parent, before = 0, 0.0
        for token, logp in zip(draft.tokens, draft.logp, strict=True):
            score = scores[parent] + logp - before
            node = nodes.setdefault((parent, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(parent)
                scores.append(score - HEAD_DISAGREES if parent in expanded else score)
            else:
                scores[node] = max(scores[node], score)
            parent, before = node, logp
