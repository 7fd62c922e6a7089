"""Checkpoints from which a run resumes bit for bit; a failed save never costs the one before.

A checkpoint is a folder: `state.safetensors` holds the head's weights and the optimizer's tensors,
`state.json` the metadata. It is written beside the old one and then renamed. Nothing in it depends
on the parallel strategy or the number of processes (training/distributed/strategies.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from headstart.model.checkpoint.atomic import atomic_folder, recover

FOLDER = "state"  # within the folder of the run
STATE, TENSORS = "state.json", "state.safetensors"
FORMER_KEYS = {"answer_tokens": "labels"}  # of metadata that older versions wrote
HEAD = "head."  # prefix of the weights; the optimizer's tensors have others


def could_not_save(folder: Path, error: OSError) -> OSError:
    """Return the error to raise when a checkpoint cannot be written."""
    kept = "The one before it is intact" if folder.exists() else "There is none before it"
    return OSError(
        error.errno,
        f"Could not save {folder} ({error.strerror or error}). {kept}. Free some space, then "
        "resume with train.resume=true.",
    )


def save_state(
    folder: Path,
    head: nn.Module,
    optimizer: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    keep: int = 1,
) -> None:
    """Write a checkpoint, whole or not at all. OSError leaves the one before.

    optimizer: tensors by name, from `ParallelStrategy.optimizer_state`. metadata: JSON values.
    keep: number of checkpoints to keep, this one included.
    """
    tensors = {f"{HEAD}{name}": value for name, value in head.state_dict().items()}
    tensors |= optimizer
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    try:
        _keep_older(folder, metadata["step"], keep)
        with atomic_folder(folder, STATE) as fresh:
            # As bytes and through Python, so that a full disk is an OSError.
            _write(fresh / TENSORS, safetensors.torch.save(plain))
            _write(fresh / STATE, _json(metadata))
    except OSError as error:
        raise could_not_save(folder, error) from error


def _keep_older(folder: Path, step: int, keep: int) -> None:
    """Rename the present checkpoint before that of `step` replaces it.

    Remove older ones beyond `keep`, and those of later steps: the run went back behind them.
    """
    metadata, name = load_metadata(folder), f"{folder.name}_step"
    if metadata is not None and metadata["step"] != step and keep > 1:
        with atomic_folder(folder.with_name(f"{name}{metadata['step']}"), STATE) as older:
            for file in (TENSORS, STATE):
                _link(folder / file, older / file)
    found = [path for path in folder.parent.glob(f"{name}*") if path.name[len(name) :].isdigit()]
    found.sort(key=lambda path: int(path.name[len(name) :]))
    behind = [path for path in found if int(path.name[len(name) :]) < step]
    kept = behind[max(0, len(behind) - (keep - 1)) :]
    for path in set(found) - set(kept):
        shutil.rmtree(path)


def _link(file: Path, to: Path) -> None:
    """Hard-link a file that is never written again; copy it where the file system has no links."""
    try:
        to.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, to)


def save_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Replace the metadata of a checkpoint and keep its tensors."""
    part = folder / f".{STATE}.part"
    try:
        _write(part, _json(metadata))
        os.replace(part, folder / STATE)
    except OSError as error:
        raise could_not_save(folder, error) from error


def load_metadata(folder: Path) -> dict[str, Any] | None:
    """Return the metadata of a checkpoint, or None when there is none."""
    recover(folder)
    if not (folder / STATE).is_file():
        return None
    try:
        metadata: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The checkpoint {folder} is damaged ({STATE}: {error}). Remove the folder to "
            "start over."
        ) from error
    return {FORMER_KEYS.get(key, key): value for key, value in metadata.items()}


def load_state(folder: Path, head: nn.Module) -> dict[str, Tensor]:
    """Load the weights into `head` and return the optimizer's tensors, for
    `ParallelStrategy.restore`. ValueError for a damaged checkpoint or one of another head."""
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except Exception as error:  # the format's own error type is no OSError
        raise ValueError(
            f"The checkpoint {folder} is damaged ({TENSORS}: {error}). Remove the folder to start "
            "over."
        ) from error
    weights = {
        name.removeprefix(HEAD): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(HEAD)
    }
    try:
        head.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"The checkpoint {folder} belongs to another head: {error} Use the recipe it was made "
            "with, or another train.output."
        ) from error
    return tensors


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file of their own, e.g. a batch to inspect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(plain))


def _json(metadata: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(metadata), indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
