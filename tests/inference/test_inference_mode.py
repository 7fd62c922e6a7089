"""Decoding inside torch's inference mode, and after it; importing it cheaply."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from families import FAMILIES, prompts
from processes import HELPERS

from headstart.inference.generate import SpeculativeModel
from headstart.model.heads.common.base import DraftHead, kinds, make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target


def with_draft_vocab(target: Target, kind: str) -> DraftHead:
    head = make_head(target, kind, {"draft_vocab": 40})
    head.set_draft_vocab(torch.arange(40) * 2)
    return head


@pytest.mark.parametrize("kind", kinds())
def test_inference_mode_and_then_without(kind: str) -> None:
    target = wrap_target(FAMILIES["llama"]())
    ids_BT = prompts([9])[0][None]
    expected = SpeculativeModel(target, with_draft_vocab(target, kind)).generate(
        ids_BT, max_new_tokens=12
    )
    model = SpeculativeModel(target, with_draft_vocab(target, kind))
    with torch.inference_mode():
        assert model.generate(ids_BT, max_new_tokens=12).equal(expected)
    assert model.generate(ids_BT, max_new_tokens=12).equal(expected)
    model.head.draft_ids.add_(1)  # their rows of the LM head are gathered anew
    assert model.generate(ids_BT, max_new_tokens=12).equal(expected)
    hidden = torch.randn(2, target.hidden_size, requires_grad=True)
    model.head.logits(hidden).sum().backward()  # training goes on with the same head


def test_made_in_inference_mode() -> None:
    ids_BT = prompts([9])[0][None]
    with torch.inference_mode():
        target = wrap_target(FAMILIES["llama"]())
        model = SpeculativeModel(target, with_draft_vocab(target, "mtp"))
        expected = model.generate(ids_BT, max_new_tokens=12)
    assert model.generate(ids_BT, max_new_tokens=12).equal(expected)


def test_a_stream_may_outlive_inference_mode() -> None:
    target = wrap_target(FAMILIES["llama"]())
    model = SpeculativeModel(target, with_draft_vocab(target, "eagle3"))
    ids_BT = prompts([9])[0][None]
    with torch.inference_mode():
        steps = model.stream(ids_BT, max_new_tokens=12)
        first = next(steps)
    rest = [token for step in steps for token in step]
    expected = model.generate(ids_BT, max_new_tokens=12)
    assert expected.tolist() == [ids_BT[0].tolist() + first + rest]


def test_the_model_is_found_where_one_looks_for_it() -> None:
    code = (
        "import sys, headstart.inference; assert 'torch' not in sys.modules; "
        "print(headstart.inference.SpeculativeModel.__name__); "
        "from headstart.inference import SpeculativeModel; "
        "assert not hasattr(headstart.inference, 'SpeculativeModle')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HELPERS)
    assert run.stdout == "SpeculativeModel\n", run.stderr
