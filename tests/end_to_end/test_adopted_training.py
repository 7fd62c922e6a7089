"""A head that came with its target is trained on several steps, on answers of the target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from mtp_checkpoints import FAMILIES, GLM, write
from processes import TORCHRUN, launch
from safetensors.torch import load_file, save_file
from tiny_run import mixed_rows, skip_without_deepspeed, write_rows
from torch import Tensor

from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import read_head_file
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.scripts.options.recipe import run_recipe
from headstart.training.config.schema import make_recipe

VOCAB, FIRST = 96, "model-00001-of-00002.safetensors"


def certain(folder: Path) -> None:
    """Rewrite a target so that it is sure of what comes next, and every token follows another."""
    tensors = load_file(folder / FIRST)
    for name, tensor in tensors.items():
        if "o_proj" in name or "out_proj" in name or "down_proj" in name:
            tensor.zero_()
    embedding_VD = tensors["model.embed_tokens.weight"]
    follower_V = (torch.arange(VOCAB) + 7) % VOCAB
    scale = embedding_VD.float().norm(dim=1, keepdim=True)
    tensors["lm_head.weight"][follower_V] = (4 * embedding_VD / scale).to(embedding_VD.dtype)
    save_file(tensors, folder / FIRST, metadata={"format": "pt"})


def answers(target: Target, rows: int) -> list[list[int]]:
    """What the target says after each of the first tokens, greedily."""
    prompts_BT = torch.arange(rows)[:, None] + torch.zeros(1, 1, dtype=torch.long)
    said = target.model.generate(
        prompts_BT,
        attention_mask=torch.ones_like(prompts_BT),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
    )
    return said.tolist()


@pytest.mark.parametrize("name", ["mimo", "glm4_moe", "glm_moe_dsa", "qwen3_next", "qwen3_5_text"])
def test_a_layer_of_one_step_learns_the_later_ones(name: str, tmp_path: Path) -> None:
    """Trained for one step, as families publish it, its later guesses are worth half; trained on
    for three they are right, and the checkpoint carries them."""
    write(name, tmp_path / "fresh")
    certain(tmp_path / "fresh")
    if FAMILIES[name].copies:
        copy_lm_head(tmp_path / "fresh")
    one = trained_on(tmp_path / "fresh", tmp_path / "one", steps=1)
    fuse(tmp_path / "fresh", one, tmp_path / "published", native=True)
    three = trained_on(tmp_path / "published", tmp_path / "three", steps=3)
    lines = [json.loads(line) for line in (tmp_path / "three" / "metrics.jsonl").open()]
    figures = [line for line in lines if "acceptance_rate_3" in line]
    before, after = figures[0], figures[-1]
    assert before["acceptance_rate_1"] > 0.9
    for step in (2, 3):
        assert before[f"acceptance_rate_{step}"] < 0.7
        assert after[f"acceptance_rate_{step}"] > 0.95
    assert after["acceptance_length_t0"] > before["acceptance_length_t0"] + 0.7
    meta = read_head_file(three).meta
    assert meta.start == str(tmp_path / "three-adopted") and meta.steps == 3
    fuse(tmp_path / "published", three, tmp_path / "better", native=True)
    assert written(tmp_path / "published", tmp_path / "better", FAMILIES[name].prefix)
    _, head = load_fused(tmp_path / "better")
    assert head.taps == ((1,) if name == "mimo" else ())


def trained_on(model: Path, out: Path, steps: int) -> Path:
    """Adopt the layer of a checkpoint and train it for so many steps; the best head."""
    adopted = out.with_name(out.name + "-adopted")
    adopt(model, adopted)
    target = load_target(model)
    data = write_rows(out.with_name(out.name + ".jsonl"), answers(target, VOCAB), start=1)
    values = {
        "target": {"name": str(model), "dtype": "float32"},
        "head": {"kind": "mtp"},
        "data": {"path": str(data), "max_length": 32, "global_batch_tokens": 512, "holdout": 8},
        "loss": {"kind": "lk", "steps": steps, "finish": "e2e_tv", "finish_part": 0.3},
        "train": {
            "output": str(out), "start_from": str(adopted), "steps": 40, "lr": 5e-3,
            "precision": "float32", "log_every": 1,
        },
        "eval": {"prompts": None},
    }  # fmt: skip
    return run_recipe(make_recipe(values), target)


def copy_lm_head(folder: Path) -> None:
    """The published copy of the LM head is the target's."""
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors[GLM + "shared_head.head.weight"] = load_file(folder / FIRST)["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def written(before: Path, after: Path, prefix: str) -> bool:
    """Whether two checkpoints differ in the layer, and there only."""
    different: set[str] = set()
    for file in sorted(before.glob("*.safetensors")):
        old: dict[str, Tensor] = load_file(file)
        new = load_file(after / file.name)
        different |= {name for name in old if not torch.equal(old[name], new[name])}
    assert not any("indexer" in name for name in different)  # which drafts do not use
    return bool(different) and all(name.startswith(prefix) for name in different)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_two_processes_train_what_one_does(engine: str, tmp_path: Path) -> None:
    """A layer of the family has weights of three dimensions, and buffers that are not kept."""
    skip_without_deepspeed(engine)
    write("glm4_moe", tmp_path / "model")
    adopt(tmp_path / "model", tmp_path / "head")
    values = {
        "target": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "head": {"kind": "mtp"},
        "data": {
            "path": str(write_rows(tmp_path / "data.jsonl", mixed_rows(24))),
            "max_length": 32, "global_batch_tokens": 64,
        },
        "loss": {"steps": 2},
        "train": {
            "output": str(tmp_path / "alone"), "start_from": str(tmp_path / "head"), "steps": 4,
            "lr": 1e-3, "precision": "float32",
        },
        "eval": {"prompts": None},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    train = ("-m", "headstart.scripts.cli", "train", tmp_path / "recipe.yaml")
    here = (f"parallel.engine={engine}", f"train.output={tmp_path / 'pair'}")
    done = launch("-m", *TORCHRUN, 2, *train, *here)
    assert done.returncode == 0, done.stderr[-4000:]
    run_recipe(make_recipe(values))
    ours, theirs = (
        load_file(tmp_path / run / "state" / "state.safetensors") for run in ("pair", "alone")
    )
    heads = [name for name in theirs if name.startswith("head.")]
    assert any("experts" in name for name in heads)
    for name in heads:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=3e-5)
