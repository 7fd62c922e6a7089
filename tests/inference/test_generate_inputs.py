"""What `generate` is given beside the usual: its own settings, odd inputs, odd trees.

Legend: B batch rows, T prompt positions, L positions of prompt and answer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chat_model import tokenizer
from families import FAMILIES, build, prompts
from torch import Tensor
from transformers import GenerationConfig

from headstart.inference.config import SpeculativeConfig
from headstart.inference.generate import SpeculativeModel
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.model.tree.shape import TreeShape


def model_of(settings: dict[str, Any], *, with_tokenizer: bool = False) -> SpeculativeModel:
    known = tokenizer()
    sizes = {"vocab_size": len(known)} if with_tokenizer else {}
    target = wrap_target(build("llama", settings | sizes), known if with_tokenizer else None)
    return SpeculativeModel(target, make_head(target, "mtp", {}))


@pytest.fixture(scope="module")
def ids_BT() -> Tensor:
    return prompts([9])[0][None]


@pytest.fixture(scope="module")
def model() -> SpeculativeModel:
    return model_of({})


@pytest.mark.parametrize("given", [{}, {"generation_config": GenerationConfig(max_new_tokens=12)}])
def test_the_models_own_stop_strings(ids_BT: Tensor, given: dict[str, Any]) -> None:
    model = model_of({}, with_tokenizer=True)
    options = {"max_new_tokens": 12, "do_sample": False}
    own, theirs = model.target.model.generation_config, model.target.model.generate
    answer = theirs(ids_BT, **options)[0, ids_BT.shape[1] :].tolist()
    own.stop_strings = [next(filter(str.isalnum, map(model.target.text, zip(answer[4:]))))]
    expected = theirs(ids_BT, **options, tokenizer=model.target.tokenizer)
    assert expected.shape[1] < ids_BT.shape[1] + 12
    for speculative in (None, SpeculativeConfig()):
        told = model.generate(ids_BT, **(given or options), speculative=speculative)
        assert told.equal(expected)
    assert len(own.stop_strings) == 1
    with pytest.raises(ValueError, match="has no tokenizer"):
        bare = wrap_target(model.target.model)
        SpeculativeModel(bare, make_head(bare, "mtp", {})).generate(ids_BT, max_new_tokens=4)


@pytest.mark.parametrize("more", [{}, {"num_return_sequences": 2, "do_sample": True, "seed": 3}])
def test_an_end_token_serves_for_padding(ids_BT: Tensor, more: dict[str, Any]) -> None:
    rows_BT = ids_BT if more else ids_BT.repeat(2, 1).index_fill(1, torch.tensor([4]), 7)
    mask_BT = torch.ones_like(rows_BT)
    for eos in (5, list(range(20, 60))):
        model = model_of({"pad_token_id": None, "eos_token_id": eos})
        ids_BL = model.generate(rows_BT, mask_BT, max_new_tokens=8, **more)
        assert isinstance(ids_BL, Tensor) and len(ids_BL) == 2
        if not more:
            theirs = model.target.model.generate(rows_BT, attention_mask=mask_BT, max_new_tokens=8)
            assert ids_BL.equal(theirs)


def test_a_batch_needs_a_padding_token(ids_BT: Tensor) -> None:
    model = model_of({"pad_token_id": None})
    rows_BT = ids_BT.repeat(2, 1)
    with pytest.raises(ValueError, match=r"neither a padding nor an end.*Pass pad_token_id"):
        model.generate(rows_BT, max_new_tokens=4)
    assert isinstance(model.generate(rows_BT, max_new_tokens=4, pad_token_id=5), Tensor)
    assert isinstance(model.generate(ids_BT, max_new_tokens=4), Tensor)


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds"])
def test_inputs_that_are_not_ours_are_refused(
    model: SpeculativeModel, ids_BT: Tensor, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        model.generate(ids_BT, max_new_tokens=4, **{name: torch.arange(9)[None]})
    assert model.generate(ids_BT, max_new_tokens=4, **{name: None}).shape[1] == 13


def test_narrow_and_unknown_tokens(model: SpeculativeModel, ids_BT: Tensor) -> None:
    expected = model.generate(ids_BT, max_new_tokens=6)
    assert model.generate(ids_BT.int(), max_new_tokens=6).equal(expected)
    with pytest.raises(ValueError, match="tokens 0 to 95"):
        model.generate(ids_BT + 5000, max_new_tokens=6)


@pytest.mark.parametrize("kind", kinds())
def test_trees_that_do_not_fit_the_head(ids_BT: Tensor, kind: str) -> None:
    target = wrap_target(FAMILIES["llama"]())
    head = make_head(target, kind, {"draft_vocab": 5})
    head.set_draft_vocab(torch.arange(5) * 3 + 4)
    model = SpeculativeModel(target, head)
    expected = model.generate(ids_BT, max_new_tokens=9, speculative=SpeculativeConfig())
    for tree in (TreeShape.static([[4], [4, 4]]), TreeShape.dynamic(30, 3, 5)):
        config = SpeculativeConfig(head, tree)
        assert model.generate(ids_BT, max_new_tokens=9, speculative=config).equal(expected)
    for tree in (TreeShape.static([[0], [5]]), TreeShape.dynamic(30, 3, 6)):
        with pytest.raises(ValueError, match="the head knows only 5 tokens"):
            model.generate(ids_BT, max_new_tokens=9, speculative=SpeculativeConfig(head, tree))
    for odd in ("chain", 4, [[0]]):
        with pytest.raises(ValueError, match="given as a TreeShape"):
            SpeculativeConfig(head, odd)
