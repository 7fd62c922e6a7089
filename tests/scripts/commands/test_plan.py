"""`headstart plan`: sizes from configurations alone, and memory as a real step takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from run_command import refused, run
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from headstart.model.heads.common.base import make_head
from headstart.model.target.load import wrap_target
from headstart.scripts.benchmarks.loss_memory import peak_bytes
from headstart.scripts.commands.plan import shapes
from headstart.training import cost_estimate as estimate
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.data.batching import Batch
from headstart.training.objective.joint_lora import JointLoraTeacher
from headstart.training.objective.losses import loss_sum
from headstart.training.optim.optimizers import make_optimizers

VOCAB, HIDDEN = 4000, 192


def llama(layers: int = 4) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def folder_of(config, folder: Path) -> Path:
    config.architectures = None
    config.save_pretrained(folder)  # no weights: none are read
    return folder


def recipe_for(target: Path, **sections) -> Recipe:
    values = {
        "target": {"name": str(target), "dtype": "float32"},
        "head": {"kind": "eagle3"},
        "data": {"path": "answers.jsonl", "max_length": 512, "global_batch_tokens": 2048},
        "loss": {"steps": 3, "chunk_rows": 128},
        "train": {"output": "run", "precision": "float32"},
        "parallel": {"engine": "ddp"},
    }
    return make_recipe({name: values[name] | sections.get(name, {}) for name in values})


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("length", [128, 512, 1024])
def test_memory_is_what_a_step_takes(tmp_path, kind, recompute, length):
    config = llama()
    recipe = recipe_for(
        folder_of(config, tmp_path),
        head={"kind": kind},
        data={"max_length": length},
        loss={"recompute": recompute},
    )
    target, head = shapes(recipe)
    parts = estimate.memory(recipe, target, head, processes=1)
    # Measured: what a step holds beside the weights of target and head.
    real = wrap_target(LlamaForCausalLM(config))
    real_head = make_head(real, kind, {})
    real_head.recompute = recompute
    optimizers = make_optimizers(real_head, recipe.train)
    tokens_BT = torch.randint(0, VOCAB, (2048 // length, length))
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    batch = Batch(tokens_BT, torch.full((2048 // length,), length), mask_BT)

    def step() -> None:
        seen = real.forward(tokens_BT, taps=real_head.taps, logits=False)
        hidden = real_head.unroll(seen, tokens_BT, 3)
        loss_sum(recipe.loss, real_head, seen, hidden, batch).total.backward()
        for optimizer in optimizers:
            optimizer.step()

    measured = peak_bytes(step, real.device)
    expected = sum(
        value for name, value in parts.items() if name not in ("head: weights", "target: weights")
    )
    # It may be too careful, but hardly too hopeful.
    assert 0.7 < measured / expected < 1.1, (measured, parts)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_joint_training_is_what_is_measured(recompute, tmp_path):
    config = llama(layers=8)
    sections = {"data": {"max_length": 256}, "loss": {"recompute": recompute}}
    recipe = recipe_for(folder_of(config, tmp_path), **sections)
    recipe = make_recipe(recipe.model_dump(exclude_none=True) | {"joint": {"rank": 8}})
    parts = estimate.memory(recipe, *shapes(recipe), processes=1)
    real = wrap_target(LlamaForCausalLM(config))
    head = make_head(real, "eagle3", {})
    head.recompute = recompute
    teacher = JointLoraTeacher(recipe.joint, recipe, head)
    optimizers = make_optimizers(head, recipe.train, teacher.parameters.values())
    tokens_BT = torch.randint(0, VOCAB, (8, 256))
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    batch = Batch(tokens_BT, torch.full((8,), 256), mask_BT)

    def step() -> None:
        output = teacher.forward(batch)
        hidden = head.unroll(output, tokens_BT, 3)
        loss = loss_sum(recipe.loss, head, output, hidden, batch)
        extra_loss = teacher.extra_loss(output, batch)
        (loss.total + teacher.extra_loss_weight * extra_loss).backward()
        for optimizer in optimizers:
            optimizer.step()

    measured = peak_bytes(step, real.device)
    there = ("head: weights", "target: weights")
    expected = sum(value for name, value in parts.items() if name not in there)
    assert 0.7 < measured / expected < 1.1, (measured, parts)
    frozen = make_recipe(recipe.model_dump(exclude_none=True, exclude={"joint"}))
    without = estimate.flops_per_token(frozen, *shapes(frozen))
    assert estimate.flops_per_token(recipe, *shapes(recipe)) > 1.3 * without


def test_sizes_are_those_of_the_model(tmp_path):
    recipe = recipe_for(folder_of(llama(), tmp_path))
    target, head = shapes(recipe)
    parts = estimate.memory(recipe, target, head, processes=1)
    model = LlamaForCausalLM(llama())
    whole = sum(one.numel() for one in model.parameters())
    assert parts["target: weights"] == 4 * whole
    numbers = sum(one.numel() for one in make_head(wrap_target(model), "eagle3", {}).parameters())
    assert parts["head: weights"] == parts["head: gradients"] == 4 * numbers
    assert parts["head: optimizer"] == 8 * numbers


@pytest.mark.parametrize("engine", list(estimate.SHARDED))
def test_what_an_engine_spreads(tmp_path, engine):
    target = folder_of(llama(), tmp_path)
    alone = recipe_for(target)
    spread = recipe_for(target, parallel={"engine": engine, "target": "sharded"})
    one = estimate.memory(alone, *shapes(alone), processes=1)
    eight = estimate.memory(spread, *shapes(spread), processes=8)
    for name in ("weights", "gradients", "optimizer"):
        share = 8 if name in estimate.SHARDED[engine] else 1
        assert eight[f"head: {name}"] == one[f"head: {name}"] / share
    assert eight["target: weights"] < one["target: weights"]
    assert eight["head: kept for the backward pass"] < one["head: kept for the backward pass"]


def test_what_a_target_takes_by_how_it_is_held(tmp_path):
    folder = folder_of(llama(), tmp_path)
    model = LlamaForCausalLM(llama())
    whole = sum(one.numel() for one in model.parameters())
    layers = [one for one in model.model.layers.parameters() if one.dim() == 2]
    inside, largest = sum(one.numel() for one in layers), max(one.numel() for one in layers)
    plain = recipe_for(folder)
    one = estimate.memory(plain, *shapes(plain), processes=1)

    shared = recipe_for(folder, parallel={"target": "tensor_parallel"})
    four = estimate.memory(shared, *shapes(shared), processes=4)
    assert four["target: weights"] == pytest.approx(4 * (whole - inside * 3 / 4))
    # Every process reads the whole batch: 2,048 tokens, and keeps its 512 of them.
    assert four["target: one layer at work"] == one["target: one layer at work"]
    assert four["target: features"] == one["target: features"] * (2048 + 512) / 2048
    assert four["head: kept for the backward pass"] < one["head: kept for the backward pass"] / 3

    for kind, size in (("int8", 1), ("float8", 1), ("nf4", 0.525)):
        values = plain.model_dump(exclude_none=True)
        held = make_recipe(values | {"target": values["target"] | {"quantize": kind}})
        found = estimate.memory(held, *shapes(held), processes=1)
        expected = 4 * (whole - inside + largest) + size * inside
        assert found["target: weights"] == pytest.approx(expected)
        assert found["target: features"] == one["target: features"]


def test_of_experts_only_the_chosen_ones_count(tmp_path):
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    recipe = recipe_for(folder_of(config, tmp_path))
    target, head = shapes(recipe)
    all_experts = 2 * 8 * 3 * 64 * 256
    matrices = sum(
        one.numel() for layer in target.layers for one in layer.parameters() if one.dim() > 1
    )
    assert matrices > all_experts
    active = estimate.flops_per_token(recipe, target, head)
    config.num_experts_per_tok = 8
    recipe = recipe_for(folder_of(config, tmp_path / "all"))
    everything = estimate.flops_per_token(recipe, *shapes(recipe))
    assert everything - active == pytest.approx(2 * all_experts * 6 / 8)


def test_the_command(tmp_path):
    target = folder_of(llama(), tmp_path / "target")
    data = tmp_path / "answers.jsonl"
    lines = [{"tokens": list(range(n)), "spans": [[1, n]]} for n in (10, 20, 900)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [f"target.name={target}", "data.max_length=512", "data.global_batch_tokens=2048"]
    command = ["plan", "qwen3-8b_eagle3", *settings, "head.draft_vocab=500"]
    counted = run(*command, f"data.path={data}", "--gpus", 2, "--price", 3)
    figures = json.loads(counted.output.splitlines()[-1])
    assert figures["fits"] is True
    epochs = 5
    assert figures["hours"] * 3600 * figures["tokens_per_second"] == pytest.approx(542 * epochs)
    assert "data is not here to be counted" in refused(*command, "data.path=nowhere.jsonl")
    assert "--tokens is '3x'" in refused(*command, "--tokens", "3x")
    assert "There is no GPU 'tpu'" in refused(*command, "--gpu", "tpu")
    told = run(*command, "--tokens", "300M").output
    assert json.loads(told.splitlines()[-1])["hours"] == pytest.approx(
        3e8 * epochs / figures["tokens_per_second"] * 2 / 3600
    )


def test_what_does_not_fit_says_what_would(tmp_path):
    config = llama()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads, config.num_key_value_heads = 64, 8
    target = folder_of(config, tmp_path / "target")  # the shape of a 70B model
    command = ["plan", "qwen3-8b_eagle3", f"target.name={target}", "head.draft_vocab=500"]
    command += ["--tokens", "10M", "--gpus", "8"]
    result = run(*command, ok=False)
    assert result.exit_code == 1
    assert "parallel.target=sharded it takes" in " ".join(result.output.split())
    assert json.loads(result.output.splitlines()[-1])["fits"] is False
    assert run(*command, "parallel.target=sharded", "parallel.engine=fsdp2").exit_code == 0
    assert run(*command, "parallel.target=tensor_parallel").exit_code == 0
    smaller = [*command, "--gpu", "h200"]  # the target alone takes 141 GB in its own type
    assert "target.quantize=float8 it takes" in " ".join(run(*smaller, ok=False).output.split())
    alone = [*command[:-1], "1", "loss.recompute=true"]
    assert run(*alone, "target.quantize=nf4").exit_code == 0
