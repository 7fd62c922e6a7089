"""Features as speculators reads them: the same tokens, taps, logits and head. It is not needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from tiny_run import VOCAB, mixed_rows, tiny_recipe, tiny_target, write_rows

from headstart.model.heads.common.borrow import copy_final_norm
from headstart.scripts.benchmarks import versus_speculators as against
from headstart.scripts.options.recipe import head_of
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.data import hidden_states as store
from headstart.training.data.batching import Batches
from headstart.training.data.conversations import read_conversations

STEPS = 2


@pytest.fixture(scope="module")
def target():
    target = tiny_target(layers=4)
    with torch.no_grad():  # a final norm that is not all ones
        target.model.model.norm.weight.copy_(torch.linspace(-0.5, 2, VOCAB))
    return target


@pytest.fixture
def recipe(target, tmp_path) -> Recipe:
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    values = tiny_recipe(tmp_path / "run", data, steps=STEPS).model_dump(exclude_none=True)
    values["data"] |= {
        "holdout": 5,
        "global_batch_tokens": 64,
        "features": str(tmp_path / "features"),
    }
    values["head"] = {"kind": "eagle3", "taps": [0, 1, 2], "draft_vocab": 20, "fc_norm": True}
    recipe = make_recipe(values)
    found = read_conversations(recipe.data, target, recipe.train.seed)
    wanted = store.wanted(found, target, head_of(recipe, target).taps, None)
    folder = tmp_path / "features"
    store.write_features(folder, wanted, found, target, batch_tokens=64, shard_bytes=20_000)
    return recipe


@pytest.fixture
def prepared(target, recipe, tmp_path, monkeypatch) -> against.Prepared:
    monkeypatch.setattr(against, "open_target", lambda _: target)
    return against.prepare(recipe, tmp_path / "theirs")


def test_speculators_reads_what_our_batches_hold(target, recipe, prepared, tmp_path):
    corpus = read_conversations(recipe.data, target, recipe.train.seed).train
    plan = Batches(corpus.lengths, recipe.data.global_batch_tokens, recipe.train.seed)
    rows = [row for place in range(STEPS) for row in plan.at(place)]
    assert prepared.batches == [
        list(range(len(plan.at(0)))),
        list(range(len(plan.at(0)), len(rows))),
    ]
    data = load_from_disk(tmp_path / "theirs" / "data")
    layers = head_of(recipe, target).taps
    assert len(data) == len(rows) and len(layers) == 3
    for number, row in enumerate(rows):
        batch = corpus.batch([row])
        length = int(batch.lengths_B)
        file = load_file(tmp_path / "theirs/data/hidden_states" / f"hs_{number}.safetensors")
        tokens_T = batch.tokens_BT[0, :length]
        assert file["token_ids"].equal(tokens_T) and data[number]["input_ids"].equal(tokens_T)
        assert data[number]["seq_len"] == length
        # Theirs drops the first place of the mask, and predicts the token behind each one.
        learned_T = data[number]["loss_mask"][1:-1]
        assert learned_T.equal(batch.loss_mask_BT[0, 2:length])
        assert prepared.counts[number] == (length, int(learned_T.sum())) and learned_T.any()
        seen = target.forward(tokens_T[None], taps=layers)
        hidden_TLD = file["hidden_states"]
        for place, tap in enumerate(layers):
            torch.testing.assert_close(hidden_TLD[:, place], seen.hidden_states[tap][0])
        with torch.no_grad():  # as speculators makes its teacher
            logits_TV = target.model.lm_head(target.model.model.norm(hidden_TLD[:, -1]))
        torch.testing.assert_close(logits_TV, seen.logits_BTV[0], rtol=1e-4, atol=1e-4)


def test_the_head_is_the_one_that_we_start_from(target, recipe, prepared, tmp_path):
    corpus = read_conversations(recipe.data, target, recipe.train.seed).train
    head = against.starting_head(recipe, target, corpus)
    theirs = load_file(tmp_path / "theirs" / "head.safetensors")
    assert theirs.pop("t2d").nonzero()[:, 0].equal(head.draft_ids)
    assert {name.replace("layers.0.", "midlayer.") for name in theirs} == set(head.state_dict())
    for name, value in head.state_dict().items():
        assert theirs[name.replace("midlayer.", "layers.0.")].equal(value)
    settings = json.loads((tmp_path / "theirs" / "settings.json").read_text())
    assert settings["fc_norm"] and not settings["norm_output"] and settings["draft_vocab"] == 20
    assert settings["first_batch"] == prepared.batches[0]


def test_a_final_norm_with_zeros_cannot_be_taken_back(target):
    scale_D = torch.ones(VOCAB)
    copy_final_norm(target, scale_D)
    values_LTD = torch.randn(2, 3, VOCAB)
    taps_TD, plain_TD = against.their_layout(values_LTD, scale_D).unbind(1)
    assert taps_TD.equal(values_LTD[0])
    torch.testing.assert_close(plain_TD * scale_D, values_LTD[1])
    scale_D[3] = 0
    with pytest.raises(ValueError, match="zeros"):
        against.their_layout(values_LTD, scale_D)


def test_speeds_count_what_each_tool_batched(prepared):
    times = {"seconds": [9.0, 2.0], "cpu_seconds": [9.0, 1.0], "first_losses": [1.0]}
    halved = {**times, "rows": prepared.batches}
    first = {**times, "rows": prepared.batches[::-1]}
    report = against.summary([(halved, first)], prepared, 1)
    tokens = [sum(prepared.counts[row][0] for row in rows) for rows in prepared.batches]
    assert report["headstart"]["median"]["tokens_per_second"] == tokens[1] / 2
    assert report["speculators"]["median"]["tokens_per_cpu_second"] == tokens[0]
    assert report["ratio"]["tokens_per_second"] == pytest.approx(tokens[1] / tokens[0])


def test_mistakes_are_told_before_work_starts(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)No module.*pip install speculators"):
        against.versions(Path(sys.executable))
    with pytest.raises(ValueError, match="cannot be imported"):
        against.versions(tmp_path / "python")
    data = recipe.data.model_copy(update={"features": None})
    with pytest.raises(ValueError, match=r"data\.features"):
        against.prepare(recipe.model_copy(update={"data": data}), tmp_path / "theirs")
