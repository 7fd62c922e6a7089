"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headstart.scripts.console import check_top_p

from .quantize_report import QUANTIZE_HELP
from .tree_budget import HELP, check_budget

Checkpoint = Annotated[
    Path | None,
    typer.Argument(help="Fused checkpoint, a folder or Hub id (default: the shipped one)."),
]
PromptSet = Annotated[
    str, typer.Option(help="Prompts: a JSONL file, or the shipped train, dev or heldout.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Number of prompts (default: all).")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum new tokens per response.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")]
TopK = Annotated[
    int | None,
    typer.Option(min=1, help="Sample from the k likeliest tokens (default: from all)."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        callback=check_top_p,
        help="Sample from the smallest set of tokens with this probability (default: from all).",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling noise.")]
Budget = Annotated[str | None, typer.Option(callback=check_budget, help=HELP)]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32 or bfloat16.")]
Quantize = Annotated[str | None, typer.Option(help=QUANTIZE_HELP)]
RecipeName = Annotated[str, typer.Argument(help="Recipe: YAML file or name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to override: section.key=value.")
]
