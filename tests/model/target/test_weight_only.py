"""Targets held in 8 or 4 bits: less memory, nearly the same states, a head for the own weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import chat_model
import pytest
import torch
from families import FAMILIES, build
from tiny_run import mixed_rows, write_rows

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import read_head_file
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.scripts.options.recipe import run_recipe
from headstart.training.config.schema import Recipe, load_recipe
from headstart.training.preflight import check_early

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
BITS = {"int8": 8, "float8": 8, "nf4": 4}
# Relative (rms): of a weight, and of the last hidden states behind two layers of random weights,
# which forgive less than trained ones. Measured: 0.007, 0.026, 0.09; and 0.03, 0.12, 0.46.
WEIGHT_ERRORS = {"int8": 0.012, "float8": 0.035, "nf4": 0.12}
STATE_ERRORS = {"int8": 0.05, "float8": 0.18, "nf4": 0.6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return chat_model.save(tmp_path_factory.mktemp("target"))


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square, relative."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).norm() / theirs.norm())


def held_bytes(weight: torch.Tensor) -> int:
    """Memory of a weight, with the scales of a quantised one."""
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        return weight.numel() * weight.element_size()
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(held_bytes(getattr(weight, name)) for name in names)


def recipe(folder: Path, target: Path, *settings: str) -> Recipe:
    data = write_rows(folder / "data.jsonl", mixed_rows(24))
    file = chat_model.write_recipe(folder / "recipe.yaml", target, data, folder / "run", steps=4)
    return load_recipe(file, [*settings, "data.holdout=4"])


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BITS)
def test_layers_take_less_memory_and_say_nearly_the_same(folder, kind, dtype):
    plain = load_target(folder, dtype=dtype, device="cpu")
    held = load_target(folder, dtype=dtype, device="cpu", weight_only=kind)
    for ours, theirs in zip(held.layers, plain.layers, strict=True):
        matrices = sum(one.numel() for one in theirs.parameters() if one.dim() == 2)
        norms = sum(one.numel() for one in theirs.parameters() if one.dim() == 1)
        whole = sum(held_bytes(one) for one in ours.parameters())
        stored = whole - norms * dtype.itemsize
        assert matrices * BITS[kind] / 8 < stored < 1.25 * matrices * BITS[kind] / 8
    for part in (Target.embed, Target.unembed):  # both ends are as they were
        given = torch.arange(20) if part is Target.embed else torch.randn(3, 32, dtype=dtype)
        torch.testing.assert_close(part(held, given), part(plain, given))
    assert target_hash(held) == target_hash(plain)
    ids_BT = torch.arange(60).reshape(3, 20)
    states = [one.forward(ids_BT, logits=False).lm_head_input_BTD for one in (held, plain)]
    assert 1e-3 < difference(*states) < STATE_ERRORS[kind]


@needs_torchao
@pytest.mark.parametrize("kind", BITS)
def test_a_head_learns_from_it_and_is_served_with_the_own_weights(folder, tmp_path, kind):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "abc"}) + "\n")
    decoding = (f"eval.prompts={prompts}", "eval.max_new_tokens=8")
    longer = ("train.steps=40", "train.lr=3e-3")
    best = run_recipe(recipe(tmp_path, folder, f"target.quantize={kind}", *decoding, *longer))
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 40 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert read_head_file(best).meta.weight_only == kind
    fuse(folder, best, tmp_path / "fused")
    assert f"weight-only: {kind}" in (tmp_path / "fused" / "README.md").read_text()
    target, head = load_fused(tmp_path / "fused", device="cpu")
    assert target.weight_only is None and head.kind == "mtp"


@needs_torchao
def test_a_fresh_head_takes_over_a_layer_that_is_held_in_bits(folder):
    plain = load_target(folder, device="cpu")
    for kind, error in WEIGHT_ERRORS.items():
        held = load_target(folder, device="cpu", weight_only=kind)
        heads = [make_head(one, "mtp", {}) for one in (held, plain)]
        for head in heads:
            head.init_from_target()
        ours, theirs = (dict(head.named_parameters()) for head in heads)
        taken = [name for name in ours if "layer." in name and name.endswith("_proj.weight")]
        assert len(taken) == 7
        for name in taken:
            assert error / 4 < difference(ours[name], theirs[name]) < error


@needs_torchao
def test_features_of_another_quantisation_are_refused(folder, tmp_path):
    from headstart.training.data import hidden_states as store
    from headstart.training.data.conversations import read_conversations

    made = recipe(tmp_path, folder)
    plain = load_target(folder, device="cpu")
    data = read_conversations(made.data, plain, 0)
    wanted = store.wanted(data, plain, (0,), None)
    store.write_features(tmp_path / "seen", wanted, data, plain, batch_tokens=64, shard_bytes=10**6)
    held = load_target(folder, device="cpu", weight_only="float8")
    with pytest.raises(ValueError, match=r"another target\.quantize"):
        store.Features(tmp_path / "seen", store.wanted(data, held, (0,), None))


def test_what_does_not_go_together(folder, tmp_path, monkeypatch):
    for how in ("sharded", "tensor_parallel"):
        with pytest.raises(ValueError, match=f"parallel.target={how} exclude each other"):
            recipe(tmp_path, folder, "target.quantize=float8", f"parallel.target={how}")
    with pytest.raises(ValueError, match=r"target\.quantize"):
        recipe(tmp_path, folder, "target.quantize=int3")
    with pytest.raises(ValueError, match="not for a random one"):
        recipe(tmp_path, folder, "target={random: {model_type: llama}, quantize: int8}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torchao is not installed.*headstart\[cluster\]"):
        check_early(recipe(tmp_path, folder, "target.quantize=float8"))


@needs_torchao
def test_what_cannot_be_quantised_says_so(tmp_path):
    FAMILIES["mixtral"]().save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"in the layers of .*experts are in linear layers"):
        load_target(tmp_path / "experts", device="cpu", weight_only="float8")
    with pytest.raises(ValueError, match="exclude each other"):
        load_target(tmp_path / "experts", quantize="int8", weight_only="int8")
    odd = build("llama", {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2})
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match="which blocks of 64 do not divide"):
        load_target(tmp_path / "odd", device="cpu", weight_only="nf4")
