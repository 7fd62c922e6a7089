"""Runs with hidden states from disk."""

from __future__ import annotations

from pathlib import Path

from tiny_run import tiny_head, tiny_recipe

from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.data import hidden_states as store
from headstart.training.data.conversations import Conversations, read_conversations

STEPS = 6


def recipe_for(folder: Path, data: Path, features: Path | None = None, **changed) -> Recipe:
    values = tiny_recipe(folder, data, steps=STEPS, accumulate=2, log_every=1, lr=1e-3)
    values = values.model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "global_batch_tokens": 64} | changed
    if features is not None:
        values["data"]["features"] = str(features)
    return make_recipe(values | {"head": {"kind": "eagle3"}, "eval": {"every": 3}})


def conversations(recipe: Recipe, target: Target) -> Conversations:
    return read_conversations(recipe.data, target, recipe.train.seed)


def write(folder: Path, recipe: Recipe, target: Target, kind=None, **settings) -> store.Index:
    data = conversations(recipe, target)
    head = tiny_head(target, "eagle3")
    wanted = store.wanted(data, target, head.taps, kind)
    return store.write_features(
        folder, wanted, data, target, **{"batch_tokens": 64, "shard_bytes": 20_000} | settings
    )
