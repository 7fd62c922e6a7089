"""The fused checkpoint: the target's bytes are unchanged, the head's bytes are kept."""

from __future__ import annotations

import errno
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from saved_heads import META, files, random_head
from transformers import AutoModelForCausalLM

from headstart.model.checkpoint.custom_generate.drafting import KINDS
from headstart.model.checkpoint.custom_generate.write import FILES
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.heads.common.base import kinds
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.scripts.options.default_checkpoint import shipped_head


@pytest.mark.parametrize("kind", kinds())
def test_fused_folder_is_the_target_and_the_head(
    sharded_target: Path, target: Target, tmp_path: Path, kind: str
) -> None:
    head = random_head(target, kind)
    save_head(head, tmp_path / "head", META)
    fuse(sharded_target, tmp_path / "head", tmp_path / "out" / "fused")
    out = tmp_path / "out" / "fused"
    assert [path.name for path in out.parent.iterdir()] == ["fused"]  # nothing left beside
    ours, theirs = files(out), files(sharded_target)
    theirs["README.target.md"] = theirs.pop("README.md")
    extra = {"README.md", "draft_heads/config.json", "draft_heads/model.safetensors"}
    extra |= set(FILES) if kind in KINDS else set()  # transformers drafts with these
    assert ours.keys() == theirs.keys() | extra
    assert all(ours[name] == content for name, content in theirs.items())

    again_target, again = load_fused(out)
    assert target_hash(again_target) == target_hash(target)
    assert again.kind == kind and read_head_file(out).meta == META
    assert all(
        torch.equal(tensor, head.state_dict()[name].to(torch.bfloat16).to(tensor.dtype))
        for name, tensor in again.state_dict().items()
    )
    # Fusing anew replaces the folder; the target's own card is not taken for ours.
    fuse(out, out / "draft_heads", out)
    assert files(out) == ours


def test_transformers_opens_the_plain_target_silently(
    sharded_target: Path,
    saved: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fuse(sharded_target, saved, tmp_path / "fused")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / "fused", output_loading_info=True
        )
    assert not caplog.records
    assert not any(report.values())
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(sharded_target)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)


def test_linked_weights_share_disk_space(sharded_target: Path, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded_target, tmp_path / "plain")
    fuse(tmp_path / "plain", saved, tmp_path / "fused", link=True)
    name = "config.json"
    assert not (tmp_path / "fused" / name).samefile(tmp_path / "plain" / name)
    shards = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert all((tmp_path / "fused" / shard.name).samefile(shard) for shard in shards)


def test_a_full_disk_leaves_the_old_checkpoint(
    sharded_target: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(sharded_target, saved, tmp_path / "fused")
    before = files(tmp_path)

    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        fuse(sharded_target, saved, tmp_path / "fused")
    assert files(tmp_path) == before


def test_a_folder_with_other_files_is_never_replaced(
    sharded_target: Path, target: Target, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_head(random_head(target, "mtp"), tmp_path / "mine", META)
    with pytest.raises(ValueError, match="holds other files"):
        fuse(sharded_target, saved, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds other files"):
        fuse(sharded_target, saved, sharded_target)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
def test_a_gguf_target_becomes_a_plain_folder(smollm2: Path, tmp_path: Path) -> None:
    """The real model: dequantised to a folder with the same hash and its tokenizer."""
    target = load_target(smollm2)
    fuse(smollm2, shipped_head(), tmp_path / "fused")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fused", output_loading_info=True
    )
    assert not any(report.values())
    assert target_hash(wrap_target(model)) == target_hash(target)
    tokens = torch.tensor([target.tokenizer("The capital of France is")["input_ids"]])
    assert torch.equal(model(tokens).logits, target.model(tokens).logits)
    again, head = load_fused(tmp_path / "fused")
    assert again.tokenizer.decode(tokens[0]).endswith("France is")
    assert torch.equal(again.forward(tokens).logits_BTV, target.forward(tokens).logits_BTV)
    assert head.kind == load_head(shipped_head(), target).kind
