"""The fused checkpoint: one folder with an untouched target and a draft head.

    config.json, model*.safetensors, tokenizer...    the target's files, byte for byte
    draft_heads/config.json                          keys for engines, and ours under "headstart"
    draft_heads/model.safetensors                    the head, bfloat16
    custom_generate/*                                code that transformers can draft with
    README.md                                        the model card

The folder opens as the plain target everywhere. A head belongs to one target: it stores a hash of
the target's weights, and loading it onto another is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from headstart.model.heads.common.base import DraftHead, head_class
from headstart.model.target.load import load_target
from headstart.model.target.lora import is_joint
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash

from .atomic import atomic_folder, recover, replace_text
from .download import CONFIG, HEADS, OURS, WEIGHTS, fetch_fused, fetch_head, hub_name
from .engine_config import LM_HEAD, engine_keys, lm_head_rows, tensor_name
from .metadata import HeadMeta, Measurement
from .model_card import CARD, is_edited, model_card


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
    with atomic_folder(Path(folder), CONFIG, OURS) as part:
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
    """What the head in a folder (or in a fused one, or on the Hub) is, how it was trained, what was
    measured."""
    return _read_file(folder_of_head(folder))


def record(folder: str | Path, head: DraftHead, measured: Measurement) -> bool:
    """Add a measurement to a head's folder, or to a fused one and its card.

    It takes the place of an earlier one on the same prompts under the same conditions. Returns as
    `rewrite_meta` does.
    """
    meta = read_head_file(folder).meta
    same = (measured.prompts, measured.conditions)
    others = [one for one in meta.measured if (one.prompts, one.conditions) != same]
    return rewrite_meta(folder, head, meta.model_copy(update={"measured": (*others, measured)}))


def rewrite_meta(folder: str | Path, head: DraftHead, meta: HeadMeta) -> bool:
    """Replace what a head's folder, or a fused one and its card, say about the head.

    The weights are not touched, and config.json is written whole or not at all. A card that was
    edited by hand is left as it is; then False.
    """
    inner = folder_of_head(folder)
    config = json.loads((inner / CONFIG).read_text(encoding="utf-8"))
    config[OURS]["meta"] = meta.model_dump(mode="json")
    replace_text(inner / CONFIG, json.dumps(config, indent=2) + "\n")
    if not is_fused(folder):
        return True
    if has_edited_card(folder):
        return False
    replace_text(Path(folder) / CARD, model_card(head, meta, Path(folder)))
    return True


def has_edited_card(folder: str | Path) -> bool:
    card = Path(folder) / CARD
    return card.is_file() and is_edited(card.read_text(encoding="utf-8"))


def load_head(
    folder: str | Path, target: Target, *, merging: bool = False, regraft: bool = False
) -> DraftHead:
    """The head in a folder (or in a fused one), bound to its target, in the target's dtype (in
    float32 where it drafts in integers).

    merging: the head was trained along with its target, whose adapters are put into it next.
    regraft: the target may be another one of the same sizes; the head is then uncalibrated.
    ValueError when the folder is damaged or was made for another target.
    """
    given, folder = folder, folder_of_head(folder)
    file = _read_file(folder)
    if is_joint(folder) and not merging:
        raise ValueError(
            f"The head in {folder} was trained along with its target, so it belongs to a changed "
            f"one. Make that first: `headstart fuse {file.meta.target} {folder} OUT`."
        )
    head = build_head(file, folder)
    head.bind(target)
    found = target_hash(target)
    if file.target_hash != found and not regraft:
        raise ValueError(
            f"The head in {folder} was trained on {file.meta.target} with the weight hash "
            f"{file.target_hash[:12]}, but {target.name} has {found[:12]}: for other weights its "
            "guesses are worth less. Use the target it was trained on, train a new head, or carry "
            f"this one over, which measures what is lost: `headstart graft {given} {target.name} "
            "OUT`."
        )
    _fill(head, folder / WEIGHTS, same_target=not regraft)
    if not regraft:
        head.temperatures = file.meta.temperatures
        head.rank_acceptance = file.meta.rank_acceptance
    return head.for_decoding(target)


def build_head(file: HeadFile, folder: Path) -> DraftHead:
    """A head of the described kind and sizes, without its weights. folder: for the message."""
    head_type, config_type = head_class(str(file.head.get("kind")))
    try:
        return head_type(config_type.model_validate(file.head))
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a draft head: {error}") from error


def start_from(head: DraftHead, folder: str | Path) -> None:
    """Put the weights of a trained head of the same settings into one that is to be trained on.

    Its target may be another one of the same sizes. ValueError where the two do not fit.
    """
    _fill(head, folder_of_head(folder) / WEIGHTS, same_target=False)


def roundtrip_bf16(head: DraftHead) -> DraftHead:
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


def folder_of_head(folder: str | Path) -> Path:
    """The head's own, of a fused checkpoint too, here or on the Hub."""
    recover(Path(folder))
    return fetch_head(folder)


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
    revision: str | None = None,
    quantize: str | None = None,
) -> tuple[Target, DraftHead]:
    """Open a fused folder, or one on the Hub (`owner/name`): its target and its head.

    Arguments as in `load_target`. ValueError for what is no fused checkpoint.
    """
    from_hub = hub_name(folder) is not None
    name, folder = str(folder), fetch_fused(folder, revision)
    if not is_fused(folder):
        raise ValueError(
            f"{folder} is not a fused checkpoint: it has no {HEADS} folder. "
            "Make one with `headstart fuse`."
        )
    target = load_target(folder, dtype=dtype, device=device, quantize=quantize)
    if from_hub:
        target.name = name  # not that of a folder in the cache
    return target, load_head(folder, target)


def is_head(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / CONFIG).is_file()


def is_fused(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / HEADS / CONFIG).is_file()
