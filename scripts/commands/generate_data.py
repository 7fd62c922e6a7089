"""`headstart data`: generate on-policy training data, the target's own responses to prompts."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.model.target.load import load_target
from headstart.scripts.console import progress, show
from headstart.scripts.options.common import (
    Dtype,
    Limit,
    MaxNewTokens,
    Seed,
    Temperature,
    TopK,
    TopP,
)

if TYPE_CHECKING:
    from headstart.inference.config import SamplingParams
    from headstart.inference.rollout import Prompt
    from headstart.model.target.target import Target

SAMPLING_SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


def data(
    prompts: Annotated[
        list[str], typer.Argument(help="Prompts: JSONL files, local data sets or Hub data sets.")
    ],
    target: Annotated[str, typer.Option(help="Target: Hub id, folder or .gguf file.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write; finished responses are kept.")],
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 32,
    limit: Limit = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    skip_broken: Annotated[bool, typer.Option(help="Skip invalid lines.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Generate the target's responses to prompts, with the sampling it will be served with."""
    from headstart.inference.config import SamplingParams
    from headstart.scripts.options.prompts import read_prompts

    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, seed=seed)
    wanted, broken = read_prompts(
        prompts,
        split=split,
        skip_broken=skip_broken,
        remedy="Mend or remove the line, or leave such lines out with --skip-broken.",
    )
    for note in broken:
        show(f"left out: {note}")
    count = write_responses(
        load_target(target, dtype=dtype), wanted[:limit], sampling, out, batch_size=batch_size
    )
    show(f"{count} responses in {out}")


def write_responses(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    out: Path,
    *,
    batch_size: int,
    seconds: float | None = None,
) -> int:
    """Generate the responses that `out` does not have yet; the number of records there afterwards.

    sampling: its settings are saved beside the file, and a file made with others is refused.
    seconds: start no batch after that time, except the first one.
    """
    from headstart.inference.rollout import generate_responses
    from headstart.model.target.weights_hash import target_hash

    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"target": target_hash(target), "dtype": str(target.dtype)}
    settings |= {name: getattr(sampling, name) for name in SAMPLING_SETTINGS}
    _check_settings(out, settings)
    done = _finished(out)
    left = [one for one in prompts if f"{one.id}/{len(one.turns) - 1}" not in done]
    turns = sum(len(one.turns) for one in left)
    tokens = written = 0
    began = time.monotonic()
    with out.open("a", encoding="utf-8") as file, progress("generating", turns) as update:
        batches = generate_responses(
            target,
            left,
            sampling,
            batch_size=batch_size,
            skipped=lambda name, why: show(f"skipped {name}: {why}"),
        )
        for records in batches:
            for record in records:
                written += 1
                tokens += record["spans"][-1][1] - record["spans"][-1][0]
                if record["id"] not in done:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    done.add(record["id"])
            file.flush()
            update(written, f"{tokens:,} tokens")
            if seconds is not None and time.monotonic() - began > seconds:
                break
    return len(done)


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    beside = out.with_name(f"{out.name}.settings.json")
    text = json.dumps(settings, indent=2) + "\n"
    if not out.exists():
        beside.write_text(text, encoding="utf-8")
        return
    before = beside.read_text(encoding="utf-8") if beside.exists() else "unknown settings\n"
    if before != text:
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
        beside = out.with_name(f"{out.name}.part")
        beside.write_bytes(complete)
        os.replace(beside, out)
    ids = set()
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            ids.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out}:{number} is no response ({type(error).__name__}: {error}), so it is "
                "unknown which prompts are done. Fix or remove the line, or choose another --out."
            ) from error
    return ids
