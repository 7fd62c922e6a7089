"""What is checked before a run starts, and what is said when a setting does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headstart.model.checkpoint.head import is_head, read_head_file
from headstart.model.heads.common.base import UNSET, DraftHead
from headstart.model.target.lora import check_peft
from headstart.model.target.target import Target
from headstart.model.target.weight_only import check_weight_only
from headstart.training.config.errors import without_removed
from headstart.training.config.schema import Recipe, TrainConfig
from headstart.training.data.batching import Batches, Corpus, frequent_tokens
from headstart.training.data.conversations import Conversations
from headstart.training.distributed.launcher import with_engine
from headstart.training.evaluation.samples import SAMPLES
from headstart.training.reporting.metrics_log import FIGURES
from headstart.training.reporting.trackers import check_trackers

from .checkpoint import FOLDER, STATE, load_facts

# These may differ when a run goes on: they change what is reported and kept, not what is learned,
# or are what a run that failed has to change. None moves the position in the data.
FREE_ON_RESUME = (
    *("train.output", "train.resume", "train.log_every", "train.save_every", "train.keep"),
    *("train.lr", "train.clip", "train.precision"),
    *("loss.chunk_rows", "loss.recompute", "data.features"),
)
FREE_SECTIONS = ("eval.", "parallel.", "train.wandb", "train.tensorboard")
WRITTEN = ("best", "last", FIGURES, SAMPLES)  # by a run, beside its state
SHOWN = ("samples", "contexts")  # by an evaluation, without a say in which head is the best


def check_fit(recipe: Recipe, target: Target, head: DraftHead, decodes: bool) -> None:
    """What can be known to be wrong before data is read. decodes: whether evaluations decode."""
    if decodes and target.is_sharded:
        raise ValueError(
            "A target in parts on several processes does not decode, so heads cannot be evaluated "
            "with it by decoding: leave `evaluate` out."
        )
    if decodes and recipe.joint is not None:
        raise ValueError(
            "A target that is trained along does not decode until its adapters are in its weights, "
            "so heads cannot be evaluated by decoding: leave `evaluate` out."
        )
    steps = recipe.loss.steps
    if head.max_depth is not None and head.max_depth != steps:
        raise ValueError(
            f"The {head.kind} head drafts {head.max_depth} tokens, but loss.steps is {steps}: "
            f"parts of it would stay untrained. Set loss.steps={head.max_depth}, or make the head "
            f"for {steps} tokens."
        )
    if recipe.train.precision == "float32" and target.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"train.precision is float32, but the target is in {target.dtype}. Set "
            "target.dtype=float32 or train.precision=bfloat16."
        )


def check_early(recipe: Recipe) -> None:
    """What can be known to be wrong before the target is loaded."""
    check_joint(with_engine(recipe))
    if recipe.train.start_from is not None:
        read_head_file(recipe.train.start_from)
    check_trackers(recipe)
    check_weight_only(recipe.target.quantize)
    folder = Path(recipe.train.output)
    check_folder(recipe, folder, load_facts(folder / FOLDER))


def check_joint(recipe: Recipe) -> None:
    """What cannot be where the target learns along."""
    if recipe.joint is None:
        return
    check_peft()
    for name, value, needed in (
        ("data.features", recipe.data.features, None),
        ("target.quantize", recipe.target.quantize, None),
        ("parallel.target", recipe.parallel.target, "replicated"),
        ("parallel.engine", recipe.parallel.engine, "ddp"),
    ):
        if value != needed:
            raise ValueError(
                f"{name} is {value}, but the joint section lets the target learn along, which "
                f"needs {name}={'null' if needed is None else needed}. Change one of them."
            )


def check_lengths(data: Conversations, target: Target) -> None:
    limit = target.context_limit
    longest = max(data.train.longest, data.holdout.longest)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A conversation has {longest} tokens, but {target.name} reads {limit} at most. Set "
            f"data.max_length={limit}, which cuts what is longer."
        )


def check_folder(recipe: Recipe, folder: Path, facts: Mapping[str, Any] | None) -> None:
    if not recipe.train.resume:
        if facts is not None:
            raise ValueError(
                f"{folder} already holds a run (step {facts['step']}). Go on with "
                "train.resume=true, or choose another train.output."
            )
        _check_empty(folder, WRITTEN)
        return
    if facts is None and recipe.train.resume == "auto":
        # Figures of a run that was stopped before its first checkpoint come again.
        _check_empty(folder, tuple(name for name in WRITTEN if name != FIGURES))
        return
    if facts is None:
        raise ValueError(
            f"train.resume is set, but {folder / FOLDER} holds no run to go on from. Leave "
            "train.resume out to start one, or correct train.output."
        )
    before = without_removed(facts["recipe"], f"The run in {folder}")
    changed = changed_on_resume(before, recipe)
    if changed:
        raise ValueError(
            "\n  ".join([f"The run in {folder} was made with other settings:", *changed])
            + "\nGo on with the same settings, or start anew in another train.output."
        )


def changed_on_resume(before: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Settings that differ from those a run was started with, and matter."""
    # With the defaults of settings that did not exist yet.
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
    """A run without a checkpoint may have left heads and figures: they are not replaced."""
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(
                f"train.output is {folder}, but {parent} is a file. Choose another train.output."
            )
    found = [name for name in (*written, FOLDER) if _holds(folder / name)]
    if found:
        raise ValueError(
            f"{folder} holds {', '.join(found)}, but no run to go on from ({FOLDER}/{STATE}). "
            "Nothing there is replaced: choose another train.output, or remove the folder."
        )


def _holds(path: Path) -> bool:
    """A run that failed before its first step leaves an empty file of figures."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def check_same(facts: Mapping[str, Any], folder: Path, data: str, target: str) -> None:
    """A run goes on with the target and the data that it began with (their hashes)."""
    for name, what, now in (("target_hash", "target", target), ("data_hash", "data", data)):
        if facts.get(name, now) != now:
            raise ValueError(
                f"The {what} has changed since {folder} was saved, so the run cannot go on where "
                f"it stopped. Restore the {what}, or start anew in another train.output."
            )


def best_holds(facts: Mapping[str, Any], recipe: Recipe, best: Path) -> bool:
    """Whether the score of the best head so far can be compared with those to come, and the head
    that is kept is the one that has it: not where a run goes on from an older checkpoint."""
    before, now = facts["recipe"], recipe.model_dump(mode="json")
    old, new = (
        {name: value for name, value in one["eval"].items() if name not in SHOWN}
        for one in (before, now)
    )
    if old != new:
        return False
    if before.get("parallel", {}).get("target", "replicated") != now["parallel"]["target"]:
        return False
    return not is_head(best) or read_head_file(best).meta.tokens <= facts["answer_tokens"]


def choose_draft_vocab(head: DraftHead, corpus: Corpus) -> None:
    """A fresh head proposes what the target says most."""
    size = head.config.draft_vocab
    if size is not None and head.d2t is not None and bool(head.d2t[0] == UNSET):
        head.set_draft_vocab(frequent_tokens(corpus.token_counts(head.config.vocab_size), size))


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """Optimizer steps of the whole run. ValueError where the data makes none."""
    if config.steps is not None:
        return config.steps
    count = batches.count(config.epochs)
    if count < config.accumulate:
        raise ValueError(
            f"The data makes {count} batches in {config.epochs} epochs, fewer than the "
            f"{config.accumulate} of one optimizer step. Lower train.accumulate or "
            "data.batch_tokens, or bring more data."
        )
    return count // config.accumulate


def fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for values in (corpus.lengths, corpus.tokens, corpus.trained):
        digest.update(values.numpy().data)
    return digest.hexdigest()


def summary(data: Conversations) -> str:
    tokens, trained = len(data.train.tokens), int(data.train.trained.sum())
    text = f"{len(data.train)} conversations, {tokens} tokens, {trained} of them to predict"
    if data.dropped:
        text += f"; {data.dropped} dropped, which have nothing to predict"
    if data.broken:
        text += f"; {len(data.broken)} broken lines left out, the first: {data.broken[0]}"
    return text


def not_finite_advice(recipe: Recipe, target: Target, saved: int | None, where: str) -> str:
    """What may help, of that what a resumed run can change."""
    if saved is None:
        return (
            "The head's weights are not numbers before the first step: start from other weights, "
            "or with another train.seed, in another train.output."
        )
    anew = "start anew in another train.output with a lower train.lr"
    exact = target.dtype in (torch.float32, torch.float64)
    if recipe.train.precision == "float32" or not exact:
        return f"{where} It would meet the same batch: {anew}, or leave those conversations out."
    return f"{where} Add train.precision=float32 to it; if that fails too, {anew}."


@contextmanager
def memory_advice(recipe: Recipe, what_is_saved: Callable[[], str]) -> Iterator[None]:
    """Say which setting to lower when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on a CPU
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        data, loss = recipe.data, recipe.loss
        rows = loss.chunk_rows or "as many as 2 GiB hold"
        raise MemoryError(
            f"Out of memory. {what_is_saved()} A run that goes on may set loss.recompute=true, and "
            f"lower loss.chunk_rows (now {rows}). Where that is not enough, start anew in another "
            f"train.output with a lower data.batch_tokens (now {data.batch_tokens}; raise "
            "train.accumulate by the same factor to learn the same), then data.max_length (now "
            f"{data.max_length})."
        ) from error
