"""Shapes of draft trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TreeShape:
    """The shape of the tree that a head drafts.

    nodes: number of nodes of the finished tree, root included.
    depth: maximum number of draft tokens on a path.
    width: nodes expanded per depth, and children of each of them.
    ranks: of a static tree, the paths of child ranks that exist, e.g. ((0,), (0, 0), (1,)). None
        for a dynamic tree, which keeps the nodes with the highest path probability (EAGLE-2, arXiv
        2406.16858).
    """

    nodes: int
    depth: int
    width: int
    ranks: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        sizes = (self.depth, self.width, self.nodes)
        whole = all(isinstance(size, int) for size in sizes)
        if not whole or self.depth < 1 or self.width < 1 or self.nodes < 2:
            raise ValueError(
                f"A tree needs whole numbers: depth >= 1, width >= 1 and nodes >= 2 (got depth "
                f"{self.depth}, width {self.width}, nodes {self.nodes}). For no speculation use "
                "autoregressive decoding."
            )

    @staticmethod
    def chain(depth: int) -> TreeShape:
        """One draft token per depth."""
        nodes = depth + 1 if isinstance(depth, int) else 0  # invalid, as the depth is
        return TreeShape(nodes=nodes, depth=depth, width=1)

    @staticmethod
    def dynamic(nodes: int, depth: int, width: int) -> TreeShape:
        """The `nodes - 1` draft tokens with the highest path probability."""
        return TreeShape(nodes=nodes, depth=depth, width=width)

    @staticmethod
    def static(ranks: Sequence[Sequence[int]]) -> TreeShape:
        """A fixed shape: every path of child ranks that exists, each with all its prefixes."""
        if not _are_paths(ranks):
            raise ValueError(
                "A static tree needs at least one path, and a path is a non-empty list of child "
                f"ranks (0 is the top-1 child), for example [[0], [0, 0], [1]]. Got {ranks!r}."
            )
        paths = tuple(sorted((tuple(path) for path in ranks), key=lambda path: (len(path), path)))
        for path in paths:
            if len(path) > 1 and path[:-1] not in paths:
                raise ValueError(
                    f"The static tree has the path {list(path)} but not its parent "
                    f"{list(path[:-1])}. Add the parent: a node cannot be verified without it."
                )
        if len(set(paths)) != len(paths):
            raise ValueError("The static tree lists a path twice. List every path once.")
        width = max(max(path) for path in paths) + 1
        return TreeShape(len(paths) + 1, max(map(len, paths)), width, paths)

    def limited(self, depth: int) -> TreeShape:
        """The same shape, no deeper than `depth`."""
        if depth >= self.depth:
            return self
        if self.ranks is not None:
            return TreeShape.static([path for path in self.ranks if len(path) <= depth])
        nodes = depth + 1 if self.width == 1 else self.nodes
        return TreeShape(min(nodes, self.nodes), depth, self.width)


def _are_paths(ranks: object) -> bool:
    def listed(value: object) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0

    if not isinstance(ranks, Sequence) or not listed(ranks) or not all(map(listed, ranks)):
        return False
    return all(isinstance(rank, int) and rank >= 0 for path in ranks for rank in path)
