"""The comparison of decoding with and without drafts, for `eval`, `demo` and `graft`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from headstart.scripts.console import console, progress

from .environment import environment
from .tree_budget import describe

if TYPE_CHECKING:
    from headstart.inference.benchmark.metrics import Case
    from headstart.inference.config import SpeculativeConfig
    from headstart.inference.rollout import Prompt
    from headstart.model.checkpoint.metadata import Measurement
    from headstart.model.target.target import Target

PHASES = ("draft", "verify", "host", "prefill")


def first_turn_cases(target: Target, prompts: Sequence[Prompt]) -> list[Case]:
    """The first turns of prompts, tokenized for the target."""
    from headstart.inference.benchmark.metrics import Case

    from .prompts import first_turns

    ids = first_turns(target, prompts)
    return [Case(prompt.id, tuple(tokens)) for prompt, tokens in zip(prompts, ids, strict=True)]


def compare(
    target: Target,
    configs: Mapping[str, SpeculativeConfig],
    cases: Sequence[Case],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Decode prompts greedily, autoregressively and with each configuration, in turn.

    Returns `environment`, `configs` and `results` by name, as JSON.
    """
    from headstart.inference.benchmark.metrics import summaries
    from headstart.inference.benchmark.runner import headstart_runners, run_benchmark
    from headstart.inference.config import SamplingParams

    with progress("decoding", len(cases)) as update:
        result = run_benchmark(
            target,
            headstart_runners(target, configs),
            cases,
            SamplingParams(max_new_tokens),
            on_batch=update,
        )
    return {
        "environment": environment(target),
        "configs": {name: describe(config) for name, config in configs.items()},
        "results": summaries(result.metrics),
    }


def show_comparison(report: Mapping[str, Any]) -> None:
    """Print a row per configuration: exactness, acceptance, speed, and where the time went."""
    table = Table(title="Held-out prompts, greedy, batch size 1", title_justify="left")
    for column in ("", "identical", "acceptance length", "rate per position", "tokens/s"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_column("speed-up", justify="right")
    table.add_column(" / ".join(PHASES), justify="right")
    for name, metrics in report["results"].items():
        seconds = metrics["seconds"]
        table.add_row(
            name,
            f"{metrics['identical']}/{metrics['compared']}" if metrics["compared"] else "-",
            f"{metrics['acceptance_length']:.2f}",
            rates(metrics),
            f"{metrics['tokens_per_second']:.1f}",
            f"{metrics['speedup_over_autoregressive']:.2f}x",
            " / ".join(f"{seconds[phase] / seconds['total']:.0%}" for phase in PHASES),
        )
    console.print(table)


def rates(metrics: Mapping[str, Any]) -> str:
    """The acceptance rate of each position, for a table."""
    return " ".join(f"{rate:.2f}" for rate in metrics["acceptance_rate_per_position"]) or "-"


def measurement(
    report: Mapping[str, Any], name: str, prompts: str, max_new_tokens: int
) -> Measurement:
    """The metrics of one configuration as a checkpoint stores them."""
    from headstart.model.checkpoint.metadata import Measurement

    metrics, config = report["results"][name], report["configs"][name]
    where = report["environment"]
    return Measurement(
        prompts=f"{prompts}, {metrics['prompts']} prompts, at most {max_new_tokens} tokens each",
        tokens=metrics["tokens"],
        acceptance_length=metrics["acceptance_length"],
        acceptance_rates=tuple(metrics["acceptance_rate_per_position"]),
        speedup=metrics["speedup_over_autoregressive"],
        responses=metrics["compared"],
        identical=metrics["identical"],
        conditions=(
            f"{where['device']}, {where['threads']} threads, {where['dtype']}, greedy, trees of "
            f"{config['nodes']} nodes (depth {config['depth']}, width {config['width']}), budget "
            f"{config['budget']}, {'with' if config['ngram'] else 'without'} n-gram drafts, "
            f"torch {where['torch']}, transformers {where['transformers']}"
        ),
    )
