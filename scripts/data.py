"""`headstart data`: the target answers prompts, and its answers become training data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .ui import progress, say


def data(
    prompts: Annotated[
        list[str], typer.Argument(help="JSONL files, local data sets or Hub data set names.")
    ],
    target: Annotated[str, typer.Option(help="Hub id, folder or .gguf file.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; finished answers are kept.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    skip_broken: Annotated[bool, typer.Option(help="Leave broken lines out.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Let the target answer prompts with the sampling it will be served with."""
    from headstart.inference.answer import AnswerSettings
    from headstart.model.target import Target

    from .prompts import read_prompts

    settings = AnswerSettings(max_new_tokens, temperature, top_k, top_p, seed)
    wanted, broken = read_prompts(prompts, split=split, skip_broken=skip_broken)
    for note in broken:
        say(f"[yellow]left out:[/] {note}")
    count = write_answers(
        Target.load(target, dtype=dtype), wanted[:limit], settings, out, batch_size=batch_size
    )
    say(f"{count} answers in {out}")


def write_answers(
    target: Any, prompts: Sequence[Any], settings: Any, out: Path, *, batch_size: int
) -> int:
    """Answer what is not yet answered in `out`; the number of records there afterwards.

    Settings are kept beside the file, and a file made with other settings is refused.
    """
    from headstart.inference.answer import answer

    out.parent.mkdir(parents=True, exist_ok=True)
    _same_settings(out, {"target": target.name, "dtype": str(target.dtype), **asdict(settings)})
    done = _finished(out)
    left = [one for one in prompts if f"{one.id}/{len(one.turns) - 1}" not in done]
    turns = sum(len(one.turns) for one in left)
    tokens = written = 0
    with out.open("a", encoding="utf-8") as file, progress("answering", turns) as update:
        records = answer(
            target,
            left,
            settings,
            batch_size=batch_size,
            skipped=lambda name, why: say(f"[yellow]skipped {name}:[/] {why}"),
        )
        for record in records:
            written += 1
            tokens += record["spans"][-1][1] - record["spans"][-1][0]
            if record["id"] not in done:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                done.add(record["id"])
            update(written, f"{tokens:,} tokens")
    return len(done)


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    beside = out.with_suffix(".settings.json")
    text = json.dumps(settings, indent=2) + "\n"
    if not out.exists():
        beside.write_text(text)
    elif not beside.exists() or beside.read_text() != text:
        before = beside.read_text() if beside.exists() else "unknown settings\n"
        raise ValueError(
            f"{out} was made with other settings, and the two must not be mixed. There: {before}"
            f"Now: {text}Choose another --out, or remove the file."
        )


def _finished(out: Path) -> set[str]:
    """Ids of complete records; a last line that was cut off by an interruption is removed."""
    if not out.exists():
        return set()
    text = out.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        beside = out.with_suffix(".part")
        beside.write_bytes(complete)
        os.replace(beside, out)
    return {json.loads(line)["id"] for line in complete.splitlines()}
