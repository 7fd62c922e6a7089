"""`headstart export`: the command, the verifier, and unsupported heads and targets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mtp_checkpoints
import pytest
import torch
from export_cases import CASES, fused, random_head, write_plain
from families import FAMILIES
from run_command import refused, run
from safetensors.torch import load_file

from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.export.vllm_sglang import export
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def target(plain: Path) -> Target:
    return load_target(plain, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def pruned(plain: Path, target: Target, tmp_path_factory) -> tuple[DraftHead, Path]:
    head = random_head(target, **CASES["pruned"])
    return head, fused(plain, head, tmp_path_factory.mktemp("pruned"))


def test_the_command_and_the_verifier(pruned, plain, tmp_path):
    _, folder = pruned
    out = tmp_path / "a b"
    printed = run("export", folder, out, "--to", "sglang").output
    assert (
        f"--model-path {folder}" in printed and f"--speculative-draft-model-path '{out}'" in printed
    )
    given = ("export", folder, out, "--to", "vllm", "--format", "speculators")
    run(*given, "--verifier", "owner/name")
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "owner/name"
    run(*given, "--verifier", plain)
    config = json.loads((out / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == str(plain)
    assert "neither a folder nor a Hub id" in refused(*given, "--verifier", tmp_path / "nowhere")
    shutil.copytree(plain, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(
        (plain / "config.json")
        .read_text()
        .replace('"num_hidden_layers": 5', '"num_hidden_layers": 6')
    )
    assert "num_hidden_layers" in refused(*given, "--verifier", tmp_path / "other")
    given = ("export", folder, out, "--to", "sglang")
    assert "num_hidden_layers" in refused(*given, "--verifier", tmp_path / "other")
    assert "is inside" in refused("export", folder, folder / "draft_heads", "--to", "vllm")
    sglang = ("export", folder, out, "--to", "sglang", "--format", "speculators")
    assert "native format" in refused(*sglang)
    assert "not a fused checkpoint" in refused("export", plain, out, "--to", "vllm")


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("medusa", {}, "this one is medusa"),
        ("eagle3", {"window": 4}, "has an attention window"),
        ("eagle3", {"attention_layout": "kvshare"}, "layout"),
        ("eagle3", {"taps": (2,)}, "SGLang leaves out fc"),
        ("mtp", {}, "have no class"),
    ],
)
def test_unsupported_heads_are_an_error(plain, target, tmp_path, kind, settings, reason):
    folder = fused(plain, random_head(target, kind, **settings), tmp_path)
    for engine in ("vllm", "sglang"):
        assert reason in refused("export", folder, tmp_path / "out", "--to", engine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["qk_norm", "attention_bias"])
def test_unsupported_layers_are_an_error(plain, target, tmp_path, option):
    layer = random_head(target).config.layer.model_copy(update={option: True})
    folder = fused(plain, random_head(target, layer=layer.model_dump()), tmp_path)
    assert "queries" in refused("export", folder, tmp_path / "out", "--to", "vllm")


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma", "scales its embeddings"), ("phi", "bias")]
)
def test_unsupported_targets_are_an_error(tmp_path, family, reason):
    FAMILIES[family]().save_pretrained(tmp_path / "plain")
    target = load_target(tmp_path / "plain")
    head = make_head(target, "eagle3", {"taps": (0, 1)})
    folder = fused(tmp_path / "plain", head, tmp_path)
    assert reason in refused("export", folder, tmp_path / "out", "--to", "sglang")


@pytest.mark.parametrize("family", ["glm4_moe", "glm_moe_dsa", "mimo", "qwen3_5_text", "llama"])
def test_mtp_heads_are_pointed_to_fuse_native(tmp_path, family):
    mtp_checkpoints.write(family, tmp_path / "plain")
    adopt(tmp_path / "plain", tmp_path / "head")
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "beside")
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "inside", native=True)
    given = (tmp_path / "out", "--to", "vllm")
    messages = [refused("export", tmp_path / folder, *given) for folder in ("beside", "inside")]
    if family == "llama":  # it has an MTP layer, but engines have no class for one
        assert all("have no class" in one for one in messages)
        return
    assert "HEAD OUT --native" in messages[0]
    assert "serve the folder as it is" in messages[1]


def test_tied_embedding_and_lm_head_are_both_written(tmp_path):
    FAMILIES["llama_tied"]().bfloat16().save_pretrained(tmp_path / "plain")
    target = load_target(tmp_path / "plain")
    folder = fused(tmp_path / "plain", random_head(target, taps=(0, 1)), tmp_path)
    export(folder, tmp_path / "out", "vllm", "speculators")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight = target.model.get_input_embeddings().weight
    assert torch.equal(stored["embed_tokens.weight"], weight)
    assert torch.equal(stored["lm_head.weight"], weight)


def test_other_files_are_not_replaced(pruned, tmp_path):
    _, folder = pruned
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "would be lost" in refused("export", folder, tmp_path / "out", "--to", "vllm")
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["notes.txt"]
