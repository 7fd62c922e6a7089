"""`headstart calibrate`: make the probabilities of a checkpoint's head mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from headstart.scripts.console import console, progress, show, tell_kept_card

if TYPE_CHECKING:
    from headstart.model.checkpoint.metadata import HeadMeta
    from headstart.model.target.target import Target
    from headstart.training.data.batching import Corpus

MAX_LENGTH = 2048  # tokens of a conversation that are read


def calibrate(
    folder: Annotated[Path, typer.Argument(help="Fused checkpoint.")],
    answers: Annotated[
        Path, typer.Option(help="JSONL of the target's answers that the head was not trained on.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first conversations.")] = None,
    depth: Annotated[int, typer.Option(min=1, help="Guesses ahead to measure.")] = 6,
    width: Annotated[int, typer.Option(min=1, help="Guesses per node that a tree takes.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Fit a temperature per depth, and measure how often each guess comes; the weights stay."""
    from headstart.model.checkpoint.download import only_on_disk
    from headstart.model.checkpoint.head import load_fused, read_head_file, rewrite_meta
    from headstart.training.evaluation.calibration import calibrate as fit

    only_on_disk(folder, "Calibrating")
    target, head = load_fused(folder, dtype=dtype)
    corpus = read_answers(answers, target)
    with progress("calibrating", None) as update:
        found = fit(
            head,
            corpus,
            steps=depth,
            width=width,
            conversations=limit,
            report=lambda done, most: update(done, "answer tokens", most),
        )
    meta = found.noted(read_head_file(folder).meta)
    tell_kept_card(rewrite_meta(folder, head, meta), folder)
    console.print(table(meta))
    show(f"{folder} is {found.summary()}")


def read_answers(path: Path, target: Target) -> Corpus:
    """Every conversation of a file, cut to what the target reads."""
    from headstart.training.config.schema import DataConfig
    from headstart.training.data.conversations import read_conversations

    length = min(MAX_LENGTH, target.context_limit or MAX_LENGTH)
    config = DataConfig(path=str(path), max_length=length, global_batch_tokens=length)
    return read_conversations(config, target, seed=0).train


def table(meta: HeadMeta) -> Table:
    """A row per depth: how the probabilities changed, and what comes of each rank."""
    shown = Table(title="Calibration per depth", title_justify="left")
    for column in ("depth", "positions", "temperature", "error before", "after"):
        shown.add_column(column, justify="right")
    shown.add_column("acceptance by rank")
    for depth, (rows, temperature, (before, after), ranks) in enumerate(
        zip(
            meta.calibration_rows,
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
