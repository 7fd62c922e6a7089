"""The fused checkpoint: one folder with an untouched target and a draft head.

    config.json, model*.safetensors, tokenizer...    the target's files, byte for byte
    draft_heads/config.json                          keys for engines, and ours under "headstart"
    draft_heads/model.safetensors                    the head, bfloat16
    README.md                                        the model card

The folder opens as the plain target everywhere. A head belongs to one target: it stores a hash of
the target's weights, and loading it onto another is refused.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from . import gguf
from .card import CARD, TARGET_CARD, model_card
from .engines import LM_HEAD, engine_keys, lm_head_rows, tensor_name
from .files import recover, replace_text, written_beside
from .hashing import target_hash
from .head import DraftHead, head_class
from .indexed import write_index
from .joint import is_joint, merge
from .meta import HeadMeta, Measurement
from .pretrained import stored_dtype
from .published import write_native
from .target import Target

HEADS = "draft_heads"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OURS = "headstart"
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' name for the folder
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


class HeadFile(BaseModel):
    """What config.json says under "headstart"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    target_hash: str
    head: dict[str, Any]
    meta: HeadMeta


def save_head(
    head: DraftHead,
    folder: str | Path,
    meta: HeadMeta,
    *,
    with_lm_head: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a bound head as a folder, whole or not at all, in bfloat16.

    with_lm_head: add the target's LM head rows that stock engines want to find beside the head.
    beside: writes more into the folder.
    OSError (disk full, say) leaves what was there before.
    """
    file = HeadFile(
        version=version(OURS),
        target_hash=target_hash(head.target),
        head=head.config.model_dump(mode="json"),
        meta=meta,
    )
    config = engine_keys(head, head.target.config) | {OURS: file.model_dump(mode="json")}
    with written_beside(Path(folder), CONFIG, OURS) as part:
        _write_head(head, part, config, with_lm_head)
        if beside is not None:
            beside(part)


def _write_head(head: DraftHead, part: Path, config: dict[str, Any], with_lm_head: bool) -> None:
    tensors = {
        tensor_name(head, name): tensor.cpu().contiguous() for name, tensor in _stored(head).items()
    }
    rows = lm_head_rows(head, torch.bfloat16) if with_lm_head else None
    if rows is not None:
        tensors[LM_HEAD] = rows
    # Through Python, so that a full disk is an OSError.
    (part / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_head_file(folder: str | Path) -> HeadFile:
    """What the head in a folder (or in a fused one) is, how it was trained, what was measured."""
    return _read_file(_head_folder(folder))


def record(folder: str | Path, head: DraftHead, measured: Measurement) -> None:
    """Add a measurement to a head's folder, or to a fused one and its card.

    It takes the place of an earlier one on the same prompts under the same conditions.
    """
    meta = read_head_file(folder).meta
    same = (measured.prompts, measured.conditions)
    others = [one for one in meta.measured if (one.prompts, one.conditions) != same]
    rewrite_meta(folder, head, meta.model_copy(update={"measured": (*others, measured)}))


def rewrite_meta(folder: str | Path, head: DraftHead, meta: HeadMeta) -> None:
    """Replace what a head's folder, or a fused one and its card, say about the head.

    The weights are not touched, and config.json is written whole or not at all.
    """
    inner = _head_folder(folder)
    config = json.loads((inner / CONFIG).read_text(encoding="utf-8"))
    config[OURS]["meta"] = meta.model_dump(mode="json")
    replace_text(inner / CONFIG, json.dumps(config, indent=2) + "\n")
    if is_fused(folder):
        replace_text(Path(folder) / CARD, model_card(head, meta, Path(folder)))


def load_head(folder: str | Path, target: Target, *, merging: bool = False) -> DraftHead:
    """The head in a folder (or in a fused one), bound to its target, in the target's dtype (in
    float32 where it drafts in integers).

    merging: the head was trained along with its target, whose adapters are put into it next.
    ValueError when the folder is damaged or was made for another target.
    """
    folder = _head_folder(folder)
    file = _read_file(folder)
    if is_joint(folder) and not merging:
        raise ValueError(
            f"The head in {folder} was trained along with its target, so it belongs to a changed "
            f"one. Make that first: `headstart fuse {file.meta.target} {folder} OUT`."
        )
    head_type, config_type = head_class(str(file.head.get("kind")))
    try:
        head = head_type(config_type.model_validate(file.head))
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a draft head: {error}") from error
    head.bind(target)
    found = target_hash(target)
    if file.target_hash != found:
        raise ValueError(
            f"The head in {folder} was trained on {file.meta.target} with the weight hash "
            f"{file.target_hash[:12]}, but {target.name} has {found[:12]}: for these weights its "
            "guesses are worth little. Use the target it was trained on, or train a new head."
        )
    _fill(head, folder / WEIGHTS)
    head.temperatures = file.meta.temperatures
    head.rank_acceptance = file.meta.rank_acceptance
    return head.for_decoding(target)


def start_from(head: DraftHead, folder: str | Path) -> None:
    """Put the weights of a trained head of the same settings into one that is to be trained on.

    Its target may be another one of the same sizes. ValueError where the two do not fit.
    """
    _fill(head, _head_folder(folder) / WEIGHTS, same_target=False)


def as_loaded(head: DraftHead) -> DraftHead:
    """A copy of a bound head as it would be loaded again: its file holds bfloat16."""
    copy = type(head)(head.config)
    copy.load_state_dict(_stored(head))
    return copy.for_decoding(head.target)


def _stored(head: DraftHead) -> dict[str, Tensor]:
    """What is written of a head: its weights in bfloat16, and its buffers as they are."""
    weights = {name for name, _ in head.named_parameters()}
    return {
        name: tensor.to(torch.bfloat16) if name in weights else tensor
        for name, tensor in head.state_dict().items()
    }


def _fill(head: DraftHead, path: Path, *, same_target: bool = True) -> None:
    """Put a file's tensors into a head; the two must have exactly the same ones."""
    state = head.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # a weight that is not loaded cannot go unseen
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). It is missing or was cut short. Copy it again."
        ) from error
    rows = stored.pop(LM_HEAD, None)
    names = {tensor_name(head, name): name for name in state}
    missing, extra = sorted(names.keys() - stored.keys()), sorted(stored.keys() - names.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit a head of kind {head.kind}: "
            f"missing {missing or 'nothing'}, unknown {extra or 'nothing'}."
        )
    for name, tensor in stored.items():
        ours = state[names[name]]
        if ours.shape != tensor.shape or ours.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{path} holds {name} as {tensor.dtype} {list(tensor.shape)}, but the head's "
                f"config.json asks for {ours.dtype} {list(ours.shape)}."
            )
        ours.copy_(tensor)
        if not bool(ours.isfinite().all()):
            raise ValueError(f"{path} holds values in {name} that are not finite numbers.")
    ids = head.draft_ids
    if ids is not None and not 0 <= int(ids[0]) <= int(ids[-1]) < head.config.vocab_size:
        raise ValueError(f"{path}: the draft vocabulary d2t names tokens that do not exist.")
    if rows is not None and same_target:
        _check_lm_head(head, rows, path)


def _check_lm_head(head: DraftHead, rows_VD: Tensor, path: Path) -> None:
    expected_VD = lm_head_rows(head, rows_VD.dtype)
    if expected_VD is None or not torch.equal(expected_VD, rows_VD):
        raise ValueError(
            f"{path} has an {LM_HEAD} of its own, not the rows of {head.target.name}. Heads that "
            "trained their LM head are not supported."
        )


def _head_folder(folder: str | Path) -> Path:
    recover(Path(folder))
    inner = Path(folder) / HEADS
    return inner if inner.is_dir() else Path(folder)


def _read_file(folder: Path) -> HeadFile:
    path = folder / CONFIG
    try:
        section = json.loads(path.read_text(encoding="utf-8"))[OURS]
        return HeadFile.model_validate(section)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise ValueError(
            f"{folder} holds no draft head of Headstart: {path.name} cannot be read "
            f"({type(error).__name__}: {error})."
        ) from error


def load_fused(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    quantize: str | None = None,
) -> tuple[Target, DraftHead]:
    """Open a fused folder: its target and its head. Arguments as in `Target.load`."""
    if not is_fused(folder):
        raise ValueError(
            f"{folder} is not a fused checkpoint: it has no {HEADS} folder. "
            "Make one with `headstart fuse`."
        )
    target = Target.load(folder, dtype=dtype, device=device, quantize=quantize)
    return target, load_head(folder, target)


def is_head(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / CONFIG).is_file()


def is_fused(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / HEADS / CONFIG).is_file()


def fuse(
    source: str | Path,
    head_folder: str | Path,
    out: str | Path,
    *,
    link: bool = False,
    index: bool = False,
    native: bool = False,
) -> None:
    """Write a fused checkpoint, whole or not at all.

    source: the target as a folder, a Hub id or a GGUF file (which is written out as a plain
    folder). head_folder: a head trained on it. link: hard-link the target's weight files instead of
    copying them; saves the space, but whoever changes one changes both. index: list the head among
    the target's own weights, for transformers' `generate(use_mtp=True)` (see `indexed.py`). native:
    write it over the multi-token prediction layer that the target carries (see `published.py`).
    """
    if index and native:
        raise ValueError("A head is either listed (index) or written over (native), not both.")
    # What a GGUF file is written out as should not depend on whether there is an accelerator.
    is_gguf = Path(source).suffix == gguf.SUFFIX
    joint = is_joint(Path(head_folder))
    target = Target.load(source, dtype=torch.float32 if is_gguf or joint else "auto")
    head = load_head(head_folder, target, merging=joint)
    meta = read_head_file(head_folder).meta
    parent = Path(out).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=parent, prefix=".plain-") as beside,
        written_beside(Path(out), f"{HEADS}/{CONFIG}", OURS) as part,
    ):
        spare = Path(beside, "target")
        if joint:
            target, plain = _changed(target, Path(head_folder), str(source), spare), spare
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
        card = model_card(head, meta, part)
        (part / CARD).write_text(card, encoding="utf-8")


def _changed(target: Target, head_folder: Path, source: str, spare: Path) -> Target:
    """The target with a joint head's adapters in its weights, in the type that it is stored in."""
    merge(target.model, head_folder)
    target.model.to(stored_dtype(source))
    gguf.save_plain(target, spare)
    return Target.load(spare)


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
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]
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
