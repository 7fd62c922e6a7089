"""How a tree grows, depth by depth.

Legend: B sequences, N tree nodes, M nodes of one depth or chosen ones, F frontier nodes (those
expanded at one depth), W children per node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from headstart.model.backends import cuda_ops as accelerated

from .shape import TreeShape
from .tree import Tree


@dataclass(frozen=True)
class Frontier:
    """The nodes whose children are wanted next.

    tokens_BF; parents_BF: each one's parent as an index into the previous frontier; depth: of the
    nodes themselves, 1 for the root's children.
    """

    tokens_BF: Tensor
    parents_BF: Tensor
    depth: int


# log-probabilities of the W likeliest children of each frontier node, and their tokens
Children = tuple[Tensor, Tensor]  # logp_BFW, tokens_BFW


# (scores_BN of all candidates, scores_BM of the deepest) -> whether one depth more is wanted
ShouldDeepen = Callable[[Tensor, Tensor], bool]


def grow(
    root_B: Tensor,
    first: Children,
    step: Callable[[Frontier], Children],
    shape: TreeShape,
    should_deepen: ShouldDeepen | None = None,
) -> Tree:
    """Grow a tree from the root.

    root_B: the last committed tokens. first: the root's children (F = 1). step: asked once per
    further depth for the children of a frontier. Each W must be at least `shape.width`, best first.
    goes_on: may end a dynamic tree before `shape.depth`.
    """
    on_a_gpu = accelerated.functions(root_B.device) if shape.ranks is None else None
    pool = _Pool(root_B) if on_a_gpu is None else _PoolOnAGPU(root_B, shape, on_a_gpu)
    parents_BF = torch.zeros_like(root_B)[:, None]
    logp_BFW, tokens_BFW = first
    chosen = _chosen(shape, 1)
    for depth in range(1, shape.depth + 1):
        if chosen is None:  # dynamic: every child is a candidate
            pool.add(parents_BF, logp_BFW[..., : shape.width], tokens_BFW[..., : shape.width])
        else:
            pool.add_ranks(parents_BF, logp_BFW, tokens_BFW, chosen)
        if depth == shape.depth or (
            should_deepen and not should_deepen(pool.scores_BN, pool.deepest_BM)
        ):
            break
        parents_BF, frontier = pool.frontier(shape, depth)
        logp_BFW, tokens_BFW = step(frontier)
        chosen = _chosen(shape, depth + 1)
    tree = Tree(pool.tokens_BN, pool.parents_BN, pool.scores_BN)
    return tree.cut(shape.nodes)


def _chosen(shape: TreeShape, depth: int) -> list[tuple[int, int]] | None:
    """(frontier index, child rank) of a static tree's nodes at a depth, in path order."""
    if shape.ranks is None:
        return None
    expanded = _expanded(shape, depth - 1)
    place = {path: index for index, path in enumerate(expanded)}
    return [(place[path[:-1]], path[-1]) for path in shape.ranks if len(path) == depth]


def _expanded(shape: TreeShape, depth: int) -> list[tuple[int, ...]]:
    """A static tree's paths of a given depth that have children."""
    assert shape.ranks is not None
    if depth == 0:
        return [()]
    parents = {path[:-1] for path in shape.ranks if len(path) == depth + 1}
    return sorted(parents)


@lru_cache(maxsize=256)
def _constant(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Sent to the device once: a CUDA graph cannot be recorded while the host sends numbers."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


class _Pool:
    """All candidates so far, depth after depth."""

    def __init__(self, root_B: Tensor):
        tree = Tree.root(root_B)
        self.tokens_BN, self.parents_BN = tree.tokens_BN, tree.parents_BN
        self.scores_BN = tree.scores_BN
        self._last = 0  # first index of the deepest depth
        self._frontier_BF = torch.zeros_like(tree.tokens_BN)

    @property
    def deepest_BM(self) -> Tensor:
        """Scores of the deepest candidates."""
        return self.scores_BN[:, self._last :]

    def add(self, parents_BF: Tensor, logp_BFW: Tensor, tokens_BFW: Tensor) -> None:
        batch, frontier, width = tokens_BFW.shape
        parents_BFW = parents_BF[..., None].expand(batch, frontier, width)
        self._append(parents_BFW.flatten(1), logp_BFW.flatten(1), tokens_BFW.flatten(1))

    def add_ranks(
        self, parents_BF: Tensor, logp_BFW: Tensor, tokens_BFW: Tensor, ranks: list[tuple[int, int]]
    ) -> None:
        index = _constant(tuple(f for f, _ in ranks), parents_BF.device)
        rank = _constant(tuple(r for _, r in ranks), parents_BF.device)
        self._append(parents_BF[:, index], logp_BFW[:, index, rank], tokens_BFW[:, index, rank])

    def _append(self, parents_BM: Tensor, logp_BM: Tensor, tokens_BM: Tensor) -> None:
        self._last = self.tokens_BN.shape[1]
        scores_BM = self.scores_BN.gather(1, parents_BM) + logp_BM.float()
        self.tokens_BN = torch.cat([self.tokens_BN, tokens_BM], 1)
        self.parents_BN = torch.cat([self.parents_BN, parents_BM], 1)
        self.scores_BN = torch.cat([self.scores_BN, scores_BM], 1)

    def frontier(self, shape: TreeShape, depth: int) -> tuple[Tensor, Frontier]:
        """The nodes to expand, and where they are in the pool."""
        picked_BF = self._picked(shape, depth)
        parents_BF = self.parents_BN.gather(1, picked_BF)
        same_BFG = parents_BF[..., None] == self._frontier_BF[:, None, :]
        self._frontier_BF = picked_BF
        tokens_BF = self.tokens_BN.gather(1, picked_BF)
        return picked_BF, Frontier(tokens_BF, same_BFG.int().argmax(-1), depth)

    def _picked(self, shape: TreeShape, depth: int) -> Tensor:
        """A static tree's inner nodes, or the likeliest."""
        if shape.ranks is None:
            width = min(shape.width, self.deepest_BM.shape[1])
            return self._last + self.deepest_BM.topk(width, dim=1).indices
        at_depth = [path for path in shape.ranks if len(path) == depth]
        inner = [self._last + at_depth.index(path) for path in _expanded(shape, depth)]
        return _constant(tuple(inner), self.tokens_BN.device).expand(len(self.tokens_BN), -1)


class _PoolOnAGPU(_Pool):
    """Of a dynamic tree, each depth in one kernel."""

    def __init__(self, root_B: Tensor, shape: TreeShape, built: ModuleType):
        super().__init__(root_B)
        self._built, self._width = built, shape.width
        more = (0, shape.width + (shape.depth - 1) * shape.width * shape.width)
        self._room = tuple(
            pad(one, more) for one in (self.tokens_BN, self.parents_BN, self.scores_BN)
        )
        self._next: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, parents_BF: Tensor, logp_BFW: Tensor, tokens_BFW: Tensor) -> None:
        self._last = used = self.tokens_BN.shape[1]
        children = logp_BFW, tokens_BFW
        self._next = self._built.expand(self._room, used, parents_BF, children, self._width)
        end = used + tokens_BFW.shape[1] * tokens_BFW.shape[2]
        self.tokens_BN, self.parents_BN, self.scores_BN = (one[:, :end] for one in self._room)

    def frontier(self, shape: TreeShape, depth: int) -> tuple[Tensor, Frontier]:
        assert self._next is not None
        picked_BF, tokens_BF, parents_BF = self._next
        return picked_BF, Frontier(tokens_BF, parents_BF, depth)
