"""What `headstart bench` is asked for: suites of prompts, and lists in options.

A suite is a prompt file, a folder or a data set on the Hub:

    heldout                          prompts that come with the package (train, dev, heldout)
    gsm8k.jsonl                      a prompt file, as everywhere
    gsm8k.jsonl:question             one of its columns
    openai/openai_humaneval:prompt   a column of a data set on the Hub, or of a local folder
    openai/gsm8k/main:question       one with a configuration

Of a data set the split `test` is taken, else its first one. Of a conversation only the first turn
is answered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.inference.benchmark.baselines import Case
from headstart.inference.rollout import Prompt, prompt_ids
from headstart.model.target.target import Target

from .prompts import first_turns, read_prompts, shipped_prompts

FILE = (".jsonl", ".json")
COLUMN = re.compile(r"(?P<source>.+):(?P<column>[^:/\\.]+)")  # no drive letter, no address
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?")
STRIDE = 997  # tokens between the beginnings of two fillers


@dataclass(frozen=True)
class Suite:
    """Prompts under a name that is short enough for a table."""

    name: str
    prompts: list[Prompt]


@dataclass(frozen=True)
class Plan:
    """What was asked for; every dtype, context, temperature and batch is combined with all others.

    contexts: tokens that prompts are filled up to, None for prompts as they are.
    """

    max_new_tokens: int
    batches: tuple[int, ...]
    contexts: tuple[int | None, ...]
    temperatures: tuple[float, ...]
    budgets: tuple[str, ...]
    dtypes: tuple[str, ...]
    baselines: tuple[str, ...]
    price: float | None
    seed: int
    out: Path | None


def read_suites(texts: Sequence[str], limit: int | None) -> list[Suite]:
    """What was named on the command line. ValueError for what cannot be read."""
    suites = [read_suite(text, limit) for text in texts]
    names = [suite.name for suite in suites]
    for text, name in zip(texts, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"Two suites are called {name} (one of them: {text}), so their figures would mix. "
                "Name each once, and give files of the same name different names."
            )
    return suites


def read_suite(text: str, limit: int | None = None) -> Suite:
    """One suite, as the top of this file describes them; at most `limit` prompts."""
    shipped = shipped_prompts(text)
    if shipped.is_file() and not Path(text).exists():
        prompts, _ = read_prompts([str(shipped)])
        return Suite(text, prompts[:limit])
    match = COLUMN.fullmatch(text)
    if match is None or Path(text).exists():
        remedy = f"Mend the line, or name the column that holds the prompts: {text}:COLUMN."
        split = "train" if text.endswith(FILE) else _split(*_path(text))
        prompts, _ = read_prompts([text], split=split, remedy=remedy)
        return Suite(_name(text), prompts[:limit])
    source, column = match["source"], match["column"]
    rows = islice(_rows(source), limit)
    name = _name(source)
    prompts = [
        _prompt(f"{name}/{number}", where, row, column)
        for number, (where, row) in enumerate(rows, 1)
    ]
    if not prompts:
        raise ValueError(f"There is no prompt in {source}. Check the data.")
    return Suite(name, prompts)


def make_cases(
    suite: Suite, target: Target, *, context: int | None, room: int
) -> tuple[list[Case], int]:
    """The prompts as the target reads them, and how many were left out.

    context: put text of other prompts in front, until a prompt has about so many tokens; None
    leaves them as they are. room: tokens that the answer needs. A prompt that leaves less of the
    target's context is left out. ValueError if none is left.
    """
    prompts = suite.prompts
    if context is not None:
        filler = _filler(target)
        prompts = [
            _longer(target, prompt, context, filler, STRIDE * number)
            for number, prompt in enumerate(prompts)
        ]
    limit = target.context_limit
    ids = first_turns(target, prompts)
    cases = [
        Case(prompt.id, tuple(tokens))
        for prompt, tokens in zip(prompts, ids, strict=True)
        if limit is None or len(tokens) + room <= limit
    ]
    if not cases:
        raise ValueError(
            f"No prompt of {suite.name} leaves {target.name} room for {room} tokens: it reads "
            f"{limit} in all. Lower the number of new tokens or the context, or take shorter "
            "prompts."
        )
    return cases, len(prompts) - len(cases)


def _filler(target: Target) -> list[int]:
    """Tokens of the prompts that come with the package."""
    prompts, _ = read_prompts([str(shipped_prompts("train"))])
    text = "\n\n".join(prompt.turns[0] for prompt in prompts)
    ids: list[int] = target.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _longer(
    target: Target, prompt: Prompt, context: int, filler: Sequence[int], start: int
) -> Prompt:
    """A prompt with filler from `start` on in front of it. One that is long enough stays."""
    message = {"role": "user", "content": prompt.turns[0]}
    missing = context - len(prompt_ids(target, [*prompt.before, message]))
    if missing <= 0:
        return prompt
    text = target.text([filler[(start + place) % len(filler)] for place in range(missing)])
    return replace(prompt, turns=(f"{text}\n\n{prompt.turns[0]}",))


def _name(source: str) -> str:
    return Path(source).stem if source.endswith(FILE) else source.strip("/").rpartition("/")[2]


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with a word on where each stands."""
    if source.endswith(FILE):
        from headstart.training.data.conversations import read_lines

        for where, row in read_lines(source, split="train", skip_broken=False, broken=[]):
            yield where, dict(row)
        return
    from datasets import load_dataset  # slow to import, and only needed here

    path, config = _path(source)
    split = _split(path, config)
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # the library and the network raise many kinds
        raise _unreadable(source, error) from error
    for number, row in enumerate(rows):
        yield f"{source} row {number}", dict(row)


def _path(source: str) -> tuple[str, str | None]:
    """A folder, or a name on the Hub with the configuration that may follow it."""
    if Path(source).exists():
        return source, None
    match = HUB.fullmatch(source)
    if match is None:
        raise _unreadable(source, "There is no such folder, and names on the Hub look different.")
    return match["name"], match["config"]


def _split(path: str, config: str | None) -> str:
    from datasets import get_dataset_split_names

    try:
        names = get_dataset_split_names(path, config_name=config)
    except Exception as error:  # the library and the network raise many kinds
        raise _unreadable(path if config is None else f"{path}/{config}", error) from error
    return "test" if "test" in names else str(names[0])


def _unreadable(source: str, error: Exception | str) -> ValueError:
    return ValueError(
        f"Cannot open the suite {source!r}: {error} Give a .jsonl file, a folder of data, or a "
        "data set on the Hub: OWNER/NAME:COLUMN, or OWNER/NAME/CONFIGURATION:COLUMN."
    )


def _prompt(name: str, where: str, row: dict[str, Any], column: str) -> Prompt:
    """A row's column as a prompt: a text, or a list of texts, which are turns."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}. It has: {', '.join(row)}.")
    value = row[column]
    turns = [value] if isinstance(value, str) else value
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not texts or not turns or not turns[0].strip():
        raise ValueError(
            f"{where}: the column {column!r} should hold a text or a list of texts that are not "
            f"empty, got {value!r:.80}. Name another column."
        )
    return Prompt(name, tuple(turns))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Sizes such as `256,2k`; k is 1024."""
    parts = [part.strip().lower() for part in text.split(",")]
    for part in parts:
        if not re.fullmatch("[1-9][0-9]*k?", part):
            raise ValueError(
                f"{option} takes whole numbers above 0 with commas between them, such as 1,4 or "
                f"256,2k, got {text!r}."
            )
    sizes = (int(part.rstrip("k")) * (1024 if part.endswith("k") else 1) for part in parts)
    return tuple(dict.fromkeys(sizes))


def names(text: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    given = [part.strip() for part in text.split(",")]
    for name in given:
        if name not in known:
            raise ValueError(f"{option} takes some of {', '.join(known)}, got {name!r}.")
    return tuple(dict.fromkeys(given))
