"""Making a fused checkpoint (model/fused.py says what it is) from a target and a head."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from headstart.model.checkpoint.custom_generate.write import (
    undraftable_alone,
    write_custom_generate,
)
from headstart.model.target import gguf
from headstart.model.target.load import load_target
from headstart.model.target.lora import is_joint, merge
from headstart.model.target.pretrained import stored_dtype
from headstart.model.target.target import Target

from .atomic import atomic_folder, check_overwrite
from .download import CHAT_TEMPLATES, CONFIG, HEADS, OURS, TARGET_FILES
from .head import folder_of_head, has_edited_card, is_fused, load_head, read_head_file, save_head
from .metadata import HeadMeta
from .model_card import CARD, TARGET_CARD, model_card
from .mtp_index import write_index
from .native_mtp import write_native

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
    """Write a fused checkpoint, whole or not at all.

    source: the target as a folder, a Hub id or a GGUF file (which is written out as a plain
    folder). head_folder: a head trained on it, as a folder or on the Hub. link: hard-link the
    target's weight files instead of copying them; saves the space, but whoever changes one changes
    both. index: list the head among the target's own weights, for transformers'
    `generate(use_mtp=True)` (see `indexed.py`). native: write it over the multi-token prediction
    layer that the target carries (see `published.py`). regraft: what is known of a head that was
    trained on another target of the same sizes; its hash is then not compared, but made anew.
    """
    if index and native:
        raise ValueError("A head is either listed (index) or written over (native), not both.")
    check_place(out)
    head_folder = folder_of_head(head_folder)
    # What a GGUF file is written out as should not depend on whether there is an accelerator.
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
            target, plain = _changed(target, head_folder, str(source), spare), spare
            head.bind(target)
        else:
            plain = _plain_folder(str(source), target, spare)
        for file in _files_to_keep(plain):
            name = TARGET_CARD if file.name == CARD else file.relative_to(plain)
            _take(file, part / name, (link or plain == spare) and file.suffix == ".safetensors")
        if native:
            meta = meta.model_copy(update={"replaces": write_native(head, part)})
        save_head(head, part / HEADS, meta, with_lm_head=True)
        if index:
            write_index(head, part)
        elif undraftable_alone(head) is None:  # with the index transformers drafts by itself
            write_custom_generate(part)
        card = model_card(head, meta, part)
        (part / CARD).write_text(card, encoding="utf-8")


def check_place(out: str | Path) -> None:
    """ValueError where a fused checkpoint would take the place of something that is not one, or
    whose card was edited by hand."""
    if has_edited_card(out) and is_fused(out):
        raise ValueError(
            f"{Path(out) / CARD} was edited by hand, and fusing anew would lose that. Move it "
            "away, or name a new folder."
        )
    check_overwrite(Path(out).absolute(), f"{HEADS}/{CONFIG}", OURS)


def _changed(target: Target, head_folder: Path, source: str, spare: Path) -> Target:
    """The target with a joint head's adapters in its weights, in the type that it is stored in."""
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
    """The folder of a target that is a folder or a Hub id: with all files of that, on disk."""
    if Path(source).suffix == gguf.SUFFIX:
        raise ValueError(f"{source} is a GGUF file. Name the folder or Hub id of the model itself.")
    if Path(source).is_dir():
        return Path(source)
    snapshot_download(source, allow_patterns=[f"{CHAT_TEMPLATES}/*.jinja"])
    patterns = [*TARGET_FILES, "*.py", "*.md", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*"]
    return Path(snapshot_download(source, allow_patterns=patterns, ignore_patterns=["*/*"]))


def _files_to_keep(folder: Path) -> list[Path]:
    """Files at the root, and chat templates beside the main one. Pickled weights are left behind
    where there are safetensors."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    files += sorted(folder.glob(f"{CHAT_TEMPLATES}/*.jinja"))
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix not in PICKLES]
    if any(file.name == TARGET_CARD for file in files):  # it was fused before: that card is ours
        files = [file for file in files if file.name != CARD]
    return files


def _take(file: Path, to: Path, link: bool) -> None:
    to.parent.mkdir(exist_ok=True)
    if link:
        to.hardlink_to(file.resolve())
    else:
        shutil.copyfile(file, to)
