"""The law: speculative decoding writes what plain decoding writes, token for token.

In float32, for every family of targets, every head kind, chain, static and dynamic trees, one
prompt and a ragged batch.
"""

from __future__ import annotations

import pytest
import torch
from decoding import (
    LENGTHS,
    NEW_TOKENS,
    SAMPLINGS,
    SHAPES,
    answers,
    batch,
    reference,
    speculative,
    target_of,
)
from families import FAMILIES
from oracle import Oracle

from headstart.inference.config import SamplingParams
from headstart.inference.engine.loop import decode
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.tree.shape import TreeShape


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_that_are_often_right(family: str) -> None:
    """Deep paths, side branches and rejections all occur, and none of them shows."""
    deep = rejected = side = 0
    for rows in LENGTHS:
        expected = reference(family, rows)
        for shape in SHAPES.values():
            oracle = Oracle(target_of(family), expected)
            told, stats = speculative(family, oracle, rows, shape)
            assert told == expected
            assert stats.acceptance_length > 1.2
            deep += stats.accepted_per_position[2]
            rejected += stats.tried_per_position[0] - stats.accepted_per_position[0]
            side += oracle.side_branches
    assert deep >= 5 and rejected >= 5 and side >= 2


# The oracle covers every family, and a head does not know which one it drafts for: full, windowed,
# latent and sparse attention, absolute positions and experts are enough here.
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "deepseek_v3", "glm_moe_dsa", "gpt2", "mixtral"]
)
def test_every_head_kind(family: str) -> None:
    """Untrained heads: almost everything is rejected."""
    target, new_tokens = target_of(family), 8
    for kind in kinds():
        torch.manual_seed(0)
        head = make_head(target, kind, {}).eval()
        head.init_from_target()
        for shape in SHAPES.values():
            for rows in LENGTHS:
                told, stats = speculative(family, head, rows, shape, new_tokens=new_tokens)
                expected = [answer[:new_tokens] for answer in reference(family, rows)]
                assert told == expected, (kind, shape, rows)
                assert stats.tried_per_position[0] > 0, "nothing was drafted"


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "deepseek_v3", "glm_moe_dsa", "gpt2"])
def test_seeded_sampling_is_an_equality_too(family: str, sampling: str) -> None:
    for rows in LENGTHS:
        expected = reference(family, rows, sampling)
        assert expected != reference(family, rows)
        for shape in SHAPES.values():
            told, stats = speculative(
                family, Oracle(target_of(family), expected), rows, shape, sampling=sampling
            )
            assert told == expected
            assert sum(stats.accepted_per_position) > 5


def test_a_tree_of_one_child_per_node_is_the_chain() -> None:
    expected = reference("llama", 3)
    runs = []
    for shape in (TreeShape.chain(3), TreeShape.static([[0], [0, 0], [0, 0, 0]])):
        told, stats = speculative("llama", Oracle(target_of("llama"), expected), 3, shape)
        assert told == expected
        runs.append((stats.num_steps, stats.accepted_per_position, stats.tried_per_position))
    assert runs[0] == runs[1]


def test_a_row_of_a_batch_is_what_it_is_alone() -> None:
    together = reference("mistral", 3)
    ids_BT, mask_BT = batch("mistral", 3)
    for row, expected in enumerate(together):
        text_1T = ids_BT[row, mask_BT[row] == 1][None]
        alone = decode(target_of("mistral"), text_1T, sampling=SamplingParams(NEW_TOKENS))
        assert answers(alone, 1) == [expected]
