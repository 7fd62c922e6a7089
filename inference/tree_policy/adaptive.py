"""How many guesses a round may hold: as many as pay on this machine, for this text.

With p the calibrated probabilities of the paths, a tree of N nodes emits tau = sum of its p tokens
(the root's is 1) and costs C(N) seconds. Tokens per second are greatest when a node is read as long
as p > rate x (C(N + 1) - C(N)), the rate being what decoding reaches over all (the rule of DSpark,
arXiv 2607.05147, and of CaDDTree, arXiv 2606.01813, as the optimality condition of a ratio). The
same holds for one more depth of drafting, and for asking the head at all: on text that it does not
know, plain steps are faster, and it is asked again later. Easy text so gets deep trees, hard text
small ones or none.

The target's own draws decide what is emitted, so none of this can change an answer.

Legend: B batch rows, N nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target

from .cost_model import Costs

MEMORY = 0.9  # of what a round tells about the rate and the head, per round
HOPE = 0.6  # acceptance of a guess one depth further, until some were seen
GOOD = 0.8  # acceptance of a good head's first guess
PAUSE = (4, 64)  # rounds without the head after a loss: at first, and at most
DISTRUST = 0.3  # what a probability counts for at least, so that better times are noticed
EVIDENCE = 4  # rounds with the head before it is judged
HOPELESS = 256  # rounds without the head where not even a good one pays
BARREN = (8, 4, 16)  # plain rounds before several texts are not searched; for how long, at most


@dataclass(frozen=True)
class Budget:
    """Sizes the trees of `decode`. costs: of the machine."""

    costs: Costs

    @staticmethod
    def auto(target: Target, head: DraftHead) -> Budget:
        """From costs measured here; the first call for a target and head takes seconds."""
        return Budget(Costs.of(target, head))

    def start(self) -> Spending:
        return Spending(self.costs)


@dataclass
class Spending:
    """One run's state: how fast it is, and whether the head is worth its time.

    speedup: over plain steps in the last rounds, by the measured costs. worth: tokens that a round
    with the head gave beyond what plain steps would have given in the same time. given: tokens that
    its guesses gave per round. hits: how often the likeliest guess of a next depth is right.
    hoped, came: tokens per row that the guesses read were to give by their probabilities, and gave.
    Where less comes than was hoped for (sampling, unknown text), probabilities count for less.
    """

    costs: Costs
    speedup: float = 1.0
    worth: float = 0.0
    given: float = 1.0
    hits: float = HOPE
    hoped: float = 1.0
    came: float = 1.0
    _rows: int = 0
    _hopeless: bool = False
    _asked: int = 0
    _paused: int = 0
    _pause: int = PAUSE[0]
    _searched: bool = True
    _barren: int = 0
    _unsearched: int = 0
    _search_pause: int = BARREN[1]

    def asks_head(self, known: float, rows: int = 1) -> bool:
        """Whether the head drafts in this round. known: tokens expected of other guesses."""
        if known > self.given:
            return False
        if rows != self._rows:
            before, self._hopeless = self._hopeless, not self._good_head_pays(rows)
            self._rows = rows
            if self._hopeless != before:
                self._paused = HOPELESS if self._hopeless else 0
        if self._paused:
            self._paused -= 1
            return False
        return True

    def looks_up(self, rows: int) -> bool:
        """Whether the texts are searched for guesses in this round: with many of them that takes
        time, and is left out for a while where nothing that it finds is worth reading."""
        self._searched = rows == 1 or not self._unsearched
        if not self._searched:
            self._unsearched -= 1
        return self._searched

    def could_pay(self, hoped: float, rows: int) -> bool:
        """Whether guesses can pay that promise so many tokens in all rows together: even the first
        node of each row costs this much."""
        more = self.costs.read(2 * rows) - self.costs.read(rows)
        return hoped * self._trust > self._rate(rows) * more

    def should_deepen(self, scores_BN: Tensor, deepest_BM: Tensor) -> bool:
        """Whether drafting one depth more pays. scores_BN: of all nodes so far; deepest_BM: of the
        deepest ones, log-probabilities of their paths."""
        rows, nodes = len(scores_BN), self.nodes(scores_BN)
        best = sum(math.exp(score) for score in deepest_BM.amax(1).tolist())
        gain = best * self.hits * self._trust
        more = self.costs.read(rows * (nodes + 1)) - self.costs.read(rows * nodes)
        deeper = self.costs.round(rows, 2, rows) - self.costs.round(rows, 1, rows)
        return gain > self._rate(rows) * (deeper + more)

    def depth(self, most: int, rows: int) -> int:
        """How deep drafting pays, where that is to be said beforehand."""
        deeper = self.costs.round(rows, 2, rows) - self.costs.round(rows, 1, rows)
        depth, chance = 1, self.hits * self.hits * self._trust
        while depth < most and rows * chance > self._rate(rows) * deeper:
            depth, chance = depth + 1, chance * self.hits
        return depth

    def nodes(self, scores_BN: Tensor) -> int:
        """How many nodes, root included, each row's tree should keep: 1 for a plain step."""
        rows = len(scores_BN)
        sorted_BN = scores_BN.sort(1, descending=True).values.tolist()
        rate, best, greatest, tokens = self._rate(rows), 1, -math.inf, 0.0
        for count, scores in enumerate(zip(*sorted_BN, strict=True), start=1):
            chances = sum(map(math.exp, scores))
            tokens += chances if count == 1 else chances * self._trust
            value = tokens - rate * self.costs.read(rows * count)
            if value > greatest:
                best, greatest = count, value
        return best

    def learn(
        self,
        rows: int,
        emitted: int,
        nodes: int,
        depth: int,
        hoped: float | None = None,
        read: int | None = None,
    ) -> None:
        """A round is over: tokens emitted in all rows, nodes read per row, the depths that the head
        drafted (0: it was not asked), and how many guesses were to come true in all rows, if
        known; the depth of what was read, if it is less than what was drafted."""
        if nodes > 1 and hoped is not None:
            self.hoped = _mixed(self.hoped, hoped / rows)
            self.came = _mixed(self.came, emitted / rows - 1)
        self._found(nodes > 1)
        seconds = self.costs.round(rows * nodes, depth, rows)
        steps = seconds / self.costs.read(rows)  # plain steps in the same time
        self.speedup = _mixed(self.speedup, emitted / rows / steps)
        if depth:
            accepted = emitted - rows
            self.given = _mixed(self.given, accepted / rows)
            levels = depth if read is None else read
            tried = accepted + rows * (accepted < rows * levels)
            self.hits = _mixed(self.hits, accepted / tried) if tried else self.hits
            self._judge(emitted / rows - steps)

    def _good_head_pays(self, rows: int) -> bool:
        """Whether a head that guesses well would pay: with many rows reading is arithmetic, and a
        wrong guess costs as much as a token."""
        extra = self.costs.round(2 * rows, 1, rows) - self.costs.read(rows)
        return GOOD * rows > self._rate(rows) * extra

    def _found(self, something: bool) -> None:
        """Search the texts less often while nothing comes of it."""
        if something:
            self._barren, self._search_pause = 0, BARREN[1]
        elif self._searched:
            self._barren += 1
            if self._barren >= BARREN[0]:
                self._unsearched = self._search_pause
                self._search_pause = min(2 * self._search_pause, BARREN[2])

    def _judge(self, surplus: float) -> None:
        """Send the head away while it costs more than it gives."""
        self._asked += 1
        self.worth = _mixed(self.worth, surplus)
        if self.worth >= 0:
            self._pause = PAUSE[0]
        elif self._asked >= EVIDENCE:
            self._paused, self._pause = self._pause, min(2 * self._pause, PAUSE[1])
            self._asked, self.worth = EVIDENCE - 1, 0.0  # one good round brings it back

    @property
    def _trust(self) -> float:
        return min(max(self.came / self.hoped, DISTRUST), 1.0)

    def _rate(self, rows: int) -> float:
        """Tokens per second in all rows; plain steps always give that of a speed-up of 1."""
        return max(self.speedup, 1.0) * rows / self.costs.read(rows)


def _mixed(before: float, now: float) -> float:
    return MEMORY * before + (1 - MEMORY) * now
