"""Saving a run so that it can go on bit for bit, and so that no failure costs the last save.

A checkpoint is a folder: `state.safetensors` with the head's weights and the optimizers' tensors,
`state.json` with the rest. It is written beside the old one and then renamed. Nothing in it depends
on the engine or on how many processes there were (training/engines.py).
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
HEAD = "head."  # how the names of weights begin; those of the optimizer begin otherwise


def could_not_save(folder: Path, error: OSError) -> OSError:
    """What to tell the user when a checkpoint cannot be written."""
    kept = "The one before it is intact" if folder.exists() else "There is none before it"
    return OSError(
        error.errno,
        f"Could not save {folder} ({error.strerror or error}). {kept}. Free some space, then go on "
        "with train.resume=true.",
    )


def save_state(
    folder: Path,
    head: nn.Module,
    optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    keep: int = 1,
) -> None:
    """optimizer: tensors by name, from `Engine.optimizer_state`. facts: anything JSON can hold.

    keep: how many checkpoints stay, the new one among them.
    """
    tensors = {f"{HEAD}{name}": value for name, value in head.state_dict().items()}
    tensors |= optimizer
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    try:
        _keep_older(folder, facts["step"], keep)
        with atomic_folder(folder, STATE) as fresh:
            # As bytes and through Python, so that a full disk is an OSError.
            _write(fresh / TENSORS, safetensors.torch.save(plain))
            _write(fresh / STATE, _json(facts))
    except OSError as error:
        raise could_not_save(folder, error) from error


def _keep_older(folder: Path, step: int, keep: int) -> None:
    """Give the present checkpoint a name of its own before that of `step` takes its place.

    Dropped are those that are too old, and those ahead of it: somebody went back behind them.
    """
    facts, name = load_facts(folder), f"{folder.name}_step"
    if facts is not None and facts["step"] != step and keep > 1:
        with atomic_folder(folder.with_name(f"{name}{facts['step']}"), STATE) as older:
            for file in (TENSORS, STATE):
                _link(folder / file, older / file)
    found = [path for path in folder.parent.glob(f"{name}*") if path.name[len(name) :].isdigit()]
    found.sort(key=lambda path: int(path.name[len(name) :]))
    behind = [path for path in found if int(path.name[len(name) :]) < step]
    kept = behind[max(0, len(behind) - (keep - 1)) :]
    for path in set(found) - set(kept):
        shutil.rmtree(path)


def _link(file: Path, to: Path) -> None:
    """A second name for the file, where the file system knows such: it is never written again."""
    try:
        to.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, to)


def save_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Other facts for the weights that a checkpoint holds already."""
    part = folder / f".{STATE}.part"
    try:
        _write(part, _json(facts))
        os.replace(part, folder / STATE)
    except OSError as error:
        raise could_not_save(folder, error) from error


def load_facts(folder: Path) -> dict[str, Any] | None:
    """What `save_state` was told, or None when there is no checkpoint."""
    recover(folder)
    if not (folder / STATE).is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The checkpoint {folder} is damaged ({STATE}: {error}). Remove the folder to "
            "start over."
        ) from error
    return facts


def load_state(folder: Path, head: nn.Module) -> dict[str, Tensor]:
    """Put the weights back; the optimizer's tensors, for `Engine.restore`.

    ValueError when the checkpoint is another head's.
    """
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
    """A loose file, e.g. a batch to look at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(plain))


def _json(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(facts), indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
