"""The best static tree for the acceptance rates that were measured for a head.

Sequoia (arXiv 2402.12374) finds the best tree with a dynamic programme over subtrees. Here none is
needed. A path of ranks (r1, .., rk) is accepted with probability a[1][r1] * .. * a[k][rk], and the
expected acceptance length of a tree is 1 (the target's own token) plus the sum over its nodes.
Every factor is at most 1, so a node is never worth more than its parent: the N most valuable paths
contain the prefixes of all of them, hence are a tree, and no other N paths add up to more.

This assumes that acceptance depends on depth and rank alone, not on the draft tokens before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from headstart.model.tree.shape import TreeShape

Path = tuple[int, ...]
RankAcceptance = Sequence[Sequence[float]]  # acceptance rate per depth, per rank
StepSeconds = Callable[[int, int], float]  # of a decode step, given nodes and depth
MAX_NODES = 64


def best_static(rank_acceptance: RankAcceptance, nodes: int, depth: int | None = None) -> TreeShape:
    """The static tree with the greatest expected acceptance length.

    rank_acceptance: acceptance rate per depth and rank.
    nodes: maximum, the root included; paths that are never accepted are left out.
    depth: maximum; None: as deep as was measured.
    ValueError if there is nothing to choose from.
    """
    if nodes < 2 or (depth is not None and depth < 1):
        raise ValueError(
            f"A tree needs nodes >= 2 and depth >= 1 (got nodes {nodes}, depth {depth}). For no "
            "speculation use autoregressive decoding."
        )
    paths = [path for path, _ in islice(_best_paths(rank_acceptance[:depth]), nodes - 1)]
    if not paths:
        raise ValueError(
            "No draft token of this head was ever accepted, or none was measured, so no tree is "
            "the best. Run `headstart calibrate` on its checkpoint, or name a tree."
        )
    return TreeShape.static(paths)


def fastest_static_tree(
    rank_acceptance: RankAcceptance, step_seconds: StepSeconds, nodes: int = MAX_NODES
) -> TreeShape:
    """The static tree with the most expected tokens per second.

    rank_acceptance: acceptance rate per depth and rank.
    step_seconds: seconds of a whole decode step, given nodes (root included) and depth; must not
        fall with depth.
    nodes: of the largest tree to consider.
    ValueError if there is nothing to choose from.
    """
    best, fastest = None, 0.0
    for limit in range(1, len(rank_acceptance) + 1):
        length, depth = 1.0, 0
        ranked = islice(_best_paths(rank_acceptance[:limit]), nodes - 1)
        for size, (path, value) in enumerate(ranked, start=2):
            length, depth = length + value, max(depth, len(path))
            speed = length / step_seconds(size, depth)
            if speed > fastest:
                best, fastest = (size, limit), speed
    return best_static(rank_acceptance, *(best or (nodes, None)))


def _best_paths(rank_acceptance: RankAcceptance) -> Iterator[tuple[Path, float]]:
    """All paths that are ever accepted and their probabilities, the likeliest first."""
    waiting: list[tuple[float, int, Path]] = []

    def add_children(path: Path, value: float) -> None:
        if len(path) == len(rank_acceptance):
            return
        for rank, acceptance in enumerate(rank_acceptance[len(path)]):
            if value * acceptance > 0:
                heapq.heappush(waiting, (-value * acceptance, len(path) + 1, (*path, rank)))

    add_children((), 1.0)
    while waiting:
        value, _, path = heapq.heappop(waiting)
        yield path, -value
        add_children(path, -value)
