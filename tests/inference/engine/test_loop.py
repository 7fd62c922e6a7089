"""The loop: where answers stop, ragged batches, limits and figures.

Drafts are always right here unless said otherwise, so that stops fall inside accepted paths.
Legend: B batch rows, T prompt positions.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, LONGROPE, ORIGINAL, build, padded, prompts
from oracle import Oracle
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.eager_runner import _compacted
from headstart.inference.engine.loop import decode
from headstart.inference.engine.stats import PHASES, Stats
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

LENGTHS = [11, 4, 17]
NEW_TOKENS = 20
CHAIN = TreeShape.chain(4)


@pytest.fixture(scope="module")
def target() -> Target:
    return wrap_target(FAMILIES["llama"]())


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Three prompts, padded on the left as for `generate`."""
    ids_BT, lengths_B = padded(prompts(LENGTHS))
    return torch.stack(
        [ids_T.roll(-length, 0) for ids_T, length in zip(ids_BT, lengths_B.tolist(), strict=True)]
    )


@pytest.fixture(scope="module")
def mask(ids: Tensor) -> Tensor:
    columns_T = torch.arange(ids.shape[1])
    return (columns_T >= ids.shape[1] - torch.tensor(LENGTHS)[:, None]).long()


@pytest.fixture(scope="module")
def truth(target: Target, ids: Tensor, mask: Tensor) -> list[list[int]]:
    return told(decode(target, ids, mask, sampling=SamplingParams(NEW_TOKENS)))


def told(steps: Iterator[list[list[int]]]) -> list[list[int]]:
    """What each row was told in all."""
    rounds = list(steps)
    return [[token for step in rounds for token in step[row]] for row in range(len(rounds[0]))]


def both(
    target: Target,
    ids: Tensor,
    mask: Tensor | None,
    truth: list[list[int]],
    sampling: SamplingParams,
    stats: Stats | None = None,
) -> list[list[int]]:
    """Plain and speculative decoding; they must agree."""
    expected = told(decode(target, ids, mask, sampling=sampling))
    head = Oracle(target, truth, right=1, first=1)
    steps = decode(
        target,
        ids,
        mask,
        sampling=sampling,
        speculative=SpeculativeConfig(head, CHAIN),
        stats=stats,
    )
    assert told(steps) == expected
    return expected


def first_place(answer: list[int], places: range) -> int:
    """A place whose token occurs there for the first time."""
    return next(place for place in places if answer[place] not in answer[:place])


def test_the_prompts_side_of_padding_does_not_matter(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    right_BT, lengths_B = padded(prompts(LENGTHS))
    right_mask_BT = torch.arange(right_BT.shape[1]) < lengths_B[:, None]
    sampling = SamplingParams(NEW_TOKENS)
    assert told(decode(target, right_BT, right_mask_BT, sampling=sampling)) == truth
    for row, text in enumerate(prompts(LENGTHS)):
        assert told(decode(target, text[None], sampling=sampling)) == [truth[row]]


def test_right_drafts_are_accepted_whole(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    head = Oracle(target, truth, right=1, first=1)
    sampling = SamplingParams(NEW_TOKENS)
    steps = list(
        decode(target, ids, mask, sampling=sampling, speculative=SpeculativeConfig(head, CHAIN))
    )
    sizes = [[len(tokens) for tokens in step] for step in steps]
    # The prompt's token, then 4 accepted guesses and a free token each time.
    assert sizes == [[1] * 3, [5] * 3, [5] * 3, [5] * 3, [4] * 3]
    assert told(iter(steps)) == truth


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 5, 6, 7])
def test_the_length_limit_inside_a_path(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]], new_tokens: int
) -> None:
    answers = both(target, ids, mask, truth, SamplingParams(new_tokens))
    assert answers == [answer[:new_tokens] for answer in truth]


def test_an_end_token_inside_a_path(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    place = first_place(truth[0], range(2, 5))  # inside the first path, which gives 1 to 5
    eos = truth[0][place]
    answers = both(
        target, ids, mask, truth, SamplingParams(NEW_TOKENS, stop_token_ids=frozenset([eos]))
    )
    assert answers[0] == truth[0][: place + 1]
    for answer, whole in zip(answers, truth, strict=True):
        cut = whole.index(eos) + 1 if eos in whole else NEW_TOKENS
        assert answer == whole[:cut]


def test_two_end_tokens_stop_at_whichever_comes_first(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    early, late = first_place(truth[0], range(2, 5)), first_place(truth[0], range(7, 10))
    other = first_place(truth[1], range(8, 12))
    ends = {truth[0][late], truth[0][early], truth[1][other]}
    answers = both(
        target, ids, mask, truth, SamplingParams(NEW_TOKENS, stop_token_ids=frozenset(ends))
    )
    assert len(answers[0]) <= early + 1 < late
    for answer, whole in zip(answers, truth, strict=True):
        assert answer == whole[: len(answer)]
        assert not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == NEW_TOKENS


def test_the_first_token_can_be_the_last(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    ends = frozenset(answer[0] for answer in truth)
    assert both(target, ids, mask, truth, SamplingParams(NEW_TOKENS, stop_token_ids=ends)) == [
        answer[:1] for answer in truth
    ]


class Sum(StoppingCriteria):
    """Stops once the answer's ids add up to a total; counts how it was asked."""

    def __init__(self, columns: int, total: int):
        self.columns, self.total = columns, total
        self.asked: list[int] = []

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        assert input_ids.shape[0] == 1 and scores is None
        self.asked.append(input_ids.shape[1])
        return input_ids[:, self.columns :].sum(1) >= self.total


def test_a_criterion_of_ones_own_sees_every_prefix_once(
    target: Target, ids: Tensor, truth: list[list[int]]
) -> None:
    one = ids[:1, -LENGTHS[0] :]
    criterion = Sum(one.shape[1], sum(truth[0][:8]) - truth[0][7] + 1)
    head = Oracle(target, truth[:1], right=1, first=1)
    sampling = SamplingParams(NEW_TOKENS, stopping_criteria=(criterion,))
    steps = decode(target, one, sampling=sampling, speculative=SpeculativeConfig(head, CHAIN))
    assert told(steps) == [truth[0][:8]]
    assert criterion.asked == list(range(one.shape[1] + 1, one.shape[1] + 9))


def test_rows_end_when_they_end(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    """Rows leave the batch one after another, under drafts that are right now and then."""
    ends = frozenset([truth[0][first_place(truth[0], range(3, 8))]])
    ends |= {truth[2][first_place(truth[2], range(10, 15))]}
    sampling = SamplingParams(NEW_TOKENS, stop_token_ids=ends)
    expected = told(decode(target, ids, mask, sampling=sampling))
    assert len({len(answer) for answer in expected}) > 1
    for shape in (CHAIN, TreeShape.dynamic(10, 4, 3)):
        head = Oracle(target, truth)
        steps = decode(
            target, ids, mask, sampling=sampling, speculative=SpeculativeConfig(head, shape)
        )
        assert told(steps) == expected


def test_sampled_rows_do_not_influence_each_other(
    target: Target, ids: Tensor, mask: Tensor
) -> None:
    """Row 0 keeps its draws, whatever its neighbours are."""

    def sampled(ids_BT: Tensor, mask_BT: Tensor) -> list[list[int]]:
        sampling = SamplingParams(NEW_TOKENS, 1.0, top_p=0.9, repetition_penalty=1.2, seed=4)
        return told(decode(target, ids_BT, mask_BT, sampling=sampling))

    whole = sampled(ids, mask)
    assert sampled(ids[:1], mask[:1]) == whole[:1]
    assert sampled(ids[[0, 2]], mask[[0, 2]])[0] == whole[0]
    same = sampled(ids[[0, 0]], mask[[0, 0]])
    assert same[0] == whole[0] and same[1] != same[0]


def small_context(limit: int) -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=limit,
        initializer_range=0.3,
    )
    return wrap_target(LlamaForCausalLM(config))


def test_stops_at_the_end_of_the_context() -> None:
    target = small_context(limit=16)
    ids_BT, lengths_B = padded(prompts([9, 5]))
    ids_BT, mask_BT = ids_BT % 50, torch.arange(9) < lengths_B[:, None]
    truth = told(decode(target, ids_BT, mask_BT, sampling=SamplingParams(100)))
    assert [len(answer) for answer in truth] == [7, 11]  # prompt and answer are 16
    both(target, ids_BT, mask_BT, truth, SamplingParams(100))
    asked: list[int] = []
    target.model.get_decoder().rotary_emb.register_forward_pre_hook(
        lambda _, __, given: asked.append(int(given["position_ids"].max())), with_kwargs=True
    )
    both(target, ids_BT, mask_BT, truth, SamplingParams(100))
    assert asked and max(asked) < 16


@pytest.mark.parametrize(
    ("alive", "places"),
    [
        ([True, True], [0, 1]),
        ([False, True, True], [2, 1]),
        ([False, True, False, True, True], [4, 1, 3]),
        ([True, False, False], [0]),
    ],
)
def test_most_rows_stay_in_place(alive: list[bool], places: list[int]) -> None:
    """So that a large cache is not copied whenever a row of the batch is complete."""
    assert _compacted(alive) == places


@pytest.mark.parametrize("length", [16, 20])
def test_a_prompt_without_room_for_an_answer(length: int) -> None:
    target = small_context(limit=16)
    with pytest.raises(ValueError, match=rf"{length} tokens.* context of .* is 16 tokens.*Shorten"):
        decode(target, torch.ones(1, length).long(), sampling=SamplingParams(4))


@pytest.mark.parametrize(
    ("ids_BT", "mask_BT"),
    [
        (torch.zeros(1, 0).long(), None),
        (torch.zeros(0, 3).long(), None),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]])),
    ],
)
def test_an_empty_prompt_is_said_so_at_once(
    target: Target, ids_BT: Tensor, mask_BT: Tensor | None
) -> None:
    with pytest.raises(ValueError, match="empty"):
        decode(target, ids_BT, mask_BT, sampling=SamplingParams(4))


def test_a_mask_must_fit(target: Target) -> None:
    with pytest.raises(ValueError, match="same shape"):
        decode(target, torch.ones(1, 3).long(), torch.ones(1, 2), sampling=SamplingParams(4))
    with pytest.raises(ValueError, match="max_new_tokens"):
        decode(target, torch.ones(1, 3).long(), sampling=SamplingParams(0))


def test_figures_of_right_drafts(
    target: Target, ids: Tensor, mask: Tensor, truth: list[list[int]]
) -> None:
    stats = Stats()
    both(target, ids, mask, truth, SamplingParams(11), stats)
    # 1 from the prompt, then 5 and 5 in two rounds, for each of three rows.
    assert (stats.num_sequences, stats.num_tokens, stats.num_steps) == (3, 33, 6)
    assert stats.acceptance_length == 5
    assert stats.accepted_per_position == stats.tried_per_position == [6, 6, 6, 6]
    assert stats.num_draft_tokens == 24
    assert stats.total_seconds == 0


def test_figures_count_to_the_end_token_only(target: Target, truth: list[list[int]]) -> None:
    text = prompts(LENGTHS)[0][None]
    place = first_place(truth[0], range(2, 4))
    stats = Stats()
    answer = both(
        target,
        text,
        None,
        truth[:1],
        SamplingParams(NEW_TOKENS, stop_token_ids=frozenset([truth[0][place]])),
        stats,
    )
    assert stats.num_tokens == len(answer[0]) == place + 1
    assert stats.num_steps == 1 and stats.acceptance_length == place
    assert stats.accepted_per_position == [1] * place + [0] * (4 - place)
    assert stats.tried_per_position == stats.accepted_per_position, (
        "what lies behind the stop was not tried"
    )


def test_figures_of_wrong_drafts(target: Target, truth: list[list[int]]) -> None:
    text, stats = prompts(LENGTHS)[0][None], Stats(timing=True)
    head = Oracle(target, truth[:1], right=0)
    steps = decode(
        target,
        text,
        sampling=SamplingParams(9),
        speculative=SpeculativeConfig(head, CHAIN),
        stats=stats,
    )
    assert told(steps) == [truth[0][:9]]
    assert stats.acceptance_length == 1 and stats.acceptance_rates == [0, 0, 0, 0]
    # The last round has room for one token, so nothing is drafted for it.
    assert stats.tried_per_position == [7, 0, 0, 0] and stats.num_steps == 8
    # Never deeper than there is room.
    assert stats.num_draft_tokens == 4 + 4 + 4 + 4 + 3 + 2 + 1
    assert set(stats.seconds) == set(PHASES) and min(stats.seconds.values()) > 0
    assert stats.total_seconds == pytest.approx(sum(stats.seconds.values()))


def test_gradients_stay_on_for_the_caller(target: Target) -> None:
    steps = decode(target, prompts(LENGTHS)[0][None], sampling=SamplingParams(4))
    next(steps)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_answers_end_where_the_angles_change(family: str) -> None:
    settings = {"sliding_window": None, "rope_parameters": LONGROPE, ORIGINAL: 24}
    model = build(family, settings)
    target, ids_BT = wrap_target(model), prompts([11])[0][None]
    theirs = model.generate(ids_BT, max_new_tokens=NEW_TOKENS, do_sample=False)
    truth = [theirs[0, 11:].tolist()]
    assert both(target, ids_BT, None, truth, SamplingParams(NEW_TOKENS)) == [truth[0][: 24 - 11]]
    with pytest.raises(ValueError, match="is 24 tokens"):
        decode(target, prompts([24])[0][None], sampling=SamplingParams(NEW_TOKENS))


@pytest.mark.parametrize("odd", [-1, 96, 5000])
def test_tokens_that_do_not_exist_are_refused(target: Target, odd: int) -> None:
    ids_BT = torch.tensor([[7, odd, 5]])
    with pytest.raises(ValueError, match=f"holds the token {odd}, but .* tokens 0 to 95"):
        decode(target, ids_BT, sampling=SamplingParams(4))
    mask_BT = torch.tensor([[1, 0, 1]])  # padding may be anything
    assert told(decode(target, ids_BT, mask_BT, sampling=SamplingParams(4)))


def test_narrow_token_ids_are_read(target: Target) -> None:
    ids_BT = prompts([7])[0][None]
    truth = told(decode(target, ids_BT, sampling=SamplingParams(9)))
    assert both(target, ids_BT.int(), None, truth, SamplingParams(9)) == truth
