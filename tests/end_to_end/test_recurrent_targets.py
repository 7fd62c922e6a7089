"""Targets with recurrent layers in all that is done with a target: training, fusing, the commands.

How they decode: test_recurrent_targets.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chat_model import tokenizer
from families import BASE, SPREAD, build, prompts
from mtp_checkpoints import FAMILIES as MTP
from mtp_checkpoints import random_layer, write
from recurrent_decoding import NEW_TOKENS, SETTINGS, answers
from run_command import refused, run
from safetensors.torch import load_file, save_file
from tiny_run import write_rows
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from headstart.inference import SpeculativeModel
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import load_head, save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads import mtp
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target
from headstart.scripts.options.recipe import run_recipe
from headstart.training.config.schema import make_recipe


@pytest.mark.parametrize("kind", ["mtp", "eagle3", "medusa"])
def test_a_head_is_trained_on_such_a_target(kind: str, tmp_path: Path) -> None:
    build("qwen3_5_text", SETTINGS["qwen3_5_text"]).save_pretrained(tmp_path / "model")
    target = load_target(tmp_path / "model")
    rows = [text.tolist() for text in prompts([12, 9, 14, 11, 8, 13])]
    values = {
        "target": {"name": str(tmp_path / "model"), "dtype": "float32"},
        "head": {"kind": kind},
        "data": {
            "path": str(write_rows(tmp_path / "data.jsonl", rows, start=1)),
            "max_length": 32, "global_batch_tokens": 64, "holdout": 1,
        },
        "loss": {"steps": 4},
        "train": {
            "output": str(tmp_path / "run"), "steps": 6, "lr": 1e-2, "precision": "float32",
        },
        "eval": {"prompts": None},
    }  # fmt: skip
    best = run_recipe(make_recipe(values), target)
    head = load_head(best, target)
    ids_1T = prompts([7])[0][None]
    steps = decode(
        target, ids_1T, sampling=SamplingParams(NEW_TOKENS), speculative=SpeculativeConfig(head)
    )
    options: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = target.model.generate(ids_1T, **options)[0, ids_1T.shape[1] :].tolist()
    assert answers(steps)[0] == expected


def test_a_fused_folder_brings_no_code_that_takes_guesses_back(tmp_path: Path) -> None:
    write("qwen3_5_text", tmp_path / "model")
    target = load_target(tmp_path / "model")
    save_head(make_head(target, "mtp", {}), tmp_path / "head", HeadMeta(target="tiny"))
    fuse(tmp_path / "model", tmp_path / "head", tmp_path / "fused")
    assert not (tmp_path / "fused" / "custom_generate").exists()
    model = SpeculativeModel.from_pretrained(tmp_path / "fused")
    assert model.target.recurrent
    adopt(tmp_path / "model", tmp_path / "adopted")
    with pytest.raises(ValueError, match="without the index"):
        fuse(tmp_path / "model", tmp_path / "adopted", tmp_path / "listed", index=True)


def test_norms_that_are_held_otherwise_are_not_written(tmp_path: Path) -> None:
    write("qwen3_5_text", tmp_path / "model")
    target = load_target(tmp_path / "model")
    save_head(make_head(target, "mtp", {}), tmp_path / "head", HeadMeta(target="tiny"))
    with pytest.raises(ValueError, match="are zero-centred, unlike"):
        fuse(tmp_path / "model", tmp_path / "head", tmp_path / "out", native=True)
    assert not (tmp_path / "out").exists()


def test_a_fresh_head_starts_with_the_scale_of_the_final_norm(tmp_path: Path) -> None:
    """Whether it holds that as such or less 1."""
    write("qwen3_5_text", tmp_path / "model")
    target = load_target(tmp_path / "model", dtype=torch.float32)
    states_1TD = torch.randn(1, 3, target.hidden_size)
    expected = target.model.model.norm(states_1TD)
    for zero_centred in (False, True):
        head = make_head(target, "mtp", {"zero_centred": zero_centred})
        assert isinstance(head, mtp.Head)
        head.init_from_target()
        torch.testing.assert_close(head.norm(states_1TD), expected)


def test_the_commands(tmp_path: Path, wide: None) -> None:
    """What decodes does so with chains, unless a tree was asked for."""
    made = tokenizer()
    settings = {"vocab_size": len(made), "eos_token_id": made.eos_token_id}
    build("qwen3_next", SETTINGS["qwen3_next"] | settings).save_pretrained(tmp_path / "model")
    made.save_pretrained(tmp_path / "model")
    lines = [{"id": f"p{n}", "prompt": "say " + "ab" * n} for n in range(1, 6)]
    prompted = tmp_path / "prompts.jsonl"
    prompted.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = ("--target", tmp_path / "model", "--out", tmp_path / "answers.jsonl")
    run("data", prompted, *told, "--max-new-tokens", 16)
    recipe = {
        "target": {"name": str(tmp_path / "model")},
        "head": {"kind": "mtp"},
        "data": {
            "path": str(tmp_path / "answers.jsonl"),
            "max_length": 64,
            "global_batch_tokens": 256,
        },
        "loss": {"steps": 2},
        "train": {"output": str(tmp_path / "run"), "steps": 2, "precision": "float32"},
        "eval": {"prompts": str(prompted), "count": 2, "max_new_tokens": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run("train", tmp_path / "recipe.yaml")
    run("fuse", tmp_path / "model", tmp_path / "run" / "best", tmp_path / "fused")
    out = ("--out", tmp_path / "figures.json")
    few = ("--prompts", prompted, "--limit", 2, "--max-new-tokens", 12)
    run("eval", tmp_path / "fused", *few, *out)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["results"]["mtp"]["identical"] == figures["results"]["mtp"]["prompts"] == 2
    assert figures["configs"]["mtp"]["width"] == 1
    fast = run("generate", tmp_path / "fused", "tell me", "--max-new-tokens", 12).output
    plainly = ("--plain", "--max-new-tokens", 12)
    slow = run("generate", tmp_path / "fused", "tell me", *plainly).output
    assert fast.splitlines()[1] == slow.splitlines()[1]
    said = refused("generate", tmp_path / "fused", "tell me", "--budget", "8/4/3")
    assert "state cannot branch" in said and "--budget 5/4/1" in said


def test_the_text_part_of_a_model_for_images(tmp_path: Path) -> None:
    """Qwen3.5 is published so: its tensors have longer names, those of the layer do not."""
    layer = write_with_images(tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    head = adopt(tmp_path / "model", tmp_path / "head")
    assert torch.equal(head.enorm.weight.bfloat16(), layer["pre_fc_norm_embedding.weight"])
    fuse(tmp_path / "model", tmp_path / "head", tmp_path / "fused", native=True)
    file = "model.safetensors"
    assert (tmp_path / "fused" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    model = SpeculativeModel.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    ids_1T = prompts([9])[0][None]
    options: Any = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = whole.generate(ids_1T, **options)
    assert torch.equal(model.generate(ids_1T, **options), expected)


def write_with_images(folder: Path) -> dict[str, Tensor]:
    images = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    images |= {"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16}
    marks = {"image_token_id": 90, "video_token_id": 91}
    marks |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
    text = BASE | SETTINGS["qwen3_5_text"]
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=images, **marks)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, SPREAD)
    model.bfloat16().save_pretrained(folder)
    tensors, layer = load_file(folder / "model.safetensors"), random_layer(MTP["qwen3_5_text"], 0)
    assert "model.language_model.embed_tokens.weight" in tensors
    tensors |= {f"mtp.{name}": tensor for name, tensor in layer.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return layer
