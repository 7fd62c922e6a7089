"""Targets with recurrent layers: chains are read exactly, and what has branches is refused.

A recurrent state takes no token back, so every way in which a chain can be accepted is tried.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from families import VOCAB, build, padded, prompts
from oracle import Oracle
from recurrent_decoding import NEW_TOKENS, SETTINGS, answers
from torch import Tensor

from headstart.inference import SpeculativeModel
from headstart.inference.benchmark.acceptance import measure_acceptance
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.engine.stats import Stats
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree
from headstart.scripts.options.tree_budget import speculative_config

GREEDY = SamplingParams(NEW_TOKENS)
SAMPLINGS = {
    "temperature": SamplingParams(NEW_TOKENS, 1.0, seed=5),
    "penalty": SamplingParams(NEW_TOKENS, 1.0, repetition_penalty=1.3, top_k=20, seed=8),
}
families = pytest.mark.parametrize("family", SETTINGS)


@cache
def target_of(family: str) -> Target:
    return wrap_target(build(family, SETTINGS[family]))


def alone(family: str, ids_1T: Tensor, sampling: SamplingParams = GREEDY) -> list[int]:
    return answers(decode(target_of(family), ids_1T, sampling=sampling))[0]


def stock(family: str, ids_1T: Tensor, new_tokens: int = NEW_TOKENS) -> list[int]:
    """What transformers generates, with its own cache."""
    options: Any = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    told = target_of(family).model.generate(ids_1T, **options)
    return told[0, ids_1T.shape[1] :].tolist()


@families
@pytest.mark.parametrize("length", [1, 9, 70, 130])
def test_plain_decoding_is_transformers_own(family: str, length: int) -> None:
    """Prompts of less and more than a chunk of 64, in which their code reads long texts."""
    ids_1T = prompts([length], seed=1)[0][None]
    expected = stock(family, ids_1T)
    assert len(set(expected)) > 3
    assert alone(family, ids_1T) == expected


@families
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_head_that_is_often_right(family: str, depth: int) -> None:
    """Nothing, a part and all of a chain is accepted, in one pass of the target per round, and no
    token is read again twice."""
    target, seen = target_of(family), set()
    for seed in range(6):
        ids_1T = prompts([11], seed)[0][None]
        expected, stats = stock(family, ids_1T), Stats()
        oracle, passes = Oracle(target, [expected], right=0.75), []
        oracle._random.seed(seed)

        def count(_: object, __: object, named: dict[str, Tensor], p: list[int] = passes) -> None:
            p.append(named["input_ids"].shape[1])

        hook = target.decoder.module.register_forward_pre_hook(count, with_kwargs=True)
        config = SpeculativeConfig(oracle, TreeShape.chain(depth))
        steps = list(decode(target, ids_1T, sampling=GREEDY, speculative=config, stats=stats))
        hook.remove()
        assert answers(iter(steps))[0] == expected
        assert len(passes) == stats.num_steps + 1 < NEW_TOKENS
        # A chain, and what was accepted of the last one's guesses, but not all of them.
        assert max(passes[1:]) <= depth + 1 + depth - 1
        seen |= {len(step[0]) - 1 for step in steps[1:-1]}
    assert seen == set(range(depth + 1))


@families
def test_every_head_kind(family: str) -> None:
    """With random weights: nearly nothing is accepted."""
    target = target_of(family)
    for kind in kinds():
        torch.manual_seed(0)
        head = make_head(target, kind, {}).eval()
        head.init_from_target()
        for depth in (1, 2, 3, 4):
            ids_1T, stats = prompts([10], seed=depth)[0][None], Stats()
            config, twelve = SpeculativeConfig(head, TreeShape.chain(depth)), SamplingParams(12)
            steps = decode(target, ids_1T, sampling=twelve, speculative=config, stats=stats)
            assert answers(steps)[0] == stock(family, ids_1T, 12), (kind, depth)
            assert stats.tried_per_position[0] > 0


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_seeded_sampling_is_an_equality_too(sampling: str) -> None:
    ids_1T, stats = prompts([11])[0][None], Stats()
    expected = alone("qwen3_next", ids_1T, SAMPLINGS[sampling])
    assert expected != alone("qwen3_next", ids_1T)
    target = target_of("qwen3_next")
    config = SpeculativeConfig(Oracle(target, [expected]), TreeShape.chain(4))
    steps = decode(target, ids_1T, sampling=SAMPLINGS[sampling], speculative=config, stats=stats)
    assert answers(steps)[0] == expected and sum(stats.accepted_per_position) > 5


@pytest.mark.parametrize("left", [False, True])
def test_rows_of_a_batch_are_answered_in_turn(left: bool) -> None:
    """Each as it is alone, padding on either side; drawn tokens too."""
    texts = prompts([7, 12, 3])
    ids_BT, lengths_B = padded(texts)
    mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
    if left:
        ids_BT, mask_BT = ids_BT.flip(1), mask_BT.flip(1)
        ids_BT[mask_BT == 1] = torch.cat(texts)
    target, stats = target_of("qwen3_5_text"), Stats()
    expected = [alone("qwen3_5_text", text[None]) for text in texts]
    head = make_head(target, "mtp", {}).eval()
    steps = decode(
        target,
        ids_BT,
        mask_BT,
        sampling=SamplingParams(NEW_TOKENS),
        speculative=SpeculativeConfig(head),
        stats=stats,
    )
    assert answers(steps, 3) == expected
    assert stats.num_sequences == 3 and stats.num_tokens == 3 * NEW_TOKENS
    drawn = [
        answers(decode(target, ids_BT, mask_BT, sampling=SamplingParams(8, 1.0, seed=3)), 3)
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]


def states(target: Target, tokens: list[int]) -> list[Tensor]:
    """The recurrent states behind a text that is read in one piece."""
    cache = target.new_cache(1)
    target.forward(torch.tensor([tokens]), cache, logits=False)
    return held(cache)


def held(cache: Any) -> list[Tensor]:
    layers = cache.states.layers.values()
    return [
        one[0].clone() for layer in layers for one in (layer.conv_states, layer.recurrent_states)
    ]


def chain_of(tokens: list[int]) -> Tree:
    count = len(tokens)
    return Tree(torch.tensor([tokens]), torch.arange(count)[None] - 1, torch.zeros(1, count))


@families
def test_states_are_those_of_the_text_that_was_kept(family: str) -> None:
    """Whatever was accepted, read and not committed, or read and dropped in part before."""
    target, cache = target_of(family), target_of(family).new_cache(1)
    text = prompts([40], seed=2)[0].tolist()
    target.forward(torch.tensor([text[:8]]), cache, logits=False)
    cache.commit(None, torch.tensor([6]))  # of a text too, rows can be left out
    place = 6
    for candidates, accepted in ((3, 1), (3, 2), (2, 3), (4, 5), (0, 1), (1, 1), (4, 3), (4, 3)):
        target.forward(chain_of([5, 6, 7, 8]), cache)  # never committed
        right = text[place : place + accepted]
        wrong = [(token + 1) % VOCAB for token in text[place + accepted :]]
        seen = target.forward(chain_of((right + wrong)[: candidates + 1]), cache, taps=(0,))
        assert seen.lm_head_input_BTD.shape[1] == seen.hidden_states[0].shape[1] == candidates + 1
        cache.commit(torch.arange(candidates + 1)[None], torch.tensor([accepted]))
        place += accepted
        expected = target.forward(torch.tensor([text[:place]])).lm_head_input_BTD[:, -accepted:]
        torch.testing.assert_close(
            seen.lm_head_input_BTD[:, :accepted], expected, rtol=1e-3, atol=1e-4
        )
    assert cache.max_length == place
    target.forward(torch.tensor([text[place : place + 2]]), cache, logits=False)
    for mine, theirs in zip(held(cache), states(target, text[: place + 2]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_what_has_branches_is_refused() -> None:
    target = target_of("qwen3_next")
    head = make_head(target, "mtp", {}).eval()
    ids_1T = prompts([5])[0][None]
    for shape in (TreeShape.dynamic(8, 4, 3), TreeShape.static([[0], [1]])):
        with pytest.raises(ValueError, match=r"state cannot branch. Use a chain.*--budget \d/\d/1"):
            decode(target, ids_1T, sampling=GREEDY, speculative=SpeculativeConfig(head, shape))
    tree = Tree(torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="cannot verify a tree with branches"):
        target.forward(tree)
    with pytest.raises(ValueError, match="one sequence at a time, not 2"):
        target.new_cache(2)
    with pytest.raises(ValueError, match="Leave out quantize"):
        wrap_target(target.model, quantize="int8")
    assert target.backend is None


def test_defaults_are_chains() -> None:
    """Of `generate`, with guesses from the text too, of training's checks, and of --budget."""
    target = target_of("qwen3_5_text")
    model = SpeculativeModel(target, make_head(target, "mtp", {}))
    repeated = torch.cat([prompts([6])[0]] * 3)[None]
    expected = [*repeated[0].tolist(), *stock("qwen3_5_text", repeated)]
    options: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    chain = SpeculativeConfig(model.head, TreeShape.chain(2), ngram=True)
    for how in (None, SpeculativeConfig(model.head), chain):
        assert model.generate(repeated, speculative=how, **options)[0].tolist() == expected
    for budget in ("auto+ngram", "off", "ngram", "5", "5/4/1", "4+ngram"):
        one, stats = speculative_config(target, model.head, budget), Stats()
        assert one.shape.width == 1
        assert one.shape.depth == {"4+ngram": 3, "5": 4, "5/4/1": 4, "off": 4}.get(budget, 8)
        steps = decode(target, repeated, sampling=GREEDY, speculative=one, stats=stats)
        assert answers(steps)[0] == expected[repeated.shape[1] :]
    model.head.rank_acceptance = ((0.9, 0.5), (0.8, 0.5), (0.7, 0.5))
    assert speculative_config(target, model.head, "static").shape.width == 1
    config, ids = SpeculativeConfig(model.head), repeated[0].tolist()
    _, [steps] = measure_acceptance(target, config, [ids], SamplingParams(8))
    assert [token for step in steps for token in step] == expected[repeated.shape[1] :][:8]


def test_guesses_from_the_text_come_true() -> None:
    """Of a text that repeats itself, from a target that does too."""
    target = target_of("qwen3_next")
    ids_1T, stats = prompts([9])[0][None], Stats()
    told = alone("qwen3_next", ids_1T)
    again_1T = torch.cat([ids_1T[0], torch.tensor(told), ids_1T[0]])[None]
    expected = alone("qwen3_next", again_1T)
    own = torch.cat([again_1T[0], torch.tensor(expected)])
    text_1T = torch.cat([own, again_1T[0]])[None]
    expected = alone("qwen3_next", text_1T)
    steps = decode(
        target,
        text_1T,
        sampling=SamplingParams(NEW_TOKENS),
        speculative=SpeculativeConfig(ngram=True),
        stats=stats,
    )
    assert answers(steps)[0] == expected and stats.num_draft_tokens > 0


def test_a_model_that_forgets_its_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that reads several tokens as if nothing had come before."""
    model = build("qwen3_5_text", SETTINGS["qwen3_5_text"])
    code = sys.modules[type(model).__module__]
    rule = code.torch_chunk_gated_delta_rule

    def forgetful(*args: Any, **named: Any) -> Any:
        return rule(*args, **named | {"initial_state": None})

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", forgetful)
    with pytest.raises(ValueError, match="the state in front of several tokens"):
        wrap_target(model)
