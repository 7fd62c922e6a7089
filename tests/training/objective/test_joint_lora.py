"""A target trained jointly with its head: it changes, stays near the original, and is fused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from benchmarking import benchmark
from chat_model import save
from joint_run import JOINT, STEPS, recipe_for, run
from resident_workers import run_together
from safetensors.torch import load_file
from tiny_run import learned, mixed_rows, tiny_head, tiny_target, write_rows

from headstart.inference.benchmark.metrics import AUTOREGRESSIVE
from headstart.inference.config import SpeculativeConfig
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import load_head, read_head_file
from headstart.model.heads.common.base import kinds
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.lora import ADAPTER, merge
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import make_recipe
from headstart.training.data.batching import Corpus
from headstart.training.objective.joint_lora import JointLoraTeacher
from headstart.training.objective.losses import label_rows, loss_sum
from headstart.training.preflight import check_early
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", mixed_rows(40))


def metrics(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [learned(line) for line in map(json.loads, lines) if line.pop("kind") == kind]


@pytest.mark.parametrize("kind", kinds())
def test_the_target_is_the_original_again_afterwards(kind, tmp_path, data):
    before = {name: value.clone() for name, value in tiny_target().model.state_dict().items()}
    loss = {"steps": tiny_head(tiny_target(), kind).max_depth or 2}
    target = run(tmp_path / "run", data, JOINT, kind, loss=loss)
    after = target.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in target.model.parameters())
    adapters = load_file(tmp_path / "run" / "best" / ADAPTER / "adapter_model.safetensors")
    assert any("lora_B" in name and bool(value.any()) for name, value in adapters.items())


def test_the_extra_loss_is_the_divergence_from_the_original():
    """The gradient of the whole objective, against plain autograd over everything at once."""
    target = tiny_target()
    head = tiny_head(target)
    tokens = [list(range(3, 17)), list(range(20, 29))]
    batch = Corpus([(row, [(4, len(row))]) for row in tokens]).batch([0, 1])
    values = {"output": "x"}
    recipe = recipe_for(Path("x"), Path("y"), JOINT | {"keep": 0.7}, train=values)
    original_BTD = target.forward(batch.tokens_BT, lengths_B=batch.lengths_B).lm_head_input_BTD
    teacher = JointLoraTeacher(recipe.joint, recipe, head)
    for weight in teacher.parameters.values():  # away from the start, where all is zero
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(5))

    def gradients(objective: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(objective, list(teacher.parameters.values())))

    output = teacher.forward(batch)
    hidden = head.unroll(output, batch.tokens_BT, 2)
    loss = loss_sum(recipe.loss, head, output, hidden, batch)
    extra_loss = teacher.extra_loss(output, batch)
    assert (teacher.extra_loss_name, teacher.extra_loss_weight) == ("divergence", 0.7)
    found = gradients(loss.total / 10 + teacher.extra_loss_weight * extra_loss / 8)

    output = teacher.forward(batch)
    hidden = head.unroll(output, batch.tokens_BT, 2)
    part = loss_sum(recipe.loss, head, output, hidden, batch)
    p = target.unembed(original_BTD).log_softmax(-1)
    q = target.unembed(output.lm_head_input_BTD).log_softmax(-1)
    rows_BT = torch.zeros(q.shape[:2])
    for row, length in enumerate(map(len, tokens)):
        rows_BT[row, 3 : length - 1] = 1  # their next token is of the answer
    divergence = ((p.exp() * (p - q)).sum(-1) * rows_BT).sum()
    assert len(label_rows(batch)) == int(rows_BT.sum())
    torch.testing.assert_close(extra_loss, divergence, rtol=1e-4, atol=1e-5)
    expected = gradients(part.total / 10 + 0.7 * divergence / 8)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert any(bool(one.any()) for one in found)
    teacher.close()


def test_a_larger_weight_keeps_it_nearer_and_the_head_learns_more_than_alone(tmp_path, data):
    found = {}
    for keep in (0.0, 100.0):
        run(tmp_path / str(keep), data, JOINT | {"keep": keep}, train={"steps": 30})
        found[keep] = metrics(tmp_path / str(keep), "eval")[-1]
    # Alone: adapters that start in the last step.
    run(tmp_path / "alone", data, JOINT | {"start": 0.99}, train={"steps": 30})
    alone = metrics(tmp_path / "alone", "eval")[-1]
    assert alone["holdout_divergence"] < 1e-4
    assert found[100.0]["holdout_divergence"] < 0.2 * found[0.0]["holdout_divergence"]
    assert found[0.0]["holdout_loss"] < alone["holdout_loss"]


def test_until_its_start_the_head_learns_as_if_alone(tmp_path, data):
    run(tmp_path / "late", data, JOINT | {"start": 0.5})
    target = tiny_target()
    values = recipe_for(tmp_path / "frozen", data, JOINT).model_dump(exclude_none=True)
    del values["joint"]
    train(make_recipe(values), target=target, head=tiny_head(target))
    late, frozen = (metrics(tmp_path / name, "train") for name in ("late", "frozen"))
    for one, other in zip(late[: STEPS // 2], frozen, strict=False):
        assert one.pop("divergence") == 0
        assert one == pytest.approx(other, rel=1e-4)
    assert late[-1]["divergence"] > 0


@pytest.mark.parametrize("recompute", [False, True])
def test_it_resumes_where_it_was_stopped(recompute, tmp_path, data):
    sections = {"loss": {"recompute": recompute}}
    run(tmp_path / "whole", data, JOINT, **sections)

    def stop(at) -> None:
        if at.kind == "train" and at.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    target = tiny_target()
    recipe = recipe_for(tmp_path / "cut", data, JOINT, **sections)
    with pytest.raises(Interrupted):
        train(recipe, target=target, head=tiny_head(target), log=stop)
    sections["train"] = {"resume": True}
    run(tmp_path / "cut", data, JOINT, **sections)
    assert metrics(tmp_path / "whole", "train") == metrics(tmp_path / "cut", "train")
    for name in ("model.safetensors", f"{ADAPTER}/adapter_model.safetensors"):
        whole, cut = (load_file(tmp_path / one / "best" / name) for one in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_recomputation_changes_nothing(tmp_path, data):
    for recompute in (False, True):
        run(tmp_path / str(recompute), data, JOINT, loss={"recompute": recompute})
    kept, again = (metrics(tmp_path / str(one), "train") for one in (False, True))
    for one, other in zip(kept, again, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_two_processes_learn_what_one_learns(tmp_path, data):
    run(tmp_path / "one", data, JOINT)
    done = run_together(2, "joint_worker.py", tmp_path / "two", data)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (metrics(tmp_path / name, "train") for name in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_it_is_a_model_of_its_own_that_is_kept_exactly(dtype, tmp_path, capsys):
    source = save(tmp_path / "target", context=256)
    original = load_target(source, dtype=torch.float32)
    if dtype == torch.bfloat16:
        original.model.to(dtype).save_pretrained(source)
        original = load_target(source, dtype=torch.float32)
    vocabulary = original.vocab_size
    rows = [[token % vocabulary for token in row] for row in mixed_rows(20)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = recipe_for(tmp_path / "run", data, JOINT | {"keep": 0.1}, train={"steps": 20})
    train(recipe, target=original, head=tiny_head(original))
    best = tmp_path / "run" / "best"
    with pytest.raises(ValueError, match=r"trained jointly with its target.*headstart fuse"):
        load_head(best, load_target(source))

    fuse(source, best, tmp_path / "fused")
    target, head = load_fused(tmp_path / "fused", dtype=torch.float32)
    assert target_hash(target) != target_hash(original)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    text_BT = torch.tensor([rows[0]])
    changed = target.forward(text_BT).logits_BTV
    assert not torch.allclose(changed, original.forward(text_BT).logits_BTV, atol=1e-2)
    merge(original.model, best)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    expected = wrap_target(original.model).forward(text_BT).logits_BTV
    torch.testing.assert_close(changed, expected, rtol=0, atol=tolerance)

    card = (tmp_path / "fused" / "README.md").read_text()
    assert "CHANGED jointly with the head (LoRA of rank 4; on held-out responses" in card
    assert read_head_file(tmp_path / "fused").meta.joint.divergence > 0
    results = benchmark(
        target, {"ours": SpeculativeConfig(head)}, [rows[0], rows[1]], max_new_tokens=24
    )
    assert results["ours"].identical == results[AUTOREGRESSIVE].prompts == 2


def test_damaged_adapters_are_refused(tmp_path):
    source = save(tmp_path / "target", context=256)
    target = load_target(source)
    data = write_rows(tmp_path / "rows.jsonl", [[1 + i % 20 for i in range(12)]] * 12)
    train(recipe_for(tmp_path / "run", data, JOINT), target=target, head=tiny_head(target))
    (tmp_path / "run" / "best" / ADAPTER / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"adapters in .* do not fit their target"):
        fuse(source, tmp_path / "run" / "best", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"features": "f"}}, r"data.features is f.*needs data.features=null"),
        ({"parallel": {"engine": "fsdp2"}}, r"parallel.engine is fsdp2"),
        ({"parallel": {"target": "sharded"}}, r"parallel.target is sharded"),
    ],
)
def test_what_cannot_be_is_refused_early(changes, message, tmp_path, data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    values = recipe_for(tmp_path / "run", data, JOINT).model_dump(exclude_none=True)
    for section, settings in changes.items():
        values[section] = values.get(section, {}) | settings
    with pytest.raises(ValueError, match=message):
        check_early(make_recipe(values))


def test_layers_that_do_not_exist_are_named(tmp_path, data):
    with pytest.raises(ValueError, match=r"no layers to adapt.*conv9"):
        run(tmp_path / "run", data, JOINT | {"modules": ["conv9"]})


def test_it_is_not_evaluated_by_decoding(tmp_path, data):
    target = tiny_target()
    with pytest.raises(ValueError, match=r"leave `evaluate` out"):
        train(
            recipe_for(tmp_path / "run", data, JOINT),
            target=target,
            head=tiny_head(target),
            evaluate=lambda head: {"acceptance_length": 1.0},
        )
