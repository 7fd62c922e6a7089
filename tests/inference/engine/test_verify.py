"""Which path is kept: against a walk written out node by node.

Legend: B batch rows, N tree nodes.
"""

from __future__ import annotations

import random

import pytest
import torch

from headstart.inference.engine import verify
from headstart.inference.engine.verify import Accepted, accept, accept_on_device, accept_on_host
from headstart.model.tree.tree import NO_PARENT, Tree

VOCAB = 6


@pytest.fixture(autouse=True, params=["host", "device"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = accept_on_host if request.param == "host" else accept_on_device
    monkeypatch.setattr(verify, "accept_on_host", one)


def tree(tokens: list[list[int]], parents: list[list[int]]) -> Tree:
    scores = torch.zeros(len(tokens), len(tokens[0]))
    return Tree(torch.tensor(tokens), torch.tensor(parents), scores)


def random_tree(rng: random.Random, rows: int, nodes: int) -> Tree:
    """Ragged random trees, padded at the end; siblings differ, as every head guarantees."""
    tokens, parents = [], []
    for _ in range(rows):
        row_tokens, row_parents = [0], [NO_PARENT]
        taken: dict[int, set[int]] = {}
        for _ in range(rng.randrange(nodes)):
            parent = rng.randrange(len(row_tokens))
            free = sorted(set(range(VOCAB)) - taken.setdefault(parent, set()))
            if free:
                token = rng.choice(free)
                taken[parent].add(token)
                row_tokens.append(token)
                row_parents.append(parent)
        padding = nodes - len(row_tokens)
        tokens.append(row_tokens + [0] * padding)
        parents.append(row_parents + [NO_PARENT] * padding)
    return tree(tokens, parents)


def walk(candidates: Tree, row: int, draws: list[int]) -> tuple[list[int], list[int]]:
    """Path and emitted tokens of one row, the slow way."""
    tokens, parents = candidates.tokens_BN[row].tolist(), candidates.parents_BN[row].tolist()
    path = [0]
    while True:
        here = path[-1]
        met = [
            node
            for node in range(1, len(tokens))
            if parents[node] == here and tokens[node] == draws[here]
        ]
        if not met:
            return path, [draws[node] for node in path]
        path.append(met[0])


def next_tokens(accepted: Accepted) -> list[int]:
    """The token after the accepted path of every row."""
    rows = zip(accepted.sampled_tokens_BP.tolist(), accepted.num_accepted_B.tolist(), strict=True)
    return [tokens[count - 1] for tokens, count in rows]


def test_a_path_to_a_leaf_and_its_bonus_token() -> None:
    candidates = tree([[9, 1, 2, 3]], [[-1, 0, 0, 2]])
    accepted = accept(candidates, torch.tensor([[2, 5, 3, 4]]))
    assert accepted.accepted_path_BP.tolist() == [[0, 2, 3, 0]]
    assert accepted.num_accepted_B.tolist() == [3]
    assert accepted.sampled_tokens_BP[0, :3].tolist() == [2, 3, 4]
    assert next_tokens(accepted) == [4]
    assert accepted.padded(3).accepted_path_BP.tolist() == [[0, 2, 3]]


def test_nothing_accepted_still_emits_the_targets_token() -> None:
    accepted = accept(tree([[9, 1, 2]], [[-1, 0, 1]]), torch.tensor([[5, 2, 2]]))
    assert accepted.num_accepted_B.tolist() == [1]
    assert next_tokens(accepted) == [5]


def test_a_right_node_under_a_wrong_parent_is_not_accepted() -> None:
    accepted = accept(tree([[9, 1, 2]], [[-1, 0, 1]]), torch.tensor([[2, 2, 2]]))
    assert accepted.num_accepted_B.tolist() == [1]


def test_nodes_without_a_draw_are_never_accepted() -> None:
    accepted = accept(tree([[9, 1, 2]], [[-1, 0, 1]]), torch.tensor([[1, -1, -1]]))
    assert accepted.num_accepted_B.tolist() == [2] and accepted.accepted_path_BP[
        0, :2
    ].tolist() == [0, 1]
    accepted = accept(tree([[9, 1, 2]], [[-1, 0, 1]]), torch.tensor([[2, -1, 0]]))
    assert accepted.num_accepted_B.tolist() == [1] and next_tokens(accepted) == [2]


def test_padding_is_never_accepted() -> None:
    # Token 0 at the root would match the padding's token 0.
    accepted = accept(tree([[9, 0, 0]], [[-1, -1, -1]]), torch.tensor([[0, 0, 0]]))
    assert accepted.num_accepted_B.tolist() == [1]
    assert next_tokens(accepted) == [0]


def test_plain_decoding_is_a_tree_of_one_node() -> None:
    accepted = accept(Tree.root(torch.tensor([3, 4])), torch.tensor([[1], [2]]))
    assert accepted.accepted_path_BP.tolist() == [[0], [0]]
    assert accepted.num_accepted_B.tolist() == [1, 1]
    assert next_tokens(accepted) == [1, 2]


def test_equals_the_walk() -> None:
    rng = random.Random(0)
    lengths: list[int] = []
    for _ in range(200):
        candidates = random_tree(rng, rows=4, nodes=16)
        draws_BN = torch.randint(VOCAB, (4, 16))
        accepted = accept(candidates, draws_BN)
        for row, draws in enumerate(draws_BN.tolist()):
            path, tokens = walk(candidates, row, draws)
            count = int(accepted.num_accepted_B[row])
            assert accepted.accepted_path_BP[row, :count].tolist() == path
            assert accepted.sampled_tokens_BP[row, :count].tolist() == tokens
            assert accepted.accepted_path_BP[row, count:].sum() == 0
            lengths.append(count)
    assert max(lengths) >= 4 and min(lengths) == 1


def test_more_nodes_never_shorten_the_path_on_the_same_draws() -> None:
    rng = random.Random(1)
    longer = 0
    for _ in range(40):
        whole = random_tree(rng, rows=3, nodes=16)
        draws_BN = torch.randint(VOCAB, (3, 16))
        counts = []
        for nodes in (1, 2, 4, 8, 16):
            part = Tree(
                whole.tokens_BN[:, :nodes], whole.parents_BN[:, :nodes], whole.scores_BN[:, :nodes]
            )
            counts.append(accept(part, draws_BN[:, :nodes]).num_accepted_B)
        grown = torch.stack(counts)
        assert (grown.diff(dim=0) >= 0).all()
        longer += int((grown[-1] > grown[0]).sum())
    assert longer > 10


def test_rows_do_not_influence_each_other() -> None:
    rng = random.Random(2)
    candidates = random_tree(rng, rows=5, nodes=12)
    draws_BN = torch.randint(VOCAB, (5, 12))
    together = accept(candidates, draws_BN)
    for row in range(5):
        one = slice(row, row + 1)
        alone = Tree(
            candidates.tokens_BN[one], candidates.parents_BN[one], candidates.scores_BN[one]
        )
        accepted = accept(alone, draws_BN[one])
        assert accepted.accepted_path_BP.equal(together.accepted_path_BP[one])
        assert accepted.sampled_tokens_BP.equal(together.sampled_tokens_BP[one])
        assert accepted.num_accepted_B.equal(together.num_accepted_B[one])
