"""Write a fused checkpoint from a target and a draft head (see `layout.py`)."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from headstart.model.target import gguf
from headstart.model.target.load import load_target
from headstart.model.target.lora import is_joint, merge
from headstart.model.target.pretrained import stored_dtype
from headstart.model.target.target import Target

from .atomic import atomic_folder, check_overwrite
from .custom_generate.write import write_custom_generate
from .engine_support import support
from .fused import has_edited_card, is_fused
from .head import folder_of_head, load_head, read_head_file, save_head
from .layout import CARD, CHAT_TEMPLATES, CONFIG, HEADS, OURS, TARGET_CARD, TARGET_FILES
from .metadata import HeadMeta
from .model_card import model_card
from .mtp_index import write_index
from .native_mtp import write_native_mtp

PICKLES = (".bin", ".pth", ".pt", ".ckpt")


def fuse(
    source: str | Path,
    head_folder: str | Path,
    out: str | Path,
    *,
    link: bool = False,
    index: bool = False,
    native: bool = False,
    regraft: HeadMeta | None = None,
) -> None:
    """Write a fused checkpoint, atomically.

    source: the target as a folder, a Hub id or a GGUF file (which is dequantised to a folder).
    head_folder: a head trained on it, as a folder or Hub id.
    link: hard-link the target's weight files instead of copying them, to save disk space. A change
        to one of the files then changes both.
    index: list the head among the target's own weights, for transformers' `generate(use_mtp=True)`
        (see `mtp_index.py`).
    native: overwrite the target's own multi-token prediction layer with the head (see
        `native_mtp.py`).
    regraft: metadata of a head that was trained on another target of the same sizes; its target
        hash is recomputed instead of compared.
    """
    if index and native:
        raise ValueError(
            "index lists the head beside the target's weights and native overwrites a layer of the "
            "target with it. Choose one of the two."
        )
    check_output(out)
    head_folder = folder_of_head(head_folder)
    # The dtype that a GGUF file is dequantised to should not depend on the device.
    is_gguf = Path(source).suffix == gguf.SUFFIX
    joint = is_joint(head_folder) and regraft is None
    target = load_target(source, dtype=torch.float32 if is_gguf or joint else "auto")
    head = load_head(head_folder, target, merging=joint, regraft=regraft is not None)
    meta = regraft or read_head_file(head_folder).meta
    parent = Path(out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".plain-") as beside,
        atomic_folder(Path(out), f"{HEADS}/{CONFIG}", OURS) as part,
    ):
        spare = Path(beside, "target")
        if joint:
            target, plain = _merged(target, head_folder, str(source), spare), spare
            head.bind(target)
        else:
            plain = _plain_folder(str(source), target, spare)
        for file in _files_to_keep(plain):
            name = TARGET_CARD if file.name == CARD else file.relative_to(plain)
            _copy(file, part / name, (link or plain == spare) and file.suffix == ".safetensors")
        if native:
            meta = meta.model_copy(update={"replaces": write_native_mtp(head, part)})
        save_head(head, part / HEADS, meta, with_lm_head=True)
        if index:
            write_index(head, part)
        elif support(head, "transformers") is None:  # with the index it drafts by itself
            write_custom_generate(part)
        card = model_card(head, meta, part)
        (part / CARD).write_text(card, encoding="utf-8")


def check_output(out: str | Path) -> None:
    """Raise ValueError if writing a fused checkpoint would replace other files, or a card that was
    edited by hand."""
    if has_edited_card(out) and is_fused(out):
        raise ValueError(
            f"{Path(out) / CARD} was edited by hand, and fusing again would overwrite it. Move it "
            "away, or name a new folder."
        )
    check_overwrite(Path(out).absolute(), f"{HEADS}/{CONFIG}", OURS)


def _merged(target: Target, head_folder: Path, source: str, spare: Path) -> Target:
    """Merge the adapters of a jointly trained head into the target, in the dtype of its files."""
    merge(target.model, head_folder)
    target.model.to(stored_dtype(source))
    gguf.save_plain(target, spare)
    return load_target(spare)


def _plain_folder(source: str, target: Target, spare: Path) -> Path:
    if Path(source).suffix == gguf.SUFFIX:
        gguf.save_plain(target, spare)
        return spare
    return plain_source(source)


def plain_source(source: str) -> Path:
    """Return the folder of a target with all its files, downloaded if it is a Hub id."""
    if Path(source).suffix == gguf.SUFFIX:
        raise ValueError(f"{source} is a GGUF file. Name the folder or Hub id of the model itself.")
    if Path(source).is_dir():
        return Path(source)
    snapshot_download(source, allow_patterns=[f"{CHAT_TEMPLATES}/*.jinja"])
    patterns = [*TARGET_FILES, "*.py", "*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]
    return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _files_to_keep(folder: Path) -> list[Path]:
    """Files at the root and additional chat templates, without pickled weights if there are
    safetensors files."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    files += sorted(folder.glob(f"{CHAT_TEMPLATES}/*.jinja"))
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in PICKLES]
    if any(file.name == TARGET_CARD for file in files):  # a fused checkpoint: the card is ours
        files = [file for file in files if file.name != CARD]
    return files


def _copy(file: Path, to: Path, link: bool) -> None:
    to.parent.mkdir(exist_ok=True)
    if link:
        to.hardlink_to(file.resolve())
    else:
        shutil.copyfile(file, to)
