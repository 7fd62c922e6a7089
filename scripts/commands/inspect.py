"""`headstart inspect`: show training data with its loss mask, and the metadata of a head."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from headstart.model.target.load import load_target
from headstart.scripts.console import console, say


def inspect_data(
    path: Annotated[
        str, typer.Argument(help="Conversations: JSONL file, local data set or Hub data set.")
    ],
    target: Annotated[str, typer.Option(help="Target, for its tokenizer and chat template.")],
    count: Annotated[int, typer.Option(min=1, help="Number of conversations to print.")] = 3,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    max_length: Annotated[int, typer.Option(min=3, help="Maximum tokens per conversation.")] = 2048,
) -> None:
    """Print conversations; tokens that the loss covers have a green background."""
    from headstart.training.config.schema import DataConfig
    from headstart.training.data.conversations import read_conversations

    opened = load_target(target)
    config = DataConfig(
        path=path, split=split, max_length=max_length, global_batch_tokens=max_length
    )
    corpus = read_conversations(config, opened, seed=0).train
    trained, total = int(corpus.trained.sum()), len(corpus.tokens)
    for row in range(min(count, len(corpus))):
        begin, length = int(corpus.starts[row]), int(corpus.lengths[row])
        text = Text()
        for place in range(begin, begin + length):
            piece = opened.text([int(corpus.tokens[place])], special=True)
            text.append(piece, style="black on green" if corpus.trained[place] else "dim")
        console.rule(f"conversation {row + 1} of {len(corpus)}")
        console.print(text)
    console.rule()
    say(f"{len(corpus)} conversations, {total:,} tokens, {trained:,} trained (on green)")


def inspect_head(
    folder: Annotated[Path, typer.Argument(help="Head or fused checkpoint: folder or Hub id.")],
) -> None:
    """Print the configuration, training and measurements of a head."""
    from headstart.model.checkpoint.head import read_head_file

    file = read_head_file(folder)
    shown = Table("", str(folder))
    for name, value in file.head.items():
        shown.add_row(f"head.{name}", str(value))
    shown.add_row("target weights", file.target_hash)
    shown.add_row("written by", f"headstart {file.version}")
    for name, value in file.meta:
        shown.add_row(name, "\n".join(map(str, value)) if isinstance(value, tuple) else str(value))
    console.print(shown)
