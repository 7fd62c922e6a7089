"""`headstart features`: cache hidden states of the target, so that training does not run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from headstart.scripts.console import progress, say
from headstart.scripts.options.common import Overrides, RecipeName


def features(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="Folder to write to; an unfinished one is resumed.")],
    overrides: Overrides = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Storage dtype: float32, bfloat16, float16, float8 (default: the target's)."
        ),
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Maximum size of a file, in MB.")] = 512,
) -> None:
    """Cache the hidden states that the recipe's head reads; train with data.features=FOLDER."""
    from headstart.scripts.options.recipe import find_recipe, head_of, open_target
    from headstart.training.config.schema import load_recipe
    from headstart.training.data import hidden_states as store
    from headstart.training.data.conversations import read_conversations
    from headstart.training.distributed.launcher import world_size

    if dtype is not None and dtype not in store.BYTES:
        raise ValueError(f"--dtype is {dtype!r}. Choose one of {', '.join(store.BYTES)}.")
    resolved = load_recipe(find_recipe(recipe), overrides or [])
    if world_size() > 1 or resolved.parallel.target != "replicated":
        raise ValueError(
            "`headstart features` runs in one process with the whole target: start it without "
            "torchrun, and remove parallel.target."
        )
    target = open_target(resolved)
    head = head_of(resolved, target)
    data = read_conversations(resolved.data, target, resolved.train.seed)
    wanted = store.wanted(data, target, head.taps, cast("store.Kind | None", dtype))
    size = store.size_bytes(wanted, data)
    layers = ", ".join(map(str, wanted.layers)) or "none"
    say(
        f"{wanted.rows} conversations; layers {layers} and the LM head's input in {wanted.kind}: "
        f"{size / 1e9:.3f} GB in {out}"
    )
    with progress("caching hidden states", wanted.rows) as update:
        done = store.write_features(
            out,
            wanted,
            data,
            target,
            batch_tokens=resolved.data.global_batch_tokens,
            shard_bytes=shard_mb * 1_000_000,
            progress=lambda rows, total: update(rows, "", total),
        )
    say(f"{len(done.shards)} files; rounding error of the stored values: {done.error:.2%} (rms)")
