"""What is checked before a run starts, and what is said when a setting does not fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from headstart.model.head import UNSET, DraftHead
from headstart.model.target import Target

from .checkpoint import FOLDER
from .data import Corpus, frequent_tokens
from .recipe import Recipe, changed_on_resume
from .sources import Conversations


def check_fit(recipe: Recipe, target: Target, head: DraftHead) -> None:
    """What can be known to be wrong before data is read."""
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


def check_folder(recipe: Recipe, folder: Path, facts: Mapping[str, Any] | None) -> None:
    if not recipe.train.resume:
        if facts is not None:
            raise ValueError(
                f"{folder} already holds a run (step {facts['step']}). Go on with "
                "train.resume=true, or choose another train.output."
            )
        return
    if facts is None:
        raise ValueError(
            f"train.resume is set, but {folder / FOLDER} holds no run to go on from. Leave "
            "train.resume out to start one, or correct train.output."
        )
    changed = changed_on_resume(facts["recipe"], recipe)
    if changed:
        raise ValueError(
            "\n  ".join([f"The run in {folder} was made with other settings:", *changed])
            + "\nGo on with the same settings, or start anew in another train.output."
        )


def choose_draft_vocab(head: DraftHead, corpus: Corpus) -> None:
    """A fresh head proposes what the target says most."""
    size = head.config.draft_vocab
    if size is not None and head.d2t is not None and bool(head.d2t[0] == UNSET):
        head.set_draft_vocab(frequent_tokens(corpus.token_counts(head.config.vocab_size), size))


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


@contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """Say which setting to lower when memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError on a CPU
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in str(error):
            raise
        data, loss = recipe.data, recipe.loss
        raise MemoryError(
            f"Out of memory. Lower data.batch_tokens (now {data.batch_tokens}; raise "
            "train.accumulate by the same factor to learn the same), then data.max_length (now "
            f"{data.max_length}) or loss.chunk_rows (now {loss.chunk_rows}). "
            "The last checkpoint is intact: go on with train.resume=true."
        ) from error
