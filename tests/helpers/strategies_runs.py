"""Runs of the same recipe in one process and in several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from processes import launch_together
from resident_workers import run_together
from strategies_worker import decoded, recipe_for
from tiny_run import (
    VOCAB,
    mixed_rows,
    tiny_head,
    tiny_target,
    write_rows,
)

from headstart.training.config.schema import Recipe
from headstart.training.data.batching import Batches
from headstart.training.data.conversations import read_conversations
from headstart.training.trainer import train


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_per_batch(recipe: Recipe) -> list[int]:
    corpus = read_conversations(recipe.data, tiny_target(), recipe.train.seed).train
    batches = Batches(corpus.lengths, recipe.data.global_batch_tokens, recipe.train.seed)
    return [len(batches.at(position)) for position in range(batches.count(1))]


def alone(folder: Path, data: Path, settings: dict) -> None:
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    train(recipe_for(folder, data, settings), target=target, head=head, evaluate=decoded)


def together(
    folder: Path, data: Path, processes: int, settings: dict, launcher: Sequence[str] = ()
) -> list[dict]:
    """Train in several processes; what each reports of itself. launcher: starts them."""
    given = (folder, data, json.dumps(settings))
    if launcher:
        done = launch_together(processes, "strategies_worker.py", *given, launcher=launcher)
    else:
        done = run_together(processes, "strategies_worker.py", *given)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank_{n}.json").read_text()) for n in range(processes)]


def write_data(folder: Path) -> Path:
    # The long rows fill a batch alone, so that one rank has no sequence in some batches.
    torch.manual_seed(0)
    long_rows = [torch.randint(0, VOCAB, (32,)).tolist() for _ in range(3)]
    data = write_rows(folder / "data.jsonl", mixed_rows(20) + long_rows)
    assert 1 in rows_per_batch(recipe_for(folder, data, {}))
    return data
