"""How trees grow and are cut: worked examples.

Legend: B batch rows, F frontier nodes, W children per node.
"""

from __future__ import annotations

import math

import pytest
import torch

from headstart.model.tree.grow import Children, Frontier, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

# What a made-up draft says follows each token: (probability, token), likeliest first.
NEXT = {
    1: [(0.6, 2), (0.3, 3), (0.1, 4)],
    2: [(0.5, 5), (0.4, 6), (0.1, 7)],
    3: [(0.9, 5), (0.06, 6), (0.04, 7)],
    4: [(0.8, 8), (0.1, 6), (0.1, 7)],
    5: [(0.7, 9), (0.2, 2), (0.1, 3)],
    6: [(0.6, 8), (0.3, 2), (0.1, 3)],
    7: [(0.6, 8), (0.3, 2), (0.1, 3)],
}


def children(tokens: list[list[int]]) -> Children:
    table = [[NEXT[token] for token in row] for row in tokens]
    logp = [[[math.log(chance) for chance, _ in node] for node in row] for row in table]
    ids = [[[token for _, token in node] for node in row] for row in table]
    return torch.tensor(logp), torch.tensor(ids)


def grown(shape: TreeShape, roots: list[int]) -> tuple[Tree, list[Frontier]]:
    asked: list[Frontier] = []

    def step(frontier: Frontier) -> Children:
        asked.append(frontier)
        return children(frontier.tokens_BF.tolist())

    first = children([[root] for root in roots])
    return grow(torch.tensor(roots), first, step, shape), asked


def paths(tree: Tree, row: int = 0) -> dict[tuple[int, ...], float]:
    """Token path to each drafted node, and its probability."""
    tokens, parents = tree.tokens_BN[row].tolist(), tree.parents_BN[row].tolist()
    found: list[tuple[int, ...]] = [()]
    for node in range(1, tree.nodes):
        found.append((*found[parents[node]], tokens[node]))
    scores = tree.scores_BN[row].exp().tolist()
    return {path: round(score, 4) for path, score in zip(found[1:], scores[1:], strict=True)}


def test_a_chain_takes_the_likeliest_child_each_time() -> None:
    tree, asked = grown(TreeShape.chain(3), [1])
    assert tree.tokens_BN.tolist() == [[1, 2, 5, 9]]
    assert tree.parents_BN.tolist() == [[-1, 0, 1, 2]]
    assert tree.depths_BN.tolist() == [[0, 1, 2, 3]]
    assert paths(tree) == {(2,): 0.6, (2, 5): 0.3, (2, 5, 9): 0.21}
    assert [frontier.depth for frontier in asked] == [1, 2]


def test_a_static_tree_has_exactly_the_paths_it_names() -> None:
    shape = TreeShape.static([[0], [1], [0, 0], [1, 0], [1, 1], [1, 0, 0]])
    tree, asked = grown(shape, [1])
    assert paths(tree) == {
        (2,): 0.6,
        (3,): 0.3,
        (2, 5): 0.3,
        (3, 5): 0.27,
        (3, 6): 0.018,
        (3, 5, 9): 0.189,
    }
    assert tree.parents_BN.tolist() == [[-1, 0, 0, 1, 2, 2, 4]]
    # Only inner nodes are expanded, and each knows its place in the frontier before.
    assert [frontier.tokens_BF.tolist() for frontier in asked] == [[[2, 3]], [[5]]]
    assert [frontier.parents_BF.tolist() for frontier in asked] == [[[0, 0]], [[1]]]


def test_a_dynamic_tree_keeps_the_likeliest_paths() -> None:
    tree, asked = grown(TreeShape.dynamic(nodes=5, depth=2, width=2), [1])
    assert asked[0].tokens_BF.tolist() == [[2, 3]]
    # Of 0.6, 0.3 and then 0.3, 0.24, 0.27, 0.018: the best four.
    assert paths(tree) == {(2,): 0.6, (3,): 0.3, (2, 5): 0.3, (3, 5): 0.27}


def test_the_dynamic_frontier_follows_the_path_not_the_last_step() -> None:
    tree, asked = grown(TreeShape.dynamic(nodes=9, depth=3, width=2), [1])
    # After (2, 5) with 0.3, (3, 5) with 0.27 beats (2, 6) with 0.24.
    assert asked[1].tokens_BF.tolist() == [[5, 5]]
    assert asked[1].parents_BF.tolist() == [[0, 1]]
    assert paths(tree)[(3, 5, 9)] == 0.189


def test_rows_grow_their_own_trees() -> None:
    shape = TreeShape.dynamic(nodes=5, depth=2, width=2)
    both, _ = grown(shape, [1, 3])
    for row, root in enumerate([1, 3]):
        alone, _ = grown(shape, [root])
        assert paths(both, row) == paths(alone)


def test_cut_keeps_the_best_nodes_and_their_parents() -> None:
    tree, _ = grown(TreeShape.dynamic(nodes=7, depth=2, width=2), [1])
    assert tree.nodes == 7
    for nodes in range(1, 7):
        part = tree.cut(nodes)
        kept = paths(part)
        assert part.nodes == nodes and len(kept) == nodes - 1
        assert all(path[:-1] in kept for path in kept if len(path) > 1)
        assert sorted(kept.values()) == sorted(paths(tree).values())[7 - nodes :]
    assert tree.cut(99) is tree


def test_ancestors_depths_and_padding() -> None:
    tree = Tree(
        torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]),
        torch.tensor([[-1, 0, 1, 1, 3], [-1, 0, 0, -1, -1]]),
        torch.zeros(2, 5),
    )
    assert tree.ancestors_BNN[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert tree.ancestors_BNN[1].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert tree.depths_BN.tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, 0, 0]]
    assert tree.valid_BN.tolist() == [[True] * 5, [True, True, True, False, False]]


def test_a_deep_tree_has_all_its_ancestors() -> None:
    nodes = 37  # a chain is the deepest tree
    tree = Tree(torch.zeros(1, nodes).long(), torch.arange(-1, nodes - 1)[None], torch.zeros(1, 1))
    assert tree.ancestors_BNN[0].equal(torch.ones(nodes, nodes).tril().bool())
    assert tree.depths_BN[0].tolist() == list(range(nodes))


def test_limited_shapes() -> None:
    assert TreeShape.chain(4).limited(2) == TreeShape.chain(2)
    assert TreeShape.chain(2).limited(4) == TreeShape.chain(2)
    static = TreeShape.static([[0], [1], [0, 0], [0, 0, 0]])
    assert static.limited(1) == TreeShape.static([[0], [1]])
    tree, asked = grown(TreeShape.dynamic(nodes=9, depth=3, width=2).limited(1), [1])
    assert paths(tree) == {(2,): 0.6, (3,): 0.3} and not asked


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([], "at least one path"),
        ([[]], "non-empty"),
        ([[-1]], "ranks"),
        ([[0], [1, 0]], "not its parent"),
        ([[0], [0]], "twice"),
    ],
)
def test_impossible_static_trees(ranks: list[list[int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TreeShape.static(ranks)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 0, 1), (2, 1, 0)])
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="depth >= 1"):
        TreeShape.dynamic(*sizes)


@pytest.mark.parametrize(
    "ranks", [[], [[]], [0, 1], [[0.5]], [[-1]], ["0"], 7, [[0], [None]], {(0,): 1}]
)
def test_ranks_that_are_no_paths_are_refused(ranks: object) -> None:
    with pytest.raises(ValueError, match=r"list of child ranks .* Got"):
        TreeShape.static(ranks)


@pytest.mark.parametrize("sizes", [(4.5, 2, 2), (4, "2", 2), (4, 2, None), (4, 0, 1), (1, 1, 1)])
def test_sizes_are_whole_numbers(sizes: tuple[int, int, int]) -> None:
    for make in (TreeShape, TreeShape.dynamic):
        with pytest.raises(ValueError, match="A tree needs whole numbers"):
            make(*sizes)


@pytest.mark.parametrize("depth", [0, 2.5, "3", None])
def test_a_chain_needs_a_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"A tree needs whole numbers.*depth {depth}"):
        TreeShape.chain(depth)


def test_the_top1_chain_comes_first() -> None:
    """Row 0: the chain 0, 2, 5 lies apart. Row 1: it lies in front already, the last is padding."""
    parents_BN = torch.tensor([[-1, 0, 0, 1, 2, 2], [-1, 0, 1, 0, 2, -1]])
    chances_BN = torch.tensor([[1, 0.3, 0.6, 0.2, 0.1, 0.5], [1, 0.9, 0.8, 0.1, 0.7, 0]])
    tokens_BN = torch.tensor([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]])
    tree = Tree(tokens_BN, parents_BN, chances_BN.log())
    first = tree.chain_first()
    assert first.tokens_BN.tolist() == [[10, 12, 15, 11, 13, 14], [20, 21, 22, 24, 23, 25]]
    assert first.parents_BN.tolist() == [[-1, 0, 1, 0, 3, 1], [-1, 0, 1, 2, 0, -1]]
    torch.testing.assert_close(first.scores_BN.exp().sort(1).values, chances_BN.sort(1).values)
    assert first.depths_BN.max(1).values.tolist() == tree.depths_BN.max(1).values.tolist()


def test_only_the_top1_chain() -> None:
    parents_1N = torch.tensor([[-1, 0, 0, 1, 2, 2]])
    chances_1N = torch.tensor([[1, 0.3, 0.6, 0.2, 0.1, 0.5]])
    tree = Tree(torch.tensor([[10, 11, 12, 13, 14, 15]]), parents_1N, chances_1N.log())
    chain = tree.top1_chain()
    assert chain.tokens_BN.tolist() == [[10, 12, 15]]
    assert chain.parents_BN.tolist() == [[-1, 0, 1]]
    torch.testing.assert_close(chain.scores_BN.exp(), torch.tensor([[1, 0.6, 0.5]]))
    again = chain.top1_chain()
    assert again.tokens_BN.tolist() == chain.tokens_BN.tolist()
    assert Tree.root(torch.tensor([7])).top1_chain().nodes == 1
