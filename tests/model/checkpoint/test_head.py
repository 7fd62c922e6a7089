"""The folder of a head: every byte is kept, and damage or another target is an error."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_heads import DRAFT_VOCAB, HIDDEN, META, VOCAB, files, random_head
from transformers import LlamaForCausalLM

from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.heads.common.base import kinds
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_keeps_every_byte(
    sharded_target: Path, target: Target, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    head = random_head(target, kind)
    save_head(head, tmp_path / "one", META)
    other = load_target(sharded_target, dtype=dtype)
    again = load_head(tmp_path / "one", other)
    drafts_in = torch.float32 if other.drafts_in_int8 else dtype  # integers are made from floats
    assert {p.dtype for p in again.parameters()} == {drafts_in}
    save_head(again, tmp_path / "two", read_head_file(tmp_path / "one").meta)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert again.taps == head.taps and again.max_depth == head.max_depth
    assert torch.equal(again.draft_ids, head.draft_ids)
    state = again.state_dict()
    for name, tensor in head.state_dict().items():
        assert torch.equal(state[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name


def test_another_target_is_an_error(sharded_target: Path, saved: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(sharded_target)
    with torch.no_grad():
        other.model.norm.weight[0] = 1.5
    with pytest.raises(ValueError, match="trained on someone/tiny-llama"):
        load_head(saved, wrap_target(other))


def test_a_full_disk_leaves_the_old_head(
    target: Target, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved.parent)

    def full(path: Path, content: bytes) -> None:
        path.write_text(content[:99].hex())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(random_head(target, "mtp"), saved, META)
    assert files(saved.parent) == before


def edit_tensors(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["fc.weight"]
    elif change == "extra":
        tensors["fc.bias"] = torch.zeros(3)
    elif change == "shape":
        tensors["fc.weight"] = tensors["fc.weight"][:-1]
    elif change == "nan":
        tensors["midlayer.mlp.up_proj.weight"][2, 3] = torch.nan
    elif change == "vocabulary":
        tensors["d2t"] += VOCAB
    else:
        tensors["lm_head.weight"] = torch.zeros(DRAFT_VOCAB, HIDDEN)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing \['fc.weight'\]"),
        ("extra", r"unknown \['fc.bias'\]"),
        ("shape", r"fc.weight as torch.bfloat16 \[47, 144\]"),
        ("nan", "midlayer.mlp.up_proj.weight that are not finite"),
        ("vocabulary", "names tokens that do not exist"),
        ("lm_head", "lm_head.weight of its own"),
    ],
)
def test_damaged_tensors_are_an_error(
    target: Target, saved: Path, change: str, message: str
) -> None:
    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=message):
        load_head(saved, target)


def test_truncated_and_missing_files_are_an_error(target: Target, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_head(saved, target)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_head(saved, target)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no draft head"):
        load_head(saved, target)
    with pytest.raises(ValueError, match="not a fused checkpoint"):
        load_fused(saved)


def test_unknown_settings_are_an_error(target: Target, saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["headstart"]["head"]["colour"] = "blue"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="colour"):
        load_head(saved, target)


def test_the_hash_depends_on_weights_not_on_files(
    sharded_target: Path, target: Target, tmp_path: Path
) -> None:
    one_file = tmp_path / "one"
    target.model.save_pretrained(one_file)
    narrow = tmp_path / "narrow"
    LlamaForCausalLM.from_pretrained(sharded_target, dtype=torch.bfloat16).save_pretrained(narrow)
    for folder in (one_file, narrow):
        assert target_hash(load_target(folder)) == target_hash(target)
    changed = LlamaForCausalLM.from_pretrained(sharded_target)
    with torch.no_grad():
        changed.model.layers[3].mlp.up_proj.weight[5, 7] += 0.01
    assert target_hash(wrap_target(changed)) != target_hash(target)
