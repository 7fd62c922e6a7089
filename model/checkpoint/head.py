"""The folder of a draft head: save and load.

A head belongs to one target. Its folder stores a hash of the target's weights, and loading it onto
another target is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from headstart.model.heads.common.base import DraftHead, head_class
from headstart.model.target.lora import is_joint
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash

from .atomic import atomic_folder, recover
from .download import fetch_head
from .engine_config import engine_keys, lm_head_rows, tensor_name
from .layout import CONFIG, LM_HEAD, OURS, WEIGHTS
from .metadata import HeadFile, HeadMeta


def save_head(
    head: DraftHead,
    folder: str | Path,
    meta: HeadMeta,
    *,
    with_lm_head: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a bound head as a folder, atomically, with its weights in bfloat16.

    with_lm_head: add the rows of the target's LM head that engines expect beside a pruned draft
        vocabulary.
    beside: called with the folder to write more files into it.

    OSError (full disk, for example) leaves an existing folder unchanged.
    """
    file = HeadFile(
        version=version(OURS),
        target_hash=target_hash(head.target),
        head=head.config.model_dump(mode="json"),
        meta=meta,
    )
    config = engine_keys(head, head.target.config) | {OURS: file.model_dump(mode="json")}
    tensors = {
        tensor_name(head, name): tensor.cpu().contiguous() for name, tensor in _stored(head).items()
    }
    rows = lm_head_rows(head, torch.bfloat16) if with_lm_head else None
    if rows is not None:
        tensors[LM_HEAD] = rows
    with atomic_folder(Path(folder), CONFIG, OURS) as part:
        write_weights(part, config, tensors)
        if beside is not None:
            beside(part)


def write_weights(folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors."""
    # As bytes of Python's own, since safetensors reports a full disk by another error than OSError.
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_head(
    folder: str | Path, target: Target, *, merging: bool = False, regraft: bool = False
) -> DraftHead:
    """Load a head and bind it to its target, in the target's dtype (float32 if it drafts in int8).

    folder: a head or a fused checkpoint, as a folder or Hub id.
    merging: the head was trained jointly with adapters of the target that are merged next.
    regraft: accept another target of the same sizes; the head is then uncalibrated.

    ValueError if the folder is damaged or the head belongs to another target.
    """
    given, folder = folder, folder_of_head(folder)
    file = _read_file(folder)
    if is_joint(folder) and not merging:
        raise ValueError(
            f"The head in {folder} was trained jointly with its target, so it belongs to a changed "
            f"target. Write that first: `headstart fuse {file.meta.target} {folder} OUT`."
        )
    head = build_head(file, folder)
    head.bind(target)
    found = target_hash(target)
    if file.target_hash != found and not regraft:
        raise ValueError(
            f"The head in {folder} was trained on {file.meta.target} with the weight hash "
            f"{file.target_hash[:12]}, but {target.name} has {found[:12]}. With other weights its "
            "acceptance length drops. Use the target it was trained on, train a new head, or "
            "transfer this one and measure what is lost: "
            f"`headstart graft {given} {target.name} OUT`."
        )
    _load_weights(head, folder / WEIGHTS, same_target=not regraft)
    if not regraft:
        head.temperatures = file.meta.temperatures
        head.rank_acceptance = file.meta.rank_acceptance
    return head.for_decoding(target)


def read_head_file(folder: str | Path) -> HeadFile:
    """Read the configuration and metadata of a head: of its folder, a fused one, or on the Hub."""
    return _read_file(folder_of_head(folder))


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


def folder_of_head(folder: str | Path) -> Path:
    """Return the folder of a head, also of the one in a fused checkpoint or on the Hub."""
    recover(Path(folder))
    return fetch_head(folder)


def is_head(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / CONFIG).is_file()


def build_head(file: HeadFile, folder: Path) -> DraftHead:
    """Build a head from its configuration, without its weights. folder: named in errors."""
    head_type, config_type = head_class(str(file.head.get("kind")))
    try:
        return head_type(config_type.model_validate(file.head))
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG} does not describe a draft head: {error}") from error


def start_from(head: DraftHead, folder: str | Path) -> None:
    """Load the weights of a trained head into a new one with the same settings, to train further.

    The target may be another one of the same sizes. ValueError if the two heads do not fit.
    """
    _load_weights(head, folder_of_head(folder) / WEIGHTS, same_target=False)


def roundtrip_bf16(head: DraftHead) -> DraftHead:
    """Return a copy of a bound head as saving and loading would, with weights rounded to bfloat16.

    The copy is ready for decoding.
    """
    copy = type(head)(head.config)
    copy.load_state_dict(_stored(head))
    return copy.for_decoding(head.target)


def _stored(head: DraftHead) -> dict[str, Tensor]:
    """The entries of a head's weights file: parameters in bfloat16, buffers as they are."""
    weights = {name for name, _ in head.named_parameters()}
    return {
        name: tensor.to(torch.bfloat16) if name in weights else tensor
        for name, tensor in head.state_dict().items()
    }


def _load_weights(head: DraftHead, path: Path, *, same_target: bool = True) -> None:
    """Copy the tensors of a file into a head; both must have exactly the same ones."""
    state = head.state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)  # so that a weight that is not loaded cannot go unnoticed
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}). It is missing or truncated. Copy it again."
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
