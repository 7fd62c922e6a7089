"""A run from data to the best head, and everything that can stop it.

Legend: V vocabulary.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import (
    VOCAB,
    follower,
    mixed_rows,
    rule_rows,
    rule_target,
    tiny_head,
    tiny_recipe,
    tiny_target,
    write_rows,
)
from torch import Tensor
from torch.optim import Muon

from headstart.model.checkpoint.head import load_head, read_head_file
from headstart.model.heads.common.base import DraftHead, kinds
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.training.config.schema import Recipe, TrainConfig, make_recipe
from headstart.training.optim.optimizers import learning_rate, make_optimizers
from headstart.training.reporting.metrics_log import Progress
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import Result, train


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


@pytest.fixture
def data(tmp_path) -> Path:
    return write_rows(tmp_path / "data.jsonl", mixed_rows(24))


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(exclude_none=True)
    for name, section in sections.items():
        values[name] |= section
    return make_recipe(values)


def weights(head: DraftHead) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in head.state_dict().items()}


def trained(
    recipe: Recipe, target: Target, kind: str = "mtp", **settings: Any
) -> dict[str, Tensor]:
    head = tiny_head(target, kind, **settings)
    train(recipe, target=target, head=head)
    return weights(head)


def lines(recipe: Recipe, kind: str = "train") -> list[dict[str, float]]:
    text = (Path(recipe.train.output) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


def test_learns_a_rule_and_the_saved_head_drafts_it(tmp_path):
    target = rule_target()
    path = write_rows(tmp_path / "data.jsonl", rule_rows(VOCAB, 16))
    recipe = tiny_recipe(tmp_path / "run", path, epochs=10, log_every=5)
    recipe = changed(recipe, data={"holdout": 8}, eval={"every": 20})
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    seen: list[Progress] = []
    result = train(recipe, target=target, head=tiny_head(target), log=seen.append)

    assert result.score is not None and result.score > 2.9  # of 3 tokens per target pass
    head = load_head(result.best, target)
    tokens_BT = torch.tensor([rule_rows(30, 9)[29]])
    state = head.advance(
        head.start(1), target.forward(tokens_BT[:, :-1]), tokens_BT[:, 1:], torch.tensor([8])
    )
    expected = int(follower()[tokens_BT[0, -1]])
    assert int(head.draft(state, TreeShape.chain(2)).tokens_BN[0, 1]) == expected
    after = target.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [line["step"] for line in lines(recipe)] == list(range(5, result.steps + 1, 5))
    assert [p.step for p in seen if p.kind == "train"] == list(range(1, result.steps + 1))
    evaluated = [p.step for p in seen if p.kind == "eval"]
    assert evaluated == [*range(20, result.steps, 20), result.steps]
    assert all(p.eta is not None and p.eta >= 0 for p in seen if p.kind == "train")
    assert "40 conversations" in seen[0].message
    meta = read_head_file(result.best).meta
    assert (meta.steps, meta.target) == (2, target.name)
    assert meta.data_hash and meta.tokens


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_learns(tmp_path, kind, precision):
    target = rule_target()
    path = write_rows(tmp_path / "data.jsonl", rule_rows(VOCAB, 16))
    recipe = tiny_recipe(tmp_path / "run", path, epochs=6, log_every=1, precision=precision)
    trained(recipe, target, kind, **({"num_heads": 2} if kind == "medusa" else {}))
    losses = [line["loss"] for line in lines(recipe)]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_muon_learns(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", rule_rows(VOCAB, 16))
    recipe = tiny_recipe(tmp_path / "run", path, epochs=6, log_every=1, optimizer="muon")
    trained(recipe, rule_target())
    losses = [line["loss"] for line in lines(recipe)]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_same_seed_same_head(target, data, tmp_path):
    runs = [
        trained(tiny_recipe(tmp_path / str(index), data, seed=seed), target)
        for index, seed in enumerate((1, 1, 2))
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


@pytest.mark.parametrize("kind", ["lk", "e2e_tv"])
def test_accumulation_changes_nothing(target, tmp_path, kind):
    """One step over eight rows, in one batch or in four: answers of very different length."""
    rows = [torch.randint(0, VOCAB, (16,)).tolist() for _ in range(8)]
    path = tmp_path / "data.jsonl"
    spans = [[[2 + index % 2 * 10, 16]] for index in range(8)]
    path.write_text(
        "".join(
            json.dumps({"tokens": row, "spans": span}) + "\n"
            for row, span in zip(rows, spans, strict=True)
        )
    )
    found = []
    for name, per_batch, accumulate in (("one", 8, 1), ("four", 2, 4)):
        recipe = tiny_recipe(tmp_path / name, path, accumulate=accumulate, log_every=1)
        data = {"max_length": 16, "global_batch_tokens": 16 * per_batch}
        recipe = changed(recipe, data=data, loss={"kind": kind})
        found.append((trained(recipe, target), lines(recipe)))
    (one, [one_line]), (four, [four_line]) = found
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=0, atol=2e-4)  # of a step of 1e-2
    for name in ("loss", "grad_norm", "acceptance_rate_1"):
        assert four_line[name] == pytest.approx(one_line[name], rel=1e-4)


def test_finish_changes_the_objective(target, data, tmp_path):
    plain = changed(tiny_recipe(tmp_path / "a", data, epochs=2), loss={"kind": "tv"})
    late = changed(
        tiny_recipe(tmp_path / "b", data, epochs=2),
        loss={"kind": "kl", "finish": "tv", "finish_part": 1.0},
    )
    never = changed(tiny_recipe(tmp_path / "c", data, epochs=2), loss={"kind": "kl"})
    runs = [trained(recipe, target) for recipe in (plain, late, never)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_draft_vocabulary_comes_from_the_answers(target, tmp_path):
    rows = [[1, 1, 1, 20, 21, 22, 23, 20, 21, 22]] * 8
    path = write_rows(tmp_path / "data.jsonl", rows)
    head = tiny_head(target, draft_vocab=4)
    train(tiny_recipe(tmp_path / "run", path), target=target, head=head)
    assert head.draft_ids is not None and head.draft_ids.tolist() == [20, 21, 22, 23]


def test_decoding_chooses_the_best_head(target, data, tmp_path):
    recipe = changed(tiny_recipe(tmp_path / "run", data, steps=6), eval={"every": 2})
    lengths = iter([1.5, 2.5, 2.0])
    heads: list[dict[str, Tensor]] = []

    def evaluate(head: DraftHead) -> dict[str, float]:
        assert not head.training and not torch.is_grad_enabled()
        heads.append(weights(head))
        return {"acceptance_length": next(lengths), "speed": 7.0}

    result = train(recipe, target=target, head=tiny_head(target), evaluate=evaluate)
    assert result == Result(6, tmp_path / "run" / "best", 4, 2.5)
    saved = weights(load_head(result.best, target))
    for name, value in heads[1].items():  # what was measured is what the file holds
        assert torch.equal(saved[name], value), name
    assert any(not torch.allclose(heads[1][name], heads[2][name]) for name in saved)
    assert [line["speed"] for line in lines(recipe, "eval")] == [7.0] * 3


def test_a_loss_that_is_no_number_stops_with_the_batch(target, data, tmp_path):
    head = tiny_head(target)
    with torch.no_grad():
        next(head.parameters()).fill_(math.nan)
    before = weights(head)
    recipe = tiny_recipe(tmp_path / "run", data, accumulate=2)
    with pytest.raises(FloatingPointError, match=r"bad_batch_step0_process0\.safetensors"):
        train(recipe, target=target, head=head)
    saved = load_file(tmp_path / "run" / "bad_batch_step0_process0.safetensors")
    assert {name.split(".")[0] for name in saved} == {"0", "1"}
    assert saved["0.tokens_BT"].shape == saved["0.loss_mask_BT"].shape
    for name, value in weights(head).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_out_of_memory_names_the_setting(target, data, tmp_path, monkeypatch):
    head = tiny_head(target)
    monkeypatch.setattr(head, "unroll", lambda *_: torch.empty(1 << 60))
    with pytest.raises(MemoryError, match=r"data.global_batch_tokens \(now 128"):
        train(tiny_recipe(tmp_path / "run", data), target=target, head=head)


def test_other_errors_pass_unchanged(target, data, tmp_path, monkeypatch):
    head = tiny_head(target)
    monkeypatch.setattr(head, "unroll", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train(tiny_recipe(tmp_path / "run", data), target=target, head=head)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_saves_and_says_how_to_go_on(target, data, tmp_path, number):
    before = signal.getsignal(number)

    def stop_at_two(at: Progress) -> None:
        if at.step == 2:
            os.kill(os.getpid(), number)

    recipe = tiny_recipe(tmp_path / "run", data, steps=6)
    with pytest.raises(Interrupted, match=r"after step 2 of 6.*train.resume=true"):
        train(recipe, target=target, head=tiny_head(target), log=stop_at_two)
    state = json.loads((tmp_path / "run" / "state" / "state.json").read_text())
    assert (state["step"], state["position"]) == (2, 2)
    assert weights(load_head(tmp_path / "run" / "last", target))
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_that_comes_twice_is_one(target, data, tmp_path, number):
    # A cluster asks every process, and so does the launcher that was asked too.
    def stop_at_two(at: Progress) -> None:
        if at.step == 2:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    recipe = tiny_recipe(tmp_path / "run", data, steps=6)
    with pytest.raises(Interrupted, match="after step 2 of 6"):
        train(recipe, target=target, head=tiny_head(target), log=stop_at_two)
    assert json.loads((tmp_path / "run" / "state" / "state.json").read_text())["step"] == 2


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files cannot grow beyond 4 KiB, as on a full disk, once the test calls for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_costs_no_checkpoint(target, data, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_after_two(at: Progress) -> None:
        if at.step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    recipe = tiny_recipe(tmp_path / "run", data, steps=6, save_every=2, log_every=6)
    with pytest.raises(OSError, match=r"Could not save .*state.*The one before it is intact"):
        train(recipe, target=target, head=tiny_head(target), log=full_after_two)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = json.loads((tmp_path / "run" / "state" / "state.json").read_text())
    assert state["step"] == 2
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "last",
        "metrics.jsonl",
        "state",
    ]
    result = train(changed(recipe, train={"resume": True}), target=target, head=tiny_head(target))
    assert result.steps == 6


def test_settings_that_do_not_fit_are_refused_first(target, data, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data)
    with pytest.raises(ValueError, match=r"drafts 4 tokens, but loss\.steps is 2"):
        train(recipe, target=target, head=tiny_head(target, "medusa", num_heads=4))
    with pytest.raises(ValueError, match="fewer than the 1000 of one optimizer step"):
        train(changed(recipe, train={"accumulate": 1000}), target=target, head=tiny_head(target))
    half = wrap_target(tiny_target().model.bfloat16())
    with pytest.raises(ValueError, match=r"train\.precision is float32"):
        train(recipe, target=half, head=tiny_head(half))
    assert not (tmp_path / "run").exists()


def test_learning_rate():
    config = TrainConfig(output="x", lr=2.0, lr_floor=0.1, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(0.2 + 1.8 / 2)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[99] == pytest.approx(0.2, abs=2e-3)
    assert learning_rate(TrainConfig(output="x", lr=2.0, warmup=0), 0, 1) == 2.0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_norms_and_biases_do_not_decay(target, name):
    head = tiny_head(target)
    config = TrainConfig(output="x", weight_decay=0.1, optimizer=name)
    groups = [
        (parameter, group["weight_decay"], isinstance(optimizer, Muon))
        for optimizer in make_optimizers(head, config)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert {id(parameter) for parameter, *_ in groups} == {id(one) for one in head.parameters()}
    assert len(groups) == len(list(head.parameters()))
    for parameter, decay, by_muon in groups:
        matrix = parameter.dim() > 1
        assert decay == (0.1 if matrix else 0.0)
        assert by_muon == (matrix and name == "muon")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline(target, data, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data, steps=2, log_every=1)
    recipe = changed(recipe, train={"wandb": {"project": "test", "mode": "offline"}})
    train(recipe, target=target, head=tiny_head(target))
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0
    name = (tmp_path / "run" / "wandb_id").read_text().strip()
    assert runs[0].name == f"run-{name}.wandb"
    again = changed(recipe, train={"resume": True})  # at its end already: it only reports
    train(again, target=target, head=tiny_head(target))
    both = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(both) >= 1 and {run.name for run in both} == {f"run-{name}.wandb"}


def test_tensorboard(target, data, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data, steps=2, log_every=1, tensorboard=True)
    train(recipe, target=target, head=tiny_head(target))
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_missing_is_an_error(target, data, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", data, steps=2)
    recipe = changed(recipe, train={"wandb": {"project": "test", "mode": "offline"}})
    with pytest.raises(ValueError, match="pip install wandb"):
        train(recipe, target=target, head=tiny_head(target))
