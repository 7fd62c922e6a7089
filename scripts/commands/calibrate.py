"""`headstart calibrate`: calibrate the probabilities of a checkpoint's head."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headstart.scripts.console import console, progress, report_kept_card, show
from headstart.scripts.options.common import Dtype

if TYPE_CHECKING:
    from headstart.model.checkpoint.metadata import HeadMeta
    from headstart.model.target.target import Target
    from headstart.training.data.batching import Corpus

MAX_LENGTH = 2048  # tokens per conversation


def calibrate(
    folder: Annotated[Path, typer.Argument(help="Fused checkpoint: folder.")],
    responses: Annotated[
        Path, typer.Option(help="JSONL of the target's responses that the head was not trained on.")
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of conversations (default: all).")
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Draft depth to calibrate.")] = 6,
    width: Annotated[int, typer.Option(min=1, help="Candidates per node to measure.")] = 3,
    dtype: Dtype = "auto",
) -> None:
    """Fit a temperature per depth and measure the acceptance rate of each rank; weights stay."""
    from headstart.model.checkpoint.download import require_folder
    from headstart.model.checkpoint.fused import load_fused, rewrite_meta
    from headstart.model.checkpoint.head import read_head_file
    from headstart.training.evaluation.calibration import calibrate as fit

    require_folder(folder, "Calibrating")
    target, head = load_fused(folder, dtype=dtype)
    corpus = read_responses(responses, target)
    with progress("calibrating", None) as update:
        calibration = fit(
            head,
            corpus,
            steps=depth,
            width=width,
            conversations=limit,
            report=lambda done, most: update(done, "response tokens", most),
        )
    meta = calibration.noted(read_head_file(folder).meta)
    report_kept_card(rewrite_meta(folder, head, meta), folder)
    console.print(table(meta))
    show(f"{folder} is {calibration.summary()}")


def read_responses(path: Path, target: Target) -> Corpus:
    """All conversations of a file, truncated to the target's context."""
    from headstart.training.config.schema import DataConfig
    from headstart.training.data.conversations import read_conversations

    length = min(MAX_LENGTH, target.context_limit or MAX_LENGTH)
    config = DataConfig(path=str(path), max_length=length, global_batch_tokens=length)
    return read_conversations(config, target, seed=0).train


def table(meta: HeadMeta) -> Table:
    """A row per depth: calibration error before and after, and acceptance rate by rank."""
    shown = Table(title="Calibration per depth", title_justify="left")
    for column in ("depth", "positions", "temperature", "error before", "after"):
        shown.add_column(column, justify="right")
    shown.add_column("acceptance by rank")
    for depth, (rows, temperature, (before, after), ranks) in enumerate(
        zip(
            meta.calibration_positions,
            meta.temperatures,
            meta.calibration_errors,
            meta.rank_acceptance,
            strict=True,
        ),
        start=1,
    ):
        shown.add_row(
            str(depth),
            f"{rows:,}",
            f"{temperature:.2f}",
            f"{before:.3f}",
            f"{after:.3f}",
            " ".join(f"{share:.3f}" for share in ranks),
        )
    return shown
