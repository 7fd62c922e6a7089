"""`headstart features`: store what a target sees, for training without reading again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from headstart.scripts.console import progress, say


def features(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; an unfinished one goes on.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key.sub=value.")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or float8; the target's own if left out."),
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a file.")] = 512,
) -> None:
    """Store the layers that the recipe's head reads; train with data.features=FOLDER."""
    from headstart.training.config.schema import load_recipe
    from headstart.training.data import hidden_states as store
    from headstart.training.data.conversations import read_conversations
    from headstart.training.distributed.launcher import world_size

    from .train import find_recipe, head_of, open_target

    if kind is not None and kind not in store.BYTES:
        raise ValueError(f"There is no kind {kind!r}. Choose one of {', '.join(store.BYTES)}.")
    resolved = load_recipe(find_recipe(recipe), overrides or [])
    if world_size() > 1 or resolved.parallel.target != "replicated":
        raise ValueError(
            "`headstart features` runs in one process that holds the whole target: start it "
            "without torchrun, and leave parallel.target out."
        )
    target = open_target(resolved)
    head = head_of(resolved, target)
    data = read_conversations(resolved.data, target, resolved.train.seed)
    wanted = store.wanted(data, target, head.taps, cast("store.Kind | None", kind))
    size = store.size_bytes(wanted, data)
    layers = ", ".join(map(str, wanted.layers)) or "none"
    say(
        f"{wanted.rows} conversations, layers {layers} and the LM head's input as {wanted.kind}: "
        f"{size / 1e9:.3f} GB in {out}"
    )
    with progress("storing features", wanted.rows) as update:
        done = store.write_features(
            out,
            wanted,
            data,
            target,
            batch_tokens=resolved.data.global_batch_tokens,
            shard_bytes=shard_mb * 1_000_000,
            progress=lambda rows, total: update(rows, "", total),
        )
    say(f"{len(done.shards)} files; storing changed the values by {done.error:.2%} (rms)")
