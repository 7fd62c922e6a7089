"""A tree of guessed tokens, and how one grows. Knows no model and no cache.

Legend: B batch rows, N tree nodes, M nodes of one depth or chosen ones, F frontier nodes (those
expanded at one depth), W children per node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import accelerated

NO_PARENT = -1


@dataclass(frozen=True)
class Tree:
    """Guesses for what follows the last committed token, which is node 0.

    tokens_BN: token of each node. parents_BN: index of each node's parent, which precedes it; -1
    for the root and for padding. scores_BN: log of the draft's probability of the path to the
    node (0 for the root, -inf for padding).
    """

    tokens_BN: Tensor
    parents_BN: Tensor
    scores_BN: Tensor

    @staticmethod
    def root(tokens_B: Tensor) -> Tree:
        """The tree of plain decoding: no guess at all."""
        tokens_BN = tokens_B[:, None]
        zeros = torch.zeros_like(tokens_BN)
        return Tree(tokens_BN, zeros + NO_PARENT, zeros.float())

    @property
    def nodes(self) -> int:
        return self.tokens_BN.shape[1]

    @cached_property
    def valid_BN(self) -> Tensor:
        """True for the root and for nodes that are not padding."""
        valid_BN = self.parents_BN >= 0
        valid_BN[:, 0] = True
        return valid_BN

    @cached_property
    def ancestors_BNN(self) -> Tensor:
        """[b, n, m] is True where node m is node n itself or one of its ancestors."""
        nodes, on_a_gpu = self.nodes, accelerated.functions(self.tokens_BN.device)
        if on_a_gpu is not None:
            ancestors: Tensor = on_a_gpu.ancestors(self.parents_BN)
            return ancestors
        own_N = torch.arange(nodes, device=self.tokens_BN.device)
        ancestors_BNN = (own_N[:, None] == own_N).repeat(self.tokens_BN.shape[0], 1, 1)
        # Take over what the node `reach` levels up sees, and double the reach: log2(nodes) rounds.
        up_BN = torch.where(self.parents_BN >= 0, self.parents_BN, own_N)
        reach = 1
        while reach < nodes:
            inherited_BNN = ancestors_BNN.gather(1, up_BN[..., None].expand(-1, -1, nodes))
            ancestors_BNN = ancestors_BNN | inherited_BNN
            up_BN = up_BN.gather(1, up_BN)
            reach *= 2
        return ancestors_BNN

    @cached_property
    def depths_BN(self) -> Tensor:
        """0 for the root, 1 for its children, and so on (0 for padding)."""
        if self.nodes == 1:
            return torch.zeros_like(self.tokens_BN)
        return self.ancestors_BNN.sum(-1) - 1

    def cut(self, nodes: int) -> Tree:
        """The likeliest `nodes` nodes, root included: a parent never scores below its child."""
        if nodes >= self.nodes:
            return self
        order_BN = self.scores_BN.sort(dim=1, descending=True, stable=True).indices
        return self._taken(order_BN[:, :nodes].sort(dim=1).values)  # parents stay in front

    def chain_first(self) -> Tree:
        """The same tree with its likeliest chain in front: from each node to its likeliest child.

        When that chain is what the target says, its keys lie where they belong already.
        """
        if self.nodes <= 2:
            return self
        parents_BN = self.parents_BN.clamp(min=0)
        none_BN = torch.full_like(self.scores_BN, -torch.inf)
        inner_BN = torch.where(self.parents_BN >= 0, self.scores_BN, -torch.inf)
        best_BN = none_BN.scatter_reduce(1, parents_BN, inner_BN, "amax")
        later_BN = (inner_BN < best_BN.gather(1, parents_BN)) | ~self.valid_BN
        later_BN[:, 0] = False
        off_BN = (self.ancestors_BNN & later_BN[:, None]).any(-1)
        return self._taken(off_BN.to(torch.uint8).argsort(dim=1, stable=True))

    def likeliest_chain(self) -> Tree:
        """Only the chain from each node to its likeliest child, of a single row. Reads the tree on
        the host."""
        tree = self.chain_first()
        (parents,) = tree.parents_BN.tolist()
        length = next((n for n, parent in enumerate(parents) if parent != n - 1), len(parents))
        return Tree(
            tree.tokens_BN[:, :length], tree.parents_BN[:, :length], tree.scores_BN[:, :length]
        )

    def _taken(self, kept_BM: Tensor) -> Tree:
        """The nodes kept_BM in that order; with each node comes its parent, before it."""
        rank_BN = torch.full_like(self.tokens_BN, NO_PARENT)
        places_BM = torch.arange(kept_BM.shape[1], device=kept_BM.device).expand_as(kept_BM)
        rank_BN.scatter_(1, kept_BM, places_BM)
        parents_BM = self.parents_BN.gather(1, kept_BM)
        moved_BM = rank_BN.gather(1, parents_BM.clamp(min=0))
        return Tree(
            self.tokens_BN.gather(1, kept_BM),
            torch.where(parents_BM >= 0, moved_BM, parents_BM),
            self.scores_BN.gather(1, kept_BM),
        )


@dataclass(frozen=True)
class TreeShape:
    """What a head is asked to draft.

    nodes: nodes of the finished tree, root included. depth: longest path in drafted tokens.
    width: nodes expanded per depth and children each of them gets. ranks: for a static tree, the
    paths of child ranks that exist, e.g. ((0,), (0, 0), (1,)); None for a dynamic tree, which keeps
    the likeliest nodes (EAGLE-2, arXiv 2406.16858).
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
                "plain decoding."
            )

    @staticmethod
    def chain(depth: int) -> TreeShape:
        """One guess per depth."""
        nodes = depth + 1 if isinstance(depth, int) else 0  # which is refused with the depth
        return TreeShape(nodes=nodes, depth=depth, width=1)

    @staticmethod
    def dynamic(nodes: int, depth: int, width: int) -> TreeShape:
        """The `nodes - 1` likeliest guesses, wherever they are."""
        return TreeShape(nodes=nodes, depth=depth, width=width)

    @staticmethod
    def static(ranks: Sequence[Sequence[int]]) -> TreeShape:
        """A fixed shape: every path of child ranks that exists, each with all its prefixes."""
        if not _are_paths(ranks):
            raise ValueError(
                "A static tree needs at least one path, and a path is a non-empty list of child "
                f"ranks (0 is the likeliest child), for example [[0], [0, 0], [1]]. Got {ranks!r}."
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
GoesOn = Callable[[Tensor, Tensor], bool]


def grow(
    root_B: Tensor,
    first: Children,
    step: Callable[[Frontier], Children],
    shape: TreeShape,
    goes_on: GoesOn | None = None,
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
        if depth == shape.depth or (goes_on and not goes_on(pool.scores_BN, pool.deepest_BM)):
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
