"""The best fixed tree, against all trees."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from math import prod

import pytest

from headstart.inference.tree_policy.static import best_static, fastest_static_tree
from headstart.model.tree.shape import TreeShape

Path = tuple[int, ...]
FALLING = [[0.7, 0.15, 0.05], [0.6, 0.2, 0.1], [0.5, 0.3, 0.1]]
# By chance the second guess may come more often than the first, and deeper ones more than early.
UNEVEN = [[0.2, 0.5], [0.9, 0.05], [0.3, 0.4]]


def all_trees(depth: int, ranks: int, paths: int) -> Iterator[TreeShape]:
    """Every tree of so many paths."""
    nodes: list[Path] = [
        path for d in range(1, depth + 1) for path in itertools.product(range(ranks), repeat=d)
    ]
    for chosen in itertools.combinations(nodes, paths):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield TreeShape.static(chosen)


def expected_length(acceptance: list[list[float]], tree: TreeShape) -> float:
    """Expected tokens per round of a static tree, the target's own one included."""
    paths = tree.ranks or ()
    return 1 + sum(prod(acceptance[d][rank] for d, rank in enumerate(path)) for path in paths)


@pytest.mark.parametrize("acceptance", [FALLING, UNEVEN], ids=["falling", "uneven"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_tree_is_better(acceptance, depth):
    ranks = 2
    acceptance = [row[:ranks] for row in acceptance]
    for paths in range(1, 5):
        trees = list(all_trees(depth, ranks, paths))
        if not trees:
            continue
        best = max(expected_length(acceptance, tree) for tree in trees)
        found = best_static(acceptance, paths + 1, depth)
        assert found.nodes == paths + 1 and found.depth <= depth
        assert expected_length(acceptance, found) == pytest.approx(best)


def test_expected_length_is_what_a_simulation_finds():
    tree = TreeShape.static([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]])
    draw = random.Random(0)
    rounds, emitted = 40_000, 0
    for _ in range(rounds):
        path: Path = ()
        while len(path) < 3:
            chances = [*FALLING[len(path)], 1 - sum(FALLING[len(path)])]
            path = (*path, draw.choices(range(4), chances)[0])
            emitted += 1  # the token that the target says there
            if path not in (tree.ranks or ()):
                break
        else:
            emitted += 1
    assert emitted / rounds == pytest.approx(expected_length(FALLING, tree), abs=0.02)


def test_what_was_not_measured_is_worth_nothing():
    whole = best_static(FALLING, 1000)
    assert whole.nodes == 1 + 3 + 9 + 27 and whole.depth == 3
    assert best_static([[1.0, 0.0], [1.0, 0.0]], 64).ranks == ((0,), (0, 0))


@pytest.mark.parametrize("acceptance", [[], [[]], [[0.0, 0.0]]])
def test_nothing_to_choose_from(acceptance):
    with pytest.raises(ValueError, match="headstart calibrate"):
        best_static(acceptance, 8)
    with pytest.raises(ValueError, match="headstart calibrate"):
        fastest_static_tree(acceptance, lambda nodes, depth: 1.0)


@pytest.mark.parametrize(("nodes", "depth"), [(1, None), (8, 0)])
def test_impossible_sizes(nodes, depth):
    with pytest.raises(ValueError, match="autoregressive decoding"):
        best_static(FALLING, nodes, depth)


def test_the_cost_decides_the_size():
    free = fastest_static_tree(FALLING, lambda nodes, depth: 1.0)
    assert free == best_static(FALLING, 64)
    dear = fastest_static_tree(FALLING, lambda nodes, depth: 1.0 * nodes)
    assert dear.ranks == ((0,),)
    flat = fastest_static_tree(
        FALLING, lambda nodes, depth: 0.5 + depth
    )  # nodes are free, passes are not
    assert flat.depth == 1 and flat.nodes == 4


def test_no_tree_gives_more_for_its_cost():
    acceptance = [row[:2] for row in UNEVEN]

    def cost(nodes: int, depth: int) -> float:
        return 1.0 + 0.1 * nodes + 0.1 * depth

    def speed(tree: TreeShape) -> float:
        return expected_length(acceptance, tree) / cost(tree.nodes, tree.depth)

    best = max(speed(tree) for paths in range(1, 7) for tree in all_trees(3, 2, paths))
    found = fastest_static_tree(acceptance, cost, nodes=7)
    assert speed(found) == pytest.approx(best)
    assert 1 < found.depth and 2 < found.nodes < 7
