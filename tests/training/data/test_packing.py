"""Several conversations in one row teach what each of them teaches alone.

Legend: B batch rows, T positions, D hidden size.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, WINDOW, prompts
from processes import launch_together
from safetensors.torch import load_file
from stored_states import write as write_features
from strategies_worker import decoded
from tiny_run import learned, mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows
from torch import Tensor

from headstart.model.heads.common import autoregressive as recurrent
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import wrap_target
from headstart.model.target.masks import AttentionWindows
from headstart.model.target.output import TargetOutput
from headstart.model.target.probe import probe_packed
from headstart.model.target.target import Target
from headstart.training.config.schema import LossConfig, Recipe, make_recipe
from headstart.training.data.batching import Batch, Batches, Corpus
from headstart.training.objective.losses import loss_sum, loss_weight, valid_steps
from headstart.training.reporting.metrics_log import Progress
from headstart.training.signals import Interrupted
from headstart.training.trainer import train

HEADS: list[tuple[str, dict[str, Any]]] = [
    ("medusa", {"num_heads": 3}),
    *(
        (kind, {"attention_layout": layout, "window": window})
        for kind in ("eagle3", "mtp")
        for layout in ("append", "kvshare")
        for window in (None, 5)
    ),
]


def corpus_of(lengths: list[int]) -> Corpus:
    texts = prompts(lengths)
    spans = [[(2, 4), (5, len(text))] for text in texts]
    return Corpus(zip((text.tolist() for text in texts), spans, strict=True))


@torch.no_grad()
def seen_of(target: Target, batch: Batch, layers: tuple[int, ...]) -> TargetOutput:
    return target.forward_train(batch.tokens_BT, batch.lengths_B, batch.starts_BT, layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_among_others_is_read_as_alone(family):
    target = wrap_target(FAMILIES[family]())
    lengths = [2 * WINDOW + 5, 3, WINDOW + 2]
    corpus = corpus_of(lengths)
    batch = corpus.packed([[0, 1, 2], [2, 0]], sum(lengths) + 1)
    probe_packed(target)
    seen = seen_of(target, batch, (0,))
    bounds = [sum(lengths[:place]) for place in range(4)]
    for place, (start, end) in enumerate(pairwise(bounds)):
        alone = target.forward(corpus.batch([place]).tokens_BT[:, : end - start], layers=(0,))
        torch.testing.assert_close(
            seen.lm_head_input_BTD[:1, start:end], alone.lm_head_input_BTD, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            seen.hidden_states[0][:1, start:end], alone.hidden_states[0], rtol=1e-4, atol=1e-4
        )


def test_a_target_that_mixes_texts_is_refused(tmp_path, monkeypatch):
    target = tiny_target()
    plain = AttentionWindows.mask_texts
    monkeypatch.setattr(
        AttentionWindows,
        "mask_texts",
        lambda self, starts_BT, dtype: plain(self, starts_BT * 0, dtype),
    )
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    with pytest.raises(ValueError, match=r"several texts in one row.*Leave data\.pack out"):
        train(packing(tmp_path / "run", data), target=target, head=tiny_head(target))
    assert not (tmp_path / "run").exists()


def learn(
    target: Target, kind: str, settings: dict[str, Any], loss: str, batches: list[Batch]
) -> tuple[float, float, dict[str, Tensor]]:
    """Total and weight of the loss, and its gradients."""
    torch.manual_seed(1)
    head = make_head(target, kind, settings)
    with torch.no_grad():
        for weight in head.parameters():  # Medusa begins at zero
            weight.add_(torch.randn_like(weight) * 0.1)
    config = LossConfig(kind=loss, steps=3, chunk_rows=7)
    total = weights = 0.0
    for batch in batches:
        seen = seen_of(target, batch, head.taps)
        hidden = head.unroll(seen, batch.tokens_BT, 3, batch.starts_BT)
        found = loss_sum(config, head, seen, hidden, batch)
        found.total.backward()
        total, weights = total + float(found.total.detach()), weights + loss_weight(config, batch)
    return total, weights, {name: one.grad for name, one in head.named_parameters()}


@pytest.mark.parametrize("loss", ["lk", "e2e_tv"])
@pytest.mark.parametrize(("kind", "settings"), HEADS, ids=str)
@pytest.mark.parametrize("chunked", [False, True])
def test_losses_and_gradients_are_those_of_rows_of_their_own(
    kind, settings, loss, chunked, monkeypatch
):
    if chunked:
        monkeypatch.setattr(recurrent, "QUERY_CHUNK", 8)
    target = wrap_target(FAMILIES["llama"]())
    corpus = corpus_of([13, 7, 4, 21, 9])
    apart = [corpus.batch([row]) for row in range(5)]
    together = [corpus.packed([[3, 2], [0, 1], [4]], 26)]
    total, weight, gradients = learn(target, kind, settings, loss, together)
    expected, alone_weight, alone = learn(target, kind, settings, loss, apart)
    assert weight == alone_weight and total == pytest.approx(expected, rel=1e-5)
    for name, value in alone.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-5)


def test_no_label_is_of_the_next_conversation():
    corpus = Corpus([([1, 2, 3, 4], [(0, 4)]), ([5, 6, 7], [(0, 3)])])
    valid_KBT = valid_steps(corpus.packed([[0, 1]], 8), 3)
    assert valid_KBT[:, 0].int().tolist() == [
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_every_conversation_once_per_epoch_in_full_rows():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 100, (300,), generator=generator)
    corpus = Corpus(([1] * n, [(2, n)]) for n in lengths.tolist())
    batches = Batches(lengths, 256, 4, pack=True)
    epochs = []
    for epoch in range(2):
        places = range(batches.count(epoch), batches.count(epoch + 1))
        plan = [batches.at(place) for place in places]
        assert sorted(row for rows in plan for row in rows) == list(range(300))
        made = [batches.batch(corpus, place) for place in places]
        assert all(batch.tokens_BT.numel() <= 256 for batch in made)
        columns = sum(batch.tokens_BT.numel() for batch in made)
        assert columns < 1.025 * int(lengths.sum())
        for batch, rows in zip(made, plan, strict=True):
            held = [row for row in batch.rows_BM.flatten().tolist() if row >= 0]
            assert held == rows
            assert int(batch.loss_mask_BT.sum()) == sum(int(lengths[row]) - 2 for row in rows)
        epochs.append(plan)
    assert epochs[0] != epochs[1]
    again = Batches(lengths, 256, 4, pack=True)
    late = again.count(1) + 3
    assert again.at(late) == epochs[1][3] and again.at(1) == epochs[0][1]


def packing(folder: Path, data: Path, features: Path | None = None, **train: Any) -> Recipe:
    settings = {"steps": 6, "accumulate": 2, "log_every": 1, "lr": 1e-3} | train
    values = tiny_recipe(folder, data, **settings).model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "batch_tokens": 64, "pack": True}
    if features is not None:
        values["data"]["features"] = str(features)
    kind = "mtp" if features is None else "eagle3"
    return make_recipe(values | {"head": {"kind": kind}, "eval": {"every": 2}})


def finished(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "state" / "state.safetensors"), [learned(line) for line in lines]


def check_near(one: Path, other: Path, *, rel: float, near: float, weights: float) -> None:
    """That two runs have the same figures and weights, but for rounding."""
    ours, theirs = finished(one), finished(other)
    for line, expected in zip(ours[1], theirs[1], strict=True):
        for name in line.keys() - {"kind"}:
            assert line[name] == pytest.approx(expected[name], rel=rel, abs=near), name
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name], value, rtol=0, atol=weights)


def test_a_run_that_goes_on_ends_as_an_undisturbed_one(tmp_path):
    target = tiny_target()
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))

    def stop(at: Progress) -> None:
        if at.kind == "train" and at.step == 3:
            raise Interrupted

    whole, cut = packing(tmp_path / "whole", data), packing(tmp_path / "cut", data, save_every=1)
    train(whole, target=target, head=tiny_head(target))
    with pytest.raises(Interrupted):
        train(cut, target=target, head=tiny_head(target), log=stop)
    resumed = packing(tmp_path / "cut", data, save_every=1, resume=True)
    train(resumed, target=target, head=tiny_head(target))
    ours, theirs = finished(tmp_path / "cut"), finished(tmp_path / "whole")
    assert ours[1] == theirs[1]
    assert all(torch.equal(ours[0][name], value) for name, value in theirs[0].items())


def test_stored_features_are_put_into_packed_rows(tmp_path):
    target = tiny_target(layers=4)
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    recipe = packing(tmp_path / "stored", data, tmp_path / "features")
    write_features(tmp_path / "features", recipe, target)
    train(recipe, target=target, head=tiny_head(target, "eagle3"))
    online = recipe.model_dump(exclude_none=True)
    online["data"].pop("features")
    online["train"]["output"] = str(tmp_path / "online")
    train(make_recipe(online), target=target, head=tiny_head(target, "eagle3"))
    check_near(tmp_path / "stored", tmp_path / "online", rel=1e-5, near=1e-5, weights=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    target = tiny_target()
    recipe = packing(tmp_path / "alone", data, accumulate=3)
    head = tiny_head(target, draft_vocab=20)
    train(recipe, target=target, head=head, evaluate=decoded)
    given = (tmp_path / "pair", data, json.dumps({"pack": True}))
    done = launch_together(2, "strategies_worker.py", *given)
    assert done.returncode == 0, done.stderr[-4000:]
    check_near(tmp_path / "pair", tmp_path / "alone", rel=1e-4, near=1e-6, weights=3e-5)
