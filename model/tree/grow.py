"""How a tree grows, depth by depth.

Legend: B sequences, N tree nodes, M nodes of one depth or chosen ones, F frontier nodes (those
expanded at one depth), W children per node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ops import TORCH_TREE_OPS, Pool, TreeOps
from .shape import TreeShape
from .tree import Tree


@dataclass(frozen=True)
class Frontier:
    """The nodes whose children are drafted next.

    tokens_BF: their tokens. parents_BF: each one's parent as an index into the previous frontier.
    depth: depth of the nodes themselves, 1 for children of the root.
    """

    tokens_BF: Tensor
    parents_BF: Tensor
    depth: int


# The top-W children of each frontier node: log-probabilities logp_BFW and tokens_BFW.
Children = tuple[Tensor, Tensor]

# (scores_BN of all candidates, scores_BM of the deepest ones) -> whether to draft one depth more.
ShouldDeepen = Callable[[Tensor, Tensor], bool]


def grow(
    root_B: Tensor,
    first: Children,
    step: Callable[[Frontier], Children],
    shape: TreeShape,
    should_deepen: ShouldDeepen | None = None,
    *,
    ops: TreeOps = TORCH_TREE_OPS,
) -> Tree:
    """Grow a tree from its root.

    root_B: the last committed token of each sequence.
    first: children of the root (F = 1), highest log-probability first, W >= `shape.width`.
    step: returns the children of a frontier; called once per further depth.
    should_deepen: may end a dynamic tree before `shape.depth`.
    ops: the tree functions of the device.
    """
    pool = _StaticPool(root_B, shape) if shape.ranks else _DynamicPool(root_B, shape, ops)
    children = first
    for depth in range(1, shape.depth + 1):
        frontier = pool.add(children, depth)
        if depth == shape.depth or (
            should_deepen and not should_deepen(pool.scores_BN, pool.deepest_BM)
        ):
            break
        children = step(frontier)
    return Tree(pool.tokens_BN, pool.parents_BN, pool.scores_BN, ops).cut(shape.nodes)


class _Pool:
    """All candidates so far, depth after depth, in tensors that are allocated once."""

    def __init__(self, root_B: Tensor, capacity: int):
        root = Tree.root(root_B)
        fields = (root.tokens_BN, root.parents_BN, root.scores_BN)
        tokens_BM, parents_BM, scores_BM = (pad(one, (0, capacity - 1)) for one in fields)
        self._fields: Pool = (tokens_BM, parents_BM, scores_BM)
        self._first_of_deepest, self._used = 0, 1

    @property
    def tokens_BN(self) -> Tensor:
        return self._fields[0][:, : self._used]

    @property
    def parents_BN(self) -> Tensor:
        return self._fields[1][:, : self._used]

    @property
    def scores_BN(self) -> Tensor:
        return self._fields[2][:, : self._used]

    @property
    def deepest_BM(self) -> Tensor:
        """Scores of the deepest candidates."""
        return self.scores_BN[:, self._first_of_deepest :]


class _DynamicPool(_Pool):
    """Every child of a frontier is a candidate; those with the highest scores are expanded."""

    def __init__(self, root_B: Tensor, shape: TreeShape, ops: TreeOps):
        super().__init__(root_B, 1 + shape.width + (shape.depth - 1) * shape.width**2)
        self._ops, self._width = ops, shape.width
        self._frontier_BF = torch.zeros_like(root_B)[:, None]

    def add(self, children: Children, depth: int) -> Frontier:
        """Add the children of the last frontier; return the next one."""
        logp_BFW, tokens_BFW = (one[..., : self._width] for one in children)
        self._first_of_deepest = used = self._used
        self._frontier_BF, next_BF, parents_BF = self._ops.expand(
            self._fields, used, self._frontier_BF, (logp_BFW, tokens_BFW), self._width
        )
        self._used = used + tokens_BFW.shape[1] * tokens_BFW.shape[2]
        return Frontier(next_BF, parents_BF, depth)


class _StaticPool(_Pool):
    """Only the paths of the shape are candidates; their inner nodes are expanded."""

    def __init__(self, root_B: Tensor, shape: TreeShape):
        super().__init__(root_B, shape.nodes)
        self._shape, self._frontier_BF = shape, torch.zeros_like(root_B)[:, None]

    def add(self, children: Children, depth: int) -> Frontier:
        """Add the children of the last frontier; return the next one."""
        logp_BFW, tokens_BFW = children
        (tokens_BM, parents_BM, scores_BM), used = self._fields, self._used
        index_M, rank_M, inner_F, above_F = (
            _on_device(numbers, logp_BFW.device) for numbers in _static_depth(self._shape, depth)
        )
        end = used + len(index_M)
        places_BM = self._frontier_BF[:, index_M]
        tokens_BM[:, used:end] = tokens_BFW[:, index_M, rank_M]
        parents_BM[:, used:end] = places_BM
        scores_BM[:, used:end] = (
            scores_BM.gather(1, places_BM) + logp_BFW[:, index_M, rank_M].float()
        )
        self._first_of_deepest, self._used = used, end
        self._frontier_BF = (used + inner_F).expand(len(tokens_BM), -1)
        return Frontier(
            tokens_BM.gather(1, self._frontier_BF), above_F.expand(len(tokens_BM), -1), depth
        )


@lru_cache(maxsize=256)
def _static_depth(shape: TreeShape, depth: int) -> tuple[tuple[int, ...], ...]:
    """A depth of a static tree in four lists.

    Of its nodes in path order: index of the parent in the previous frontier, and rank among its
    children. Of those that have children: index among the nodes of the depth, and index of the
    parent in the previous frontier.
    """
    assert shape.ranks is not None
    parents = {path[:-1] for path in shape.ranks}
    previous = [path for path in ((), *shape.ranks) if len(path) == depth - 1 and path in parents]
    place = {path: index for index, path in enumerate(previous)}
    paths = [path for path in shape.ranks if len(path) == depth]
    inner = [index for index, path in enumerate(paths) if path in parents]
    return (
        tuple(place[path[:-1]] for path in paths),
        tuple(path[-1] for path in paths),
        tuple(inner),
        tuple(place[paths[index][:-1]] for index in inner),
    )


@lru_cache(maxsize=256)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied to the device once: CUDA graph capture forbids copies from the host."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64, device=device)
