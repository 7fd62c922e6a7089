"""`headstart plan`: memory, time and cost of a training run, before it is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headstart.model.target.load import target_from_config
from headstart.scripts.console import console, say, show
from headstart.scripts.options.common import Overrides, RecipeName

if TYPE_CHECKING:
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target
    from headstart.training.config.schema import Recipe

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9}
DOES_NOT_FIT = 1  # exit status
# Settings to try where memory is short, the cheapest first.
REMEDIES: tuple[dict[str, Any], ...] = (
    {"loss.recompute": True},
    {"parallel.engine": "zero2", "loss.recompute": True},
    {"parallel.engine": "fsdp2", "loss.recompute": True},
    {"parallel.engine": "fsdp2", "loss.recompute": True, "target.quantize": "float8"},
    {"parallel.engine": "fsdp2", "loss.recompute": True, "parallel.target": "sharded"},
)


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100, h200, b200, l40s.")] = "h100",
    tokens: Annotated[
        str | None,
        typer.Option(help="Tokens of an epoch, e.g. 300M (default: those of data.path)."),
    ] = None,
    reached: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak that is reached.")
    ] = 0.3,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU hour.")] = None,
) -> None:
    """Estimate memory per GPU, time and cost; only configurations are read."""
    from headstart.scripts.options.recipe import find_recipe
    from headstart.training import cost_estimate as estimate
    from headstart.training.config.schema import load_recipe

    if gpu not in estimate.GPUS:
        raise ValueError(f"There is no GPU {gpu!r} here. There are: {', '.join(estimate.GPUS)}.")
    resolved = _resolved(load_recipe(find_recipe(recipe), overrides or []))
    target, head = shapes(resolved)
    kind = estimate.GPUS[gpu]
    parts = estimate.memory(resolved, target, head, gpus)
    needed = estimate.total_gb(parts)
    _show(parts, needed, f"{gpus} x {gpu}, {kind.memory_gb:.0f} GB each")
    count = _tokens(tokens, resolved)
    flops = estimate.flops_per_token(resolved, target, head)
    speed = gpus * reached * kind.tflops * 1e12 / flops
    hours = count * resolved.train.epochs / speed / 3600
    say(
        f"{flops / 1e9:.2f} GFLOP per token: {speed:,.0f} tokens/s at {reached:.0%} of the peak, "
        f"{hours:.2f} hours for {count * resolved.train.epochs:,.0f} tokens"
        + ("" if price is None else f", cost {hours * gpus * price:.2f}")
    )
    fits = needed <= kind.memory_gb
    if not fits:
        show(_advice(resolved, target, head, gpus, kind.memory_gb))
    estimates: dict[str, Any] = {"fits": fits, "gb": round(needed, 2), "hours": hours}
    estimates |= {"tokens_per_second": speed, "flops_per_token": flops}
    estimates |= {"bytes": {name: int(value) for name, value in parts.items()}}
    print(json.dumps(estimates))
    if not fits:
        raise typer.Exit(DOES_NOT_FIT)


def shapes(recipe: Recipe) -> tuple[Target, DraftHead]:
    """Return target and head of a recipe, without weights."""
    import torch

    from headstart.scripts.options.recipe import head_of

    if recipe.target.name is None:
        raise ValueError("A random target needs no plan: name a model in target.name.")
    target = target_from_config(recipe.target.name, revision=recipe.target.revision)
    with torch.device("meta"):
        return target, head_of(recipe, target)


def _resolved(recipe: Recipe) -> Recipe:
    """Return the recipe as it would run on GPUs."""
    changes: dict[str, Any] = {}
    if recipe.parallel.engine == "auto":
        changes["parallel.engine"] = "ddp"
    if recipe.train.precision == "auto":
        changes["train.precision"] = "bfloat16"
    return _changed(recipe, changes)


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    for key, value in changes.items():
        section, name = key.split(".")
        inner = getattr(recipe, section).model_copy(update={name: value})
        recipe = recipe.model_copy(update={section: inner})
    return recipe


def _advice(recipe: Recipe, target: Target, head: DraftHead, gpus: int, room: float) -> str:
    from headstart.training import cost_estimate as estimate

    for changes in REMEDIES:
        needed = estimate.total_gb(estimate.memory(_changed(recipe, changes), target, head, gpus))
        if needed <= room and (gpus > 1 or set(changes) == {"loss.recompute"}):
            named = " ".join(f"{key}={str(value).lower()}" for key, value in changes.items())
            return f"It does not fit. With {named} it takes {needed:.1f} GB."
    return (
        "It does not fit, whatever is sharded. Take more or larger GPUs, or lower "
        f"data.global_batch_tokens (now {recipe.data.global_batch_tokens}) and data.max_length "
        f"(now {recipe.data.max_length})."
    )


def _show(parts: dict[str, float], needed: float, title: str) -> None:
    table = Table("memory per GPU", "GB", title=title)
    for name, value in parts.items():
        table.add_row(name, f"{value / 1e9:.2f}")
    table.add_row("with CUDA and the allocator's slack", f"{needed:.2f}", style="bold")
    console.print(table)


def _tokens(given: str | None, recipe: Recipe) -> float:
    """Return the tokens of one epoch."""
    if given is not None:
        unit = UNITS.get(given[-1:].lower())
        try:
            return float(given[:-1]) * unit if unit else float(given)
        except ValueError as error:
            raise ValueError(f"--tokens is {given!r}. Write a number, e.g. 300M.") from error
    paths = [Path(path) for path in recipe.data.paths]
    if not paths or not all(path.is_file() for path in paths):
        raise ValueError(
            "The data is not here to be counted. Give the tokens of an epoch, e.g. --tokens 300M."
        )
    return float(sum(_lengths(paths, recipe.data.max_length)))


def _lengths(paths: list[Path], longest: int) -> Iterator[int]:
    for path in paths:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                found = json.loads(line).get("tokens") if line.strip() else []
                if found is None:
                    raise ValueError(
                        f"{path}, line {number} holds messages, which are not counted here. Say "
                        "how many tokens an epoch has, e.g. --tokens 300M."
                    )
                yield min(len(found), longest)
