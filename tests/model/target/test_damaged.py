"""Targets that are damaged or quantised, and what `fuse` takes along and leaves alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_model
import pytest
import torch
from families import build
from gguf_file import write_gguf
from transformers import AutoTokenizer

from headstart.model.checkpoint import fuse as fusing
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import is_fused, load_fused
from headstart.model.checkpoint.head import load_head, save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target

WEIGHTS = "model.safetensors"
META = HeadMeta(target="tiny")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target`, `head` and `fused`."""
    folder = tmp_path_factory.mktemp("whole")
    target = load_target(chat_model.save(folder / "target"), device="cpu")
    save_head(make_head(target, "mtp", {}), folder / "head", META)
    fuse(folder / "target", folder / "head", folder / "fused")
    return folder


def configure(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return change


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1000])


def quantised(method: str) -> Callable[[Path], None]:
    return configure(quantization_config={"quant_method": method, "bits": 4})


@pytest.mark.parametrize("kind", ["target", "fused"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"weights of .*folder cannot be read.*Download or copy them again"),
        (
            lambda folder: (folder / WEIGHTS).unlink(),
            r"weights of .*folder cannot be read.*no file",
        ),
        (configure(intermediate_size=128), r"weights of .*folder cannot be read.*does not fit"),
        (configure(num_hidden_layers=3), r"folder lacks weights"),
        (configure(hidden_size="wide"), r"folder cannot be opened.*hidden_size"),
        (quantised("gptq"), r"quantised weights \(gptq\).*Use .*unquantised"),
        (quantised("bitsandbytes"), r"quantised weights \(bitsandbytes\)"),
        (quantised("fp8"), r"quantised weights \(fp8\)"),
        (configure(quantization_config={}), r"quantised weights \(of an unknown method\)"),
    ],
)
def test_damaged_targets_are_named(
    folders: Path, tmp_path: Path, kind: str, damage: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(folders / kind, folder)
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        load_target(folder, device="cpu") if kind == "target" else load_fused(folder, device="cpu")


def test_more_chat_templates_come_along(folders: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders / "target", source)
    (source / fusing.CHAT_TEMPLATES).mkdir()
    (source / fusing.CHAT_TEMPLATES / "tools.jinja").write_text("{{ messages }}")
    (source / "checkpoint-7").mkdir()
    (source / "checkpoint-7" / "optimizer.safetensors").write_text("not wanted")
    fuse(source, folders / "head", tmp_path / "out")
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == AutoTokenizer.from_pretrained(source).chat_template
    assert template["tools"] == "{{ messages }}"
    assert not (tmp_path / "out" / "checkpoint-7").exists()


def test_more_chat_templates_are_downloaded(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub only what matches a pattern comes."""
    asked: list[str] = []

    def download(source: str, **patterns: list[str]) -> str:
        if "ignore_patterns" not in patterns:
            asked.extend(patterns["allow_patterns"])
        return str(folders / source)

    monkeypatch.setattr(fusing, "snapshot_download", download)
    assert fusing._plain_folder("target", None, tmp_path) == folders / "target"
    assert asked == ["additional_chat_templates/*.jinja"]


def test_a_gguf_target_is_written_out_in_float32(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with an accelerator too, where targets are opened in bfloat16."""
    write_gguf(build("llama", {"num_key_value_heads": 4}), tmp_path / "tiny.gguf", {})
    target = load_target(tmp_path / "tiny.gguf", device="cpu")
    save_head(make_head(target, "mtp", {}), tmp_path / "head", META)
    monkeypatch.setattr("headstart.model.target.pretrained.dtype_of", half_unless_told)
    fuse(tmp_path / "tiny.gguf", tmp_path / "head", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert load_target(folders / "target", device="cpu").dtype == torch.bfloat16


def half_unless_told(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    return torch.bfloat16 if dtype == "auto" else dtype


@pytest.mark.parametrize("kind", ["head", "fused"])
def test_a_kill_while_renaming_is_healed_by_readers(
    folders: Path, tmp_path: Path, kind: str
) -> None:
    shutil.copytree(folders / kind, tmp_path / ".x.old")
    if kind == "fused":
        assert is_fused(tmp_path / "x")
    else:
        load_head(tmp_path / "x", load_target(folders / "target", device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["target", "file"])
def test_what_is_not_ours_is_never_replaced(folders: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "target":
        shutil.copytree(folders / "target", out)
    else:
        out.write_text("mine")
    target = load_target(folders / "target", device="cpu")
    said = "holds other files" if kind == "target" else "is a file"
    with pytest.raises(ValueError, match=said):
        save_head(make_head(target, "mtp", {}), out, META)
    with pytest.raises(ValueError, match=said):
        fuse(folders / "target", folders / "head", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
