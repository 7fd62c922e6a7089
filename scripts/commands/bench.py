"""`headstart bench`: suites of prompts in many settings, with and without drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.benchmarks.matrix import BASELINES, DTYPES, BenchmarkMatrix, Plan
from headstart.scripts.benchmarks.report import check_extra
from headstart.scripts.options.common import Checkpoint, MaxNewTokens, Seed
from headstart.scripts.options.parse import parse_choices, parse_sizes
from headstart.scripts.options.tree_budget import HELP, check_budgets


def bench(
    folder: Checkpoint = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Prompts: FILE.jsonl, train, dev, heldout, or OWNER/NAME:COLUMN of a data set; "
            "repeatable (default: heldout)."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts per suite (default: all).")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    batch_size: Annotated[str, typer.Option(help="Prompts per batch, e.g. 1,4,16.")] = "1",
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens to fill prompts up to, e.g. 256,2k (default: prompts as they are)."
        ),
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Sampling temperature; repeatable (default: 0, greedy)."),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option(callback=check_budgets, help=f"{HELP} Repeatable.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Some of {', '.join(DTYPES)}, separated by commas.")
    ] = "auto",
    baselines: Annotated[
        str,
        typer.Option(help=f"Some of {', '.join(BASELINES)}; autoregressive always runs."),
    ] = "autoregressive,generate,prompt_lookup",
    price: Annotated[
        float | None, typer.Option(min=0, help="Dollars per hour of the machine (default: none).")
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report (default: none is written).")
    ] = None,
) -> None:
    """Measure acceptance length, speed, memory and exactness on suites of prompts."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint
    from headstart.scripts.options.suites import read_suites

    plan = Plan(
        max_new_tokens=max_new_tokens,
        batch_sizes=parse_sizes(batch_size, "--batch-size"),
        contexts=(None,) if context is None else parse_sizes(context, "--context"),
        temperatures=tuple(dict.fromkeys(temperature or [0.0])),
        budgets=tuple(budget or []),
        dtypes=parse_choices(dtype, DTYPES, "--dtype"),
        baselines=parse_choices(baselines, BASELINES, "--baselines"),
        price=price,
        seed=seed,
        out=out,
    )
    if out is not None:  # before the work: a missing package would waste it
        check_extra()
        out.mkdir(parents=True, exist_ok=True)
    suites = read_suites(suite or ["heldout"], limit)
    BenchmarkMatrix(plan, suites, folder or shipped_checkpoint()).run()
