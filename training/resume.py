"""What may change when a run resumes, and what an output folder may hold when one starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.model.checkpoint.head import is_head, read_head_file
from headstart.training.config.errors import current_settings
from headstart.training.config.schema import Recipe
from headstart.training.reporting.metrics_log import METRICS
from headstart.training.reporting.samples import SAMPLES

from .run.checkpoint import FOLDER, STATE

# These may differ when a run resumes: they change what is reported and kept, not what is learned,
# or are what a failed run has to change. None moves the position in the data.
FREE_ON_RESUME = (
    *("train.output", "train.resume", "train.log_every", "train.save_every", "train.keep"),
    *("train.lr", "train.clip", "train.precision"),
    *("loss.chunk_rows", "loss.recompute", "data.features"),
)
FREE_SECTIONS = ("eval.", "parallel.", "train.wandb", "train.tensorboard")
WRITTEN = ("best", "last", METRICS, SAMPLES)  # by a run, beside its checkpoints
SHOWN = ("samples", "contexts")  # evaluation settings that do not affect the score


def check_folder(recipe: Recipe, folder: Path, metadata: Mapping[str, Any] | None) -> None:
    """Check that the recipe can start in a folder, or resume the run in it.

    metadata: of the checkpoint in the folder, None without one.
    """
    if not recipe.train.resume:
        if metadata is not None:
            raise ValueError(
                f"{folder} already holds a run (step {metadata['step']}). Resume it with "
                "train.resume=true, or choose another train.output."
            )
        _check_empty(folder, WRITTEN)
        return
    if metadata is None and recipe.train.resume == "auto":
        # Metrics of a run that was stopped before its first checkpoint are written again.
        _check_empty(folder, tuple(name for name in WRITTEN if name != METRICS))
        return
    if metadata is None:
        raise ValueError(
            f"train.resume is set, but {folder / FOLDER} holds no run to resume. Leave "
            "train.resume out to start one, or correct train.output."
        )
    before = current_settings(metadata["recipe"], f"The run in {folder}")
    changed = changed_on_resume(before, recipe)
    if changed:
        raise ValueError(
            "\n  ".join([f"The run in {folder} was made with other settings:", *changed])
            + "\nResume with the same settings, or start again in another train.output."
        )


def changed_on_resume(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Return the settings that differ from those of the run and may not."""
    # Adds the defaults of settings that did not exist yet.
    completed = Recipe.model_validate(before).model_dump(mode="json")
    old, new = _flat(completed, ""), _flat(recipe.model_dump(mode="json"), "")
    return [
        f"{key}: was {old.get(key)}, is {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in FREE_ON_RESUME
        and not key.startswith(FREE_SECTIONS)
    ]


def _flat(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{path}{key}.")
        else:
            flat[f"{path}{key}"] = value
    return flat


def _check_empty(folder: Path, written: tuple[str, ...]) -> None:
    """Refuse a folder with heads or metrics of a run without a checkpoint."""
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(
                f"train.output is {folder}, but {parent} is a file. Choose another train.output."
            )
    found = [name for name in (*written, FOLDER) if _holds(folder / name)]
    if found:
        raise ValueError(
            f"{folder} holds {', '.join(found)}, but no run to resume ({FOLDER}/{STATE}). "
            "Nothing there is replaced: choose another train.output, or remove the folder."
        )


def _holds(path: Path) -> bool:
    """Return whether a path has content: a run that failed at once leaves an empty file."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def check_same(metadata: Mapping[str, Any], folder: Path, data: str, target: str) -> None:
    """Refuse another target or other data than those of the checkpoint, by their hashes."""
    for name, what, now in (("target_hash", "target", target), ("data_hash", "data", data)):
        if metadata.get(name, now) != now:
            raise ValueError(
                f"The {what} has changed since {folder} was saved, so the run cannot be "
                f"resumed. Restore the {what}, or start again in another train.output."
            )


def best_holds(metadata: Mapping[str, Any], recipe: Recipe, best: Path) -> bool:
    """Return whether the checkpoint's best score still holds.

    It does not after a change of the evaluation, nor where the run resumes from an older checkpoint
    than the one that saved the best head.
    """
    before, now = metadata["recipe"], recipe.model_dump(mode="json")
    old, new = (
        {name: value for name, value in one["eval"].items() if name not in SHOWN}
        for one in (before, now)
    )
    if old != new:
        return False
    if before.get("parallel", {}).get("target", "replicated") != now["parallel"]["target"]:
        return False
    return not is_head(best) or read_head_file(best).meta.tokens <= metadata["labels"]
