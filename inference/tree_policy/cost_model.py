"""The cost model of a decode step: how long verifying and drafting take on one machine.

Which tree is best depends on how much longer a forward pass over many nodes takes than one over a
single token: nearly nothing on a large GPU, a fifth of a step per node on many CPUs.
`engine.measure_costs` measures the numbers.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Measured seconds of the parts of a decode step, for one sequence.

    nodes: the node counts that were timed, ascending; the first is 1.
    verify: seconds of a forward pass over a tree of so many nodes, one per entry of `nodes`; the
        first is an autoregressive step.
    advance: the head processes an accepted path and drafts the first depth.
    deepen: one more depth of drafting.
    rest: everything else in a speculative step (choosing nodes, accepting, moving keys).
    """

    nodes: tuple[int, ...]
    verify: tuple[float, ...]
    advance: float
    deepen: float
    rest: float

    def verify_seconds(self, nodes: int) -> float:
        """Seconds to verify `nodes` nodes, those of all sequences together.

        Interpolates between measured counts. Past the last one it extrapolates with the last slope,
        or with the mean slope of all but the first if that is steeper: several sequences together
        are many nodes, and a GPU on which 64 cost no more than 32 is busy with 512.
        """
        high = min(max(bisect_left(self.nodes, nodes), 1), len(self.nodes) - 1)
        left, right = self.nodes[high - 1], self.nodes[high]
        low_cost, high_cost = self.verify[high - 1], self.verify[high]
        slope = (high_cost - low_cost) / (right - left)
        if nodes > right > self.nodes[1]:
            slope = max(slope, (high_cost - self.verify[1]) / (right - self.nodes[1]))
        return high_cost + slope * (nodes - right)

    def step_seconds(self, nodes: int, depth: int, batch: int = 1) -> float:
        """Seconds of a whole decode step.

        nodes: nodes of the trees of all `batch` sequences together.
        depth: depths that the head drafts; 0: the head does not draft.

        Drafting is timed for one sequence; for more it is assumed to grow as an autoregressive step
        does.
        """
        seconds = self.verify_seconds(nodes)
        if nodes > batch or depth:
            drafting = self.advance + (depth - 1) * self.deepen if depth else 0.0
            seconds += (drafting + self.rest) * self.verify_seconds(batch) / self.verify_seconds(1)
        return seconds
