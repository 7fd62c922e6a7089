"""The best fixed tree for what is known of a head: how often its r-th guess at depth d comes.

Sequoia (arXiv 2402.12374) finds the best tree by a dynamic programme over subtrees. Here none is
needed. A path of ranks (r1, .., rk) is accepted with probability a[1][r1] * .. * a[k][rk], and the
expected accepted length of a tree is 1 (the target's own token) plus the sum over its nodes. Every
factor is at most 1, so a node is never worth more than its parent: the N most valuable paths hold
the prefixes of all of them, hence are a tree, and no other N paths add up to more.

That takes acceptance to depend on depth and rank alone, not on the guesses before.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from headstart.model.tree.shape import TreeShape

Path = tuple[int, ...]
RankAcceptance = Sequence[Sequence[float]]  # per depth, per rank (model/meta.py)
Cost = Callable[[int, int], float]  # seconds of a round, of nodes and depth
MOST_NODES = 64


def best_static(rank_acceptance: RankAcceptance, nodes: int, depth: int | None = None) -> TreeShape:
    """The tree with the greatest expected accepted length.

    nodes: at most so many, root included; paths that are never accepted are left out. depth: its
    longest path at most; what was measured if left out.
    ValueError when there is nothing to choose from.
    """
    if nodes < 2 or (depth is not None and depth < 1):
        raise ValueError(
            f"A tree needs nodes >= 2 and depth >= 1 (got nodes {nodes}, depth {depth}). For no "
            "speculation use plain decoding."
        )
    paths = [path for path, _ in islice(_best_paths(rank_acceptance[:depth]), nodes - 1)]
    if not paths:
        raise ValueError(
            "No guess of this head was ever right, or none was measured, so no tree is the best. "
            "Run `headstart calibrate` on its checkpoint, or name a tree."
        )
    return TreeShape.static(paths)


def best_for(rank_acceptance: RankAcceptance, cost: Cost, nodes: int = MOST_NODES) -> TreeShape:
    """The static tree with the most expected tokens per second.

    cost: seconds of a whole round with a tree of so many nodes (root included) and such a depth;
    a deeper tree of as many nodes must not cost less. nodes: of the largest tree to consider.
    ValueError when there is nothing to choose from.
    """
    best, fastest = None, 0.0
    for limit in range(1, len(rank_acceptance) + 1):
        length, depth = 1.0, 0
        ranked = islice(_best_paths(rank_acceptance[:limit]), nodes - 1)
        for size, (path, value) in enumerate(ranked, start=2):
            length, depth = length + value, max(depth, len(path))
            speed = length / cost(size, depth)
            if speed > fastest:
                best, fastest = (size, limit), speed
    return best_static(rank_acceptance, *(best or (nodes, None)))


def _best_paths(rank_acceptance: RankAcceptance) -> Iterator[tuple[Path, float]]:
    """All paths that are ever accepted, the likeliest first, and their probabilities."""
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
