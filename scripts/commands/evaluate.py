"""`headstart eval`: acceptance length, speed and exactness of a fused checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import report_kept_card
from headstart.scripts.options.common import (
    Budget,
    Checkpoint,
    Dtype,
    Limit,
    MaxNewTokens,
    PromptSet,
    Quantize,
)
from headstart.scripts.options.quantize_report import report_quantization


def evaluate(
    folder: Checkpoint = None,
    prompts: PromptSet = "heldout",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
    budget: Budget = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the metrics.")] = None,
    record: Annotated[
        bool, typer.Option(help="Store the metrics in the checkpoint and on its model card.")
    ] = False,
) -> None:
    """Decode prompts with and without the head, in turn, and compare."""
    from headstart.model.checkpoint.atomic import replace_text
    from headstart.model.checkpoint.download import require_folder
    from headstart.model.checkpoint.fused import load_fused
    from headstart.model.checkpoint.fused import record as store
    from headstart.scripts.options.comparison import (
        compare,
        first_turn_cases,
        measurement,
        show_comparison,
    )
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint
    from headstart.scripts.options.prompts import decodable
    from headstart.scripts.options.tree_budget import speculative_config

    if out is not None:  # before the work: a path that cannot be written would waste it
        if out.is_dir():
            raise ValueError(f"{out} is a folder. Name a file for the metrics, such as {out}.json.")
        out.parent.mkdir(parents=True, exist_ok=True)
    folder = folder or shipped_checkpoint()
    if record:
        require_folder(folder, "--record")
    target, head = load_fused(folder, dtype=dtype, quantize=quantize)
    report_quantization(target)
    cases = first_turn_cases(target, decodable(prompts, limit, target))
    config = speculative_config(target, head, budget)
    report = compare(target, {head.kind: config}, cases, max_new_tokens)
    show_comparison(report)
    if out is not None:
        replace_text(out, json.dumps(report, indent=2) + "\n")
    if record:
        measured = measurement(report, head.kind, Path(prompts).name, max_new_tokens)
        report_kept_card(store(folder, head, measured), folder)
    print(json.dumps(report))
