"""`headstart eval`: accepted length, speed and exactness of a fused checkpoint."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headstart.scripts.console import console, progress, tell_kept_card
from headstart.scripts.options.quantize_report import QUANTIZE_HELP, tell_quantized
from headstart.scripts.options.tree_budget import HELP, check_budget, contestant, described

if TYPE_CHECKING:
    from headstart.inference.benchmark.runner import Result
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.checkpoint.metadata import Measurement
    from headstart.model.target.target import Target


def evaluate(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Fused checkpoint (folder or Hub id), else the shipped one."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt JSONL, or shipped: train, dev, heldout.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    budget: Annotated[str | None, typer.Option(callback=check_budget, help=HELP)] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help=QUANTIZE_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
    record: Annotated[
        bool, typer.Option(help="Add the figures to the checkpoint and to its card.")
    ] = False,
) -> None:
    """Decode prompts plainly and with the head, in turn, and compare."""
    from headstart.model.checkpoint.atomic import replace_text
    from headstart.model.checkpoint.download import only_on_disk
    from headstart.model.checkpoint.head import load_fused
    from headstart.model.checkpoint.head import record as write_down
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    if out is not None:  # before the work: a place that cannot be written to would waste it
        if out.is_dir():
            raise ValueError(f"{out} is a folder. Name a file for the figures, such as {out}.json.")
        out.parent.mkdir(parents=True, exist_ok=True)
    folder = folder or shipped_checkpoint()
    if record:
        only_on_disk(folder, "--record")
    target, head = load_fused(folder, dtype=dtype, quantize=quantize)
    tell_quantized(target)
    contestants = {head.kind: contestant(target, head, budget)}
    results = compare(target, contestants, prompts, limit, max_new_tokens)
    figures = report(target, contestants, results)
    if out is not None:
        replace_text(out, json.dumps(figures, indent=2) + "\n")
    if record:
        name = Path(prompts).name if prompts else "heldout.jsonl"
        figure = measurement(figures, head.kind, name, max_new_tokens)
        tell_kept_card(write_down(folder, head, figure), folder)
    print(json.dumps(figures))


def measurement(
    figures: Mapping[str, Any], name: str, prompts: str, max_new_tokens: int
) -> Measurement:
    """One contestant's figures in the form that a checkpoint keeps."""
    from headstart.model.checkpoint.metadata import Measurement

    one, tree, where = figures["results"][name], figures["trees"][name], figures["conditions"]
    return Measurement(
        prompts=f"{prompts}, {one['prompts']} prompts, {max_new_tokens} tokens each at most",
        tokens=one["tokens"],
        acceptance_length=one["acceptance_length"],
        acceptance=tuple(one["acceptance_per_depth"]),
        speedup=one["speedup"],
        answers=one["prompts"],
        identical=one["identical"],
        conditions=(
            f"{where['device']}, {where['threads']} threads, {where['dtype']}, greedy, trees of "
            f"{tree['nodes']} nodes (depth {tree['depth']}, width {tree['width']}), budget "
            f"{tree['budget']}, {'with' if tree['lookup'] else 'without'} lookup, "
            f"torch {where['torch']}, transformers {where['transformers']}"
        ),
    )


def compare(
    target: Target,
    contestants: Mapping[str, SpeculativeConfig],
    prompts: str | None,
    limit: int | None,
    max_new_tokens: int,
) -> dict[str, Result]:
    """Decode the first turns of a prompt file with everyone, in turn."""
    from headstart.inference.benchmark.runner import measure
    from headstart.scripts.options.prompts import decodable, first_turns

    ids = first_turns(target, decodable(prompts or "heldout", limit, target))
    with progress("decoding", len(ids)) as update:
        return measure(target, contestants, ids, max_new_tokens=max_new_tokens, report=update)


def report(
    target: Target, contestants: Mapping[str, SpeculativeConfig], results: Mapping[str, Result]
) -> dict[str, Any]:
    """Show the table; the figures with their conditions."""
    console.print(table(results))
    figures = summaries(results)
    shapes = {name: described(one) for name, one in contestants.items()}
    return {"conditions": conditions(target), "trees": shapes, "results": figures}


def summaries(results: Mapping[str, Result]) -> dict[str, dict[str, Any]]:
    from headstart.inference.benchmark.runner import PLAIN

    return {name: result.summary(results[PLAIN]) for name, result in results.items()}


def table(results: Mapping[str, Result]) -> Table:
    """A row each: exactness, acceptance, speed, and where the time went."""
    shown = Table(title="Held-out prompts, greedy, batch 1", title_justify="left")
    for column in ("", "identical", "accepted length", "acceptance per depth", "tokens/s"):
        shown.add_column(column, justify="left" if not column else "right")
    shown.add_column("speed-up", justify="right")
    shown.add_column("draft / verify / host / prompt", justify="right")
    for name, figures in summaries(results).items():
        seconds = figures["seconds"]
        total = sum(seconds.values())
        split = [seconds[phase] / total for phase in ("draft", "verify", "host", "prefill")]
        shown.add_row(
            name,
            f"{figures['identical']}/{figures['prompts']}",
            f"{figures['accepted_length']:.2f}",
            " ".join(f"{rate:.2f}" for rate in figures["acceptance_per_depth"]) or "-",
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['speedup']:.2f}x",
            " / ".join(f"{part:.0%}" for part in split),
        )
    return shown


def conditions(target: Target) -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    from headstart.inference.engine.measure_costs import device_name

    return {
        "target": target.name,
        "dtype": target.quantized or str(target.dtype).removeprefix("torch."),
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("headstart", "torch", "transformers")},
    }
