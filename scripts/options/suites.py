"""The option `--suite` of `headstart bench`.

A suite is a shipped prompt set, a prompt file, a folder or a data set on the Hub:

    heldout                          a shipped prompt set (train, dev, heldout)
    gsm8k.jsonl                      a prompt file
    gsm8k.jsonl:question             one of its columns
    openai/openai_humaneval:prompt   a column of a data set on the Hub, or of a local folder
    openai/gsm8k/main:question       a data set with a configuration

A data set is read from its split `test`, or else from its first one. Of a conversation only the
first turn is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from headstart.inference.benchmark.metrics import Case
from headstart.inference.rollout import Prompt, prompt_ids
from headstart.model.target.target import Target

from .prompts import first_turns, read_prompts, shipped_prompts

FILE = (".jsonl", ".json")
COLUMN = re.compile(r"(?P<source>.+):(?P<column>[^:/\\.]+)")  # neither a drive letter nor a URL
HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?")
STRIDE = 997  # tokens between the starts of two fillers


@dataclass(frozen=True)
class Suite:
    """Prompts under a name for tables."""

    name: str
    prompts: list[Prompt]


def read_suites(sources: Sequence[str], limit: int | None) -> list[Suite]:
    """Read suites as named on the command line. Raises ValueError for an unreadable one."""
    suites = [read_suite(source, limit) for source in sources]
    names = [suite.name for suite in suites]
    for source, name in zip(sources, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(
                f"Two suites are called {name} (one of them: {source}), so their metrics would be "
                "mixed. Name each suite once, and rename files of the same name."
            )
    return suites


def read_suite(source: str, limit: int | None = None) -> Suite:
    """Read one suite, in the forms listed at the top of this file; at most `limit` prompts."""
    shipped = shipped_prompts(source)
    if shipped.is_file() and not Path(source).exists():
        prompts, _ = read_prompts([str(shipped)])
        return Suite(source, prompts[:limit])
    match = COLUMN.fullmatch(source)
    if match is None or Path(source).exists():
        remedy = f"Fix the line, or name the column that has the prompts: {source}:COLUMN."
        split = "train" if source.endswith(FILE) else _split(*_path(source))
        prompts, _ = read_prompts([source], split=split, remedy=remedy)
        return Suite(_name(source), prompts[:limit])
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
    suite: Suite, target: Target, *, context: int | None, max_new_tokens: int
) -> tuple[list[Case], int]:
    """Tokenize the prompts of a suite, and leave out those that do not fit the target's context.

    context: fill prompts up to about this many tokens with text of other prompts; None: as they
        are.
    max_new_tokens: of a response.
    Returns the prompts and the number that was left out. Raises ValueError if none is left.
    """
    prompts = suite.prompts
    if context is not None:
        filler = _filler(target)
        prompts = [
            _fill(target, prompt, context, filler, STRIDE * number)
            for number, prompt in enumerate(prompts)
        ]
    limit = target.context_limit
    ids = first_turns(target, prompts)
    cases = [
        Case(prompt.id, tuple(tokens))
        for prompt, tokens in zip(prompts, ids, strict=True)
        if limit is None or len(tokens) + max_new_tokens <= limit
    ]
    if not cases:
        raise ValueError(
            f"No prompt of {suite.name} leaves room for {max_new_tokens} new tokens in the context "
            f"of {target.name} ({limit} tokens). Lower the number of new tokens or the context, or "
            "use shorter prompts."
        )
    return cases, len(prompts) - len(cases)


def _filler(target: Target) -> list[int]:
    """Tokens of the shipped prompts."""
    prompts, _ = read_prompts([str(shipped_prompts("train"))])
    text = "\n\n".join(prompt.turns[0] for prompt in prompts)
    ids: list[int] = target.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _fill(
    target: Target, prompt: Prompt, context: int, filler: Sequence[int], start: int
) -> Prompt:
    """Put filler from `start` on in front of a prompt, unless it is long enough."""
    message = {"role": "user", "content": prompt.turns[0]}
    missing = context - len(prompt_ids(target, [*prompt.before, message]))
    if missing <= 0:
        return prompt
    text = target.text([filler[(start + place) % len(filler)] for place in range(missing)])
    return replace(prompt, turns=(f"{text}\n\n{prompt.turns[0]}",))


def _name(source: str) -> str:
    return Path(source).stem if source.endswith(FILE) else source.strip("/").rpartition("/")[2]


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a data set, each with its place for error messages."""
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
    """Split a source into a folder or Hub name, and its configuration, if any."""
    if Path(source).exists():
        return source, None
    match = HUB.fullmatch(source)
    if match is None:
        raise _unreadable(source, "It is neither a folder nor a Hub name.")
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
    """A row's column as a prompt: a text, or a list of texts (turns)."""
    if column not in row:
        raise ValueError(f"{where} has no column {column!r}. It has: {', '.join(row)}.")
    value = row[column]
    turns = [value] if isinstance(value, str) else value
    texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    if not texts or not turns or not turns[0].strip():
        raise ValueError(
            f"{where}: the column {column!r} must have a non-empty text or a list of texts, "
            f"got {value!r:.80}. Name another column."
        )
    return Prompt(name, tuple(turns))
