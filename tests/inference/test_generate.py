"""`generate` with transformers' options: the same answers as transformers' own.

Legend: B batch rows, T prompt positions, L positions of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, prompts
from oracle import Oracle
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from headstart.inference.config import SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.inference.generate import SpeculativeModel
from headstart.inference.tree_policy.defaults import DEFAULT_TREE
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

LENGTHS = [11, 4, 17]
NEW_TOKENS = 14
PAD = 0


class Remembering(BaseStreamer):
    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.fixture(scope="module")
def target() -> Target:
    letters = {letter: 4 + place for place, letter in enumerate("abcdef")}
    taken = set(letters.values())
    words = {f" w{token}": token for token in range(VOCAB) if token not in taken}
    tokenizer = Tokenizer(BPE(letters | words, [], unk_token=" w3"))
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" w3", pad_token=" w0")
    return wrap_target(FAMILIES["qwen3"](), fast)


@pytest.fixture(scope="module")
def one() -> Tensor:
    return prompts([9])[0][None]


@pytest.fixture(scope="module")
def three() -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their mask."""
    texts = prompts(LENGTHS)
    ids_BT = torch.full((3, max(LENGTHS)), PAD)
    mask_BT = torch.zeros_like(ids_BT)
    for row, text in enumerate(texts):
        ids_BT[row, -len(text) :] = text
        mask_BT[row, -len(text) :] = 1
    return ids_BT, mask_BT


AUTOREGRESSIVE = SpeculativeConfig()


class WithTree(SpeculativeModel):
    """Always with the default tree: an oracle's guesses cost nothing that could be measured."""

    def _request(self, input_ids: Tensor, mask: Any, speculative: Any, *given: Any) -> Any:
        speculative = speculative or SpeculativeConfig(self.head, DEFAULT_TREE)
        return super()._request(input_ids, mask, speculative, *given)


@pytest.fixture(scope="module")
def model(target: Target) -> SpeculativeModel:
    torch.manual_seed(0)
    return SpeculativeModel(target, make_head(target, "mtp", {}))


@pytest.fixture
def informed(target: Target) -> Callable[..., SpeculativeModel]:
    """A model whose head knows what transformers answers to these options."""

    def build(ids_BT: Tensor, mask_BT: Tensor | None = None, **options: Any) -> SpeculativeModel:
        ids_BL = theirs(target, ids_BT, mask_BT, **options)
        return WithTree(target, Oracle(target, ids_BL[:, ids_BT.shape[1] :].tolist()))

    return build


def theirs(target: Target, ids_BT: Tensor, mask_BT: Tensor | None = None, **options: Any) -> Tensor:
    """transformers' own greedy decoding."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD} | options
    ids_BL: Tensor = target.model.generate(ids_BT, attention_mask=mask_BT, **options)
    return ids_BL


GREEDY: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "end token": {"eos_token_id": 50},
    "not before": {"eos_token_id": list(range(20, 96)), "min_new_tokens": 6},
    "min length": {"eos_token_id": list(range(20, 96)), "min_length": 20},
    "bad words": {"bad_words_ids": [[39], [74, 74]]},
    "suppressed": {"suppress_tokens": list(range(0, 90, 2))},
    "forced end": {"forced_eos_token_id": 7, "eos_token_id": 7},
    "bias": {"sequence_bias": {(74,): -9.0, (50,): 4.0, (50, 51): 9.0}},
    "decay": {"eos_token_id": 50, "exponential_decay_length_penalty": (4, 1.7)},
    "max length": {"max_length": 22, "max_new_tokens": None},
}


@pytest.mark.parametrize("name", GREEDY)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_equals_transformers(
    target: Target,
    informed: Callable[..., SpeculativeModel],
    one: Tensor,
    three: tuple[Tensor, Tensor],
    rows: int,
    name: str,
) -> None:
    options = GREEDY[name]
    ids_BT, mask_BT = (one, None) if rows == 1 else three
    expected = theirs(target, ids_BT, mask_BT, **options)
    model = informed(ids_BT, mask_BT, **options)
    asked = {"max_new_tokens": NEW_TOKENS, "pad_token_id": PAD} | options
    for speculative in (None, AUTOREGRESSIVE):
        told = model.generate(ids_BT, mask_BT, speculative=speculative, **asked)
        assert told.equal(expected)
    if name != "nothing more" and rows == 3:
        assert not expected.equal(theirs(target, ids_BT, mask_BT)), "the option did nothing"


def test_a_generation_config_is_read(target: Target, model: SpeculativeModel, one: Tensor) -> None:
    config = GenerationConfig(max_new_tokens=9, no_repeat_ngram_size=2, pad_token_id=PAD)
    expected = target.model.generate(one, generation_config=config)
    assert model.generate(one, generation_config=config).equal(expected)
    assert expected.shape[1] == one.shape[1] + 9


def test_figures_of_the_latest_call(informed: Callable[..., SpeculativeModel], one: Tensor) -> None:
    model = informed(one)
    model.generate(one, max_new_tokens=NEW_TOKENS, timing=True)
    assert model.last_stats.num_tokens == NEW_TOKENS and model.last_stats.acceptance_length > 1.2
    assert 0 < len(model.last_stats.tried_per_position) <= DEFAULT_TREE.depth
    assert model.last_stats.tokens_per_second > 0
    model.generate(one, max_new_tokens=NEW_TOKENS, speculative=AUTOREGRESSIVE)
    assert model.last_stats.acceptance_length == 1 and model.last_stats.total_seconds == 0


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9},
        {"temperature": 1.1, "top_k": 10},
        {"top_p": 0.8, "top_k": 0},
        {"min_p": 0.05, "repetition_penalty": 1.2},
        {"typical_p": 0.9, "eos_token_id": [50, 74]},
    ],
)
def test_a_seed_gives_the_same_answer_with_and_without_speculation(
    model: SpeculativeModel, three: tuple[Tensor, Tensor], options: dict[str, Any]
) -> None:
    ids_BT, mask_BT = three
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "pad_token_id": PAD} | options

    def sampled(**more: Any) -> Tensor:
        ids_BL = model.generate(ids_BT, mask_BT, **options, **more)
        assert isinstance(ids_BL, Tensor)
        return ids_BL

    expected = sampled(seed=3, speculative=AUTOREGRESSIVE)
    assert sampled(seed=3).equal(expected)
    assert sampled(seed=3, speculative=SpeculativeConfig(model.head, TreeShape.chain(2))).equal(
        expected
    )
    assert not sampled(seed=4).equal(expected)
    torch.manual_seed(9)
    first, second = sampled(), sampled()
    torch.manual_seed(9)
    assert sampled().equal(first) and not second.equal(first)


def test_several_answers_to_one_prompt(model: SpeculativeModel, one: Tensor) -> None:
    ids_BL = model.generate(
        one, do_sample=True, num_return_sequences=3, max_new_tokens=8, seed=1, pad_token_id=PAD
    )
    assert isinstance(ids_BL, Tensor) and ids_BL.shape == (3, one.shape[1] + 8)
    assert len({tuple(row) for row in ids_BL.tolist()}) == 3


def test_the_usual_output_object(model: SpeculativeModel, one: Tensor) -> None:
    plain = model.generate(one, max_new_tokens=6)
    output = model.generate(one, max_new_tokens=6, return_dict_in_generate=True)
    assert not isinstance(output, Tensor) and output.sequences.equal(plain)


@pytest.mark.parametrize("speculative", [None, AUTOREGRESSIVE])
def test_a_streamer_gets_the_answer_in_steps(
    informed: Callable[..., SpeculativeModel], one: Tensor, speculative: SpeculativeConfig | None
) -> None:
    streamer = Remembering()
    ids_BL = informed(one).generate(
        one, max_new_tokens=NEW_TOKENS, streamer=streamer, speculative=speculative
    )
    assert isinstance(ids_BL, Tensor)
    assert [token for tokens in streamer.given for token in tokens] == ids_BL[0].tolist()
    assert streamer.given[0] == one[0].tolist() and streamer.ended == 1
    sizes = {len(tokens) for tokens in streamer.given[1:]}
    assert max(sizes) > 1 if speculative is None else sizes == {1}


def test_transformers_text_streamer(
    model: SpeculativeModel, one: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = model.target.tokenizer
    ids_BL = model.generate(
        one, max_new_tokens=6, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert isinstance(ids_BL, Tensor)
    told = capsys.readouterr().out.strip()
    assert told and told == tokenizer.decode(ids_BL[0, one.shape[1] :]).strip()


def test_stream_yields_what_each_pass_gave(
    informed: Callable[..., SpeculativeModel], one: Tensor
) -> None:
    model = informed(one)
    steps = list(model.stream(one, max_new_tokens=NEW_TOKENS))
    assert len(steps) == model.last_stats.num_steps + 1
    expected = model.generate(one, max_new_tokens=NEW_TOKENS)
    assert isinstance(expected, Tensor)
    assert [token for step in steps for token in step] == expected[0, one.shape[1] :].tolist()
    assert len(steps[0]) == 1 and max(map(len, steps)) > 1


@pytest.mark.parametrize("through_config", [False, True])
def test_stop_strings(
    informed: Callable[..., SpeculativeModel], one: Tensor, through_config: bool
) -> None:
    model = informed(one)
    free = model.generate(one, max_new_tokens=NEW_TOKENS)
    assert isinstance(free, Tensor)
    answer = free[0, one.shape[1] :].tolist()
    place = next(
        place for place in range(5, 9) if answer[place] > 9 and answer[place] not in answer[:place]
    )
    words = f"w{answer[place]}"
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "stop_strings": words}
    if through_config:
        options = {"generation_config": GenerationConfig(**options)}
    for speculative in (None, AUTOREGRESSIVE):
        ids_BL = model.generate(one, speculative=speculative, **options)
        assert isinstance(ids_BL, Tensor)
        told = ids_BL[0, one.shape[1] :].tolist()
        assert told == answer[: len(told)] and len(told) < NEW_TOKENS
        assert len(told) == place + 1


def test_stop_strings_need_a_tokenizer(target: Target, one: Tensor) -> None:
    bare = wrap_target(target.model)
    model = SpeculativeModel(bare, make_head(bare, "medusa", {}))
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(one, max_new_tokens=4, stop_strings="w5")


class Fourth(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 13)


def test_stopping_criteria_are_asked(model: SpeculativeModel, one: Tensor) -> None:
    ids_BL = model.generate(
        one, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([Fourth()])
    )
    assert isinstance(ids_BL, Tensor) and ids_BL.shape[1] == 13


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"num_beams": 2, "do_sample": True}, "beam sample is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation is not supported"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search is not supported"),
        ({"assistant_model": torch.nn.Linear(1, 1)}, "assistant_model is not supported"),
        ({"output_scores": True}, "output_scores is not supported"),
        (
            {
                "generation_config": GenerationConfig(
                    output_logits=True, return_dict_in_generate=True
                )
            },
            "output_logits is not supported",
        ),
        ({"guidance_scale": 2.0}, "ClassifierFreeGuidance.* cannot be used"),
        ({"tempertaure": 0.5}, "tempertaure"),
    ],
)
def test_what_a_tree_cannot_do_is_refused(
    model: SpeculativeModel, one: Tensor, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.generate(one, max_new_tokens=4, **options)


@pytest.mark.parametrize(
    ("ids_BT", "mask_BT", "said"),
    [
        (torch.zeros(1, 0).long(), None, "empty"),
        (torch.ones(2, 3).long(), torch.tensor([[1, 1, 1], [0, 0, 0]]), "empty"),
        (torch.ones(3).long(), None, r"input_ids\[None\]"),
        (torch.ones(1, 256).long(), None, "is 256 tokens"),
    ],
)
def test_prompts_that_cannot_be_answered(
    model: SpeculativeModel, ids_BT: Tensor, mask_BT: Tensor | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        model.generate(ids_BT, mask_BT, max_new_tokens=4)


def test_streams_and_streamers_take_one_prompt(
    model: SpeculativeModel, three: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.generate(*three, max_new_tokens=4, streamer=Remembering())
    with pytest.raises(ValueError, match="one prompt at a time"):
        model.stream(three[0], max_new_tokens=4)


def test_mistakes_are_told_before_the_first_token(model: SpeculativeModel, one: Tensor) -> None:
    with pytest.raises(ValueError, match="beam search"):
        model.stream(one, max_new_tokens=4, num_beams=2)


def test_the_target_stays_what_it_was(target: Target, model: SpeculativeModel, one: Tensor) -> None:
    before = target.model.generation_config.to_dict()
    model.generate(one, max_new_tokens=4, do_sample=True, temperature=0.5, seed=0)
    assert target.model.generation_config.to_dict() == before
    assert isinstance(target.model, AutoModelForCausalLM._model_mapping[type(target.model.config)])


def test_opens_a_fused_checkpoint(target: Target, one: Tensor, tmp_path: Path) -> None:
    target.model.save_pretrained(tmp_path / "target")
    saved = load_target(tmp_path / "target", dtype=torch.float32, device="cpu")
    save_head(
        make_head(saved, "mtp", {}), tmp_path / "head", HeadMeta(target="x", steps=1, tokens=1)
    )
    fuse(tmp_path / "target", tmp_path / "head", tmp_path / "fused")
    model = SpeculativeModel.from_pretrained(tmp_path / "fused", dtype=torch.float32, device="cpu")
    assert model.generate(one, max_new_tokens=NEW_TOKENS).equal(theirs(target, one))
    assert model.last_stats.tried_per_position[0] > 0


def test_trees_are_sized_by_what_pays_unless_they_have_one_size(
    model: SpeculativeModel, one: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def watched(*given: Any, **options: Any) -> Any:
        asked.append(options)
        return decode(*given, **options)

    monkeypatch.setattr("headstart.inference.generate.decode", watched)
    for config in (None, SpeculativeConfig(model.head)):
        again = SpeculativeModel(model.target, model.head)
        again.generate(one, max_new_tokens=4, speculative=config)
    monkeypatch.setattr("headstart.inference.generate.fixed_tree", lambda _: TreeShape.chain(3))
    model.generate(one, max_new_tokens=4)  # as on a GPU
    configs = [options["speculative"] for options in asked]
    assert [config.costs is not None for config in configs] == [True, False, False]
    assert [config.ngram for config in configs] == [True, False, False]
    assert configs[-1].shape == TreeShape.chain(3)
