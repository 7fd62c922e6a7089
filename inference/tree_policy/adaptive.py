"""Adaptive tree size: verify as many draft tokens as pay on this machine, for this sequence.

Let p be the calibrated probabilities of the paths. A tree of N nodes emits tau = sum of its p
tokens (the root's is 1) and costs C(N) seconds. Tokens per second are greatest when a node is
verified as long as p > rate x (C(N + 1) - C(N)), where rate is the throughput that decoding reaches
overall (the rule of DSpark, arXiv 2607.05147, and of CaDDTree, arXiv 2606.01813, as the optimality
condition of a ratio). The same rule decides whether to draft one depth more, and whether to run the
head at all: on text that the head does not predict well, autoregressive steps are faster, and the
head is tried again later. So easy text gets deep trees, hard text small ones or none.

The target's own draws decide what is emitted, so none of this changes the output.

Legend: B sequences, N nodes, M nodes of the deepest level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .cost_model import Costs

DECAY = 0.9  # of the moving averages, per decode step
INITIAL_DEPTH_RATE = 0.6  # acceptance rate of one depth more, until some was measured
GOOD_HEAD_RATE = 0.8  # acceptance rate of a good head's first draft token
HEAD_BACKOFF = (4, 64)  # steps without the head after a loss: at first, and at most
MIN_TRUST = 0.3  # weight of a probability at least, so that a recovery is noticed
MIN_EVIDENCE = 4  # steps with the head before it is judged
REPROBE_STEPS = 256  # steps without the head where not even a good one pays
# Autoregressive steps before n-grams are no longer searched in a batch; for how many steps they are
# not searched, at first and at most.
NGRAM_BACKOFF = (8, 4, 16)


@dataclass
class AdaptivePolicy:
    """Sizes the trees of one decoding run, and pauses drafting while it does not pay.

    costs: of a decode step on this machine.
    speedup: of the last steps over autoregressive steps, by the measured costs.
    surplus: tokens per sequence that a step with the head emitted beyond what autoregressive steps
        would have emitted in the same time.
    accepted_per_step: accepted draft tokens per sequence and step with the head.
    next_depth_rate: acceptance rate of the likeliest draft token one depth further.
    expected, accepted: draft tokens per sequence that should be accepted by their probabilities,
        and that were. Where fewer are accepted than expected (sampling, unknown text),
        probabilities count for less.
    All are moving averages.
    """

    costs: Costs
    speedup: float = 1.0
    surplus: float = 0.0
    accepted_per_step: float = 1.0
    next_depth_rate: float = INITIAL_DEPTH_RATE
    expected: float = 1.0
    accepted: float = 1.0
    _batch: int = 0
    _head_cannot_pay: bool = False
    _head_steps: int = 0
    _head_paused: int = 0
    _head_backoff: int = HEAD_BACKOFF[0]
    _ngrams_searched: bool = True
    _steps_without_draft: int = 0
    _ngrams_paused: int = 0
    _ngram_backoff: int = NGRAM_BACKOFF[1]

    def uses_head(self, ngram_tokens: float, batch: int = 1) -> bool:
        """Whether the head drafts in this step; call once per step.

        ngram_tokens: accepted tokens per sequence to expect from the n-gram drafts.
        batch: sequences.
        """
        if ngram_tokens > self.accepted_per_step:
            return False
        if batch != self._batch:
            before, self._head_cannot_pay = self._head_cannot_pay, not self._good_head_pays(batch)
            self._batch = batch
            if self._head_cannot_pay != before:
                self._head_paused = REPROBE_STEPS if self._head_cannot_pay else 0
        if self._head_paused:
            self._head_paused -= 1
            return False
        return True

    def searches_ngrams(self, batch: int) -> bool:
        """Whether n-gram drafts are searched in this step; call once per step.

        In a batch the search takes time, so it is paused while none of its drafts is verified.
        """
        self._ngrams_searched = batch == 1 or not self._ngrams_paused
        if not self._ngrams_searched:
            self._ngrams_paused -= 1
        return self._ngrams_searched

    def could_pay(self, expected: float, batch: int) -> bool:
        """Whether drafts with so many expected accepted tokens, over all sequences, can pay even
        the first node of each sequence."""
        more = self.costs.verify_seconds(2 * batch) - self.costs.verify_seconds(batch)
        return expected * self._trust > self._rate(batch) * more

    def should_deepen(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
        """Whether drafting one depth more pays.

        scores_BN, deepest_BM: log-probabilities of the paths to all nodes, and to the deepest.
        """
        batch, nodes = len(scores_BN), self.num_nodes(scores_BN)
        best = sum(math.exp(score) for score in deepest_BM.amax(1).tolist())
        gain = best * self.next_depth_rate * self._trust
        seconds = self.costs.verify_seconds
        verify = seconds(batch * (nodes + 1)) - seconds(batch * nodes)
        return gain > self._rate(batch) * (self._seconds_per_depth(batch) + verify)

    def depth(self, max_depth: int, batch: int) -> int:
        """The depth that pays, chosen before drafting."""
        deeper = self._seconds_per_depth(batch)
        depth, chance = 1, self.next_depth_rate * self.next_depth_rate * self._trust
        while depth < max_depth and batch * chance > self._rate(batch) * deeper:
            depth, chance = depth + 1, chance * self.next_depth_rate
        return depth

    def num_nodes(self, scores_BN: Tensor) -> int:
        """How many nodes of each tree to verify, the root included; 1: an autoregressive step."""
        batch = len(scores_BN)
        sorted_BN = scores_BN.sort(1, descending=True).values.tolist()
        rate, best, greatest, tokens = self._rate(batch), 1, -math.inf, 0.0
        for count, scores in enumerate(zip(*sorted_BN, strict=True), start=1):
            chances = sum(map(math.exp, scores))
            tokens += chances if count == 1 else chances * self._trust
            value = tokens - rate * self.costs.verify_seconds(batch * count)
            if value > greatest:
                best, greatest = count, value
        return best

    def update(
        self,
        batch: int,
        emitted: int,
        nodes: int,
        depth: int,
        full_depth: int | None = None,
        expected: float | None = None,
    ) -> None:
        """Take in a finished decode step.

        batch: sequences in it.
        emitted: tokens emitted over all of them.
        nodes: verified per sequence, the root included.
        depth: that the head drafted; 0: it did not draft.
        full_depth: accepted draft tokens of a sequence beyond which none were possible; None:
            `depth`.
        expected: draft tokens over all sequences that should have been accepted; None: not known.
        """
        if nodes > 1 and expected is not None:
            self.expected = _average(self.expected, expected / batch)
            self.accepted = _average(self.accepted, emitted / batch - 1)
        self._update_ngram_backoff(drafted=nodes > 1)
        seconds = self.costs.step_seconds(batch * nodes, depth, batch)
        steps = seconds / self.costs.verify_seconds(batch)  # autoregressive ones in the same time
        self.speedup = _average(self.speedup, emitted / batch / steps)
        if depth:
            accepted = emitted - batch
            self.accepted_per_step = _average(self.accepted_per_step, accepted / batch)
            levels = depth if full_depth is None else full_depth
            tried = accepted + batch * (accepted < batch * levels)
            if tried:
                self.next_depth_rate = _average(self.next_depth_rate, accepted / tried)
            self._update_head_backoff(emitted / batch - steps)

    def _seconds_per_depth(self, batch: int) -> float:
        return self.costs.step_seconds(batch, 2, batch) - self.costs.step_seconds(batch, 1, batch)

    def _good_head_pays(self, batch: int) -> bool:
        """Whether a good head would pay: in a large batch verifying is bound by arithmetic, and a
        rejected draft token costs as much as an emitted token."""
        extra = self.costs.step_seconds(2 * batch, 1, batch) - self.costs.verify_seconds(batch)
        return GOOD_HEAD_RATE * batch > self._rate(batch) * extra

    def _update_ngram_backoff(self, drafted: bool) -> None:
        if drafted:
            self._steps_without_draft, self._ngram_backoff = 0, NGRAM_BACKOFF[1]
        elif self._ngrams_searched:
            self._steps_without_draft += 1
            if self._steps_without_draft >= NGRAM_BACKOFF[0]:
                self._ngrams_paused = self._ngram_backoff
                self._ngram_backoff = min(2 * self._ngram_backoff, NGRAM_BACKOFF[2])

    def _update_head_backoff(self, surplus: float) -> None:
        """Pause drafting while its measured speed-up is below 1."""
        self._head_steps += 1
        self.surplus = _average(self.surplus, surplus)
        if self.surplus >= 0:
            self._head_backoff = HEAD_BACKOFF[0]
        elif self._head_steps >= MIN_EVIDENCE:
            self._head_paused = self._head_backoff
            self._head_backoff = min(2 * self._head_backoff, HEAD_BACKOFF[1])
            self._head_steps, self.surplus = MIN_EVIDENCE - 1, 0.0  # one good step resumes it

    @property
    def _trust(self) -> float:
        """Weight of the draft's probabilities."""
        return min(max(self.accepted / self.expected, MIN_TRUST), 1.0)

    def _rate(self, batch: int) -> float:
        """Tokens per second over all sequences, at least those of autoregressive steps."""
        return max(self.speedup, 1.0) * batch / self.costs.verify_seconds(batch)


def _average(before: float, now: float) -> float:
    return DECAY * before + (1 - DECAY) * now
