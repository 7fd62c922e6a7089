"""Read conversations from JSONL files, folders and data sets on the Hub.

A line holds `tokens` and `spans` ([start, end) pairs of labels), or only `messages`, which the
target's chat template renders. Everything is read and checked before training starts.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedTokenizerBase

from headstart.model.target.target import Target
from headstart.training.config.schema import DataConfig

from .batching import MIN_TOKENS, Corpus, padded_length
from .chat_template import Rendered, render

Line = tuple[str, Mapping[str, Any]]  # its place (file and line number), its content
# 4 bytes per token: there may be billions. array is no generic type at run time.
Row: TypeAlias = "tuple[array[int], list[tuple[int, int]]]"
TURN = re.compile(r"./[0-9]+$")  # end of the id of one turn of a conversation


@dataclass(frozen=True)
class Conversations:
    """Conversations to train on and held-out ones.

    dropped: number of conversations without a label. broken: messages about lines left out.
    """

    train: Corpus
    holdout: Corpus
    dropped: int
    broken: tuple[str, ...]


class BrokenLine(ValueError):
    """A line that is not a conversation; the message names file and line."""


def read_conversations(config: DataConfig, target: Target, seed: int) -> Conversations:
    """Read, render, check and split. ValueError names the file and line that is wrong, and why."""
    rows: list[Row] = []
    conversations: list[str] = []  # the one each row belongs to
    broken: list[str] = []
    dropped = 0
    for where, value in _lines(config, target, broken):
        try:
            found = [_checked(row, where, target) for row in _rendered(value, where, target)]
        except BrokenLine as error:
            if not config.skip_broken:
                raise
            broken.append(str(error))
            continue
        dropped += not found  # without a response in it
        for row in found:
            cut = _cut(row, config.max_length)
            teaches = any(end > MIN_TOKENS - 1 for _, end in cut.spans)
            if teaches:
                rows.append((array("i", cut.tokens), cut.spans))
                conversations.append(_conversation(value, where))
            dropped += not teaches
    if not rows:
        raise _nothing_to_train_on(config, dropped, broken)
    held = _held_out(conversations, config.holdout, seed)

    def corpus(held_out: bool, first: int) -> Corpus:
        pairs = zip(rows, conversations, strict=True)
        return Corpus((row for row, name in pairs if (name in held) == held_out), first)

    train = corpus(False, 0)
    return Conversations(train, corpus(True, len(train)), dropped, tuple(broken))


def _nothing_to_train_on(config: DataConfig, dropped: int, broken: list[str]) -> ValueError:
    message = (
        f"Nothing to train on in {', '.join(config.paths) or 'the random rows'}: {dropped} "
        "conversations were read and none has a label within its first "
        f"{config.max_length} tokens. Check `spans` (they mark the responses), the roles in "
        "`messages`, and data.max_length."
    )
    if broken:
        message += f" {len(broken)} lines were left out as broken, the first: {broken[0]}"
    return ValueError(message)


def _conversation(value: Mapping[str, Any], where: str) -> str:
    """Return the conversation of a line: turns of one are lines `NAME/0`, `NAME/1`, ..."""
    name = str(value.get("id", ""))
    return name.rpartition("/")[0] if TURN.search(name) and value.get("spans") else where


def _held_out(conversations: list[str], count: int, seed: int) -> set[str]:
    """Choose whole conversations until `count` rows are held out: turns repeat one another."""
    sizes = Counter(conversations)  # in order of appearance
    names = list(sizes)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held: set[str] = set()
    rows = 0
    for place in order:
        if rows >= count:
            break
        held.add(names[place])
        rows += sizes[names[place]]
    if len(held) == len(names):
        raise ValueError(
            f"data.holdout is {count}, but there are only {len(names)} conversations. "
            "Lower it, or bring more data."
        )
    return held


def _lines(config: DataConfig, target: Target, broken: list[str]) -> Iterator[Line]:
    if config.random_rows is not None:
        yield from _random_rows(config.random_rows, config.max_length, target.vocab_size)
    for path in config.paths:
        yield from read_lines(
            path, split=config.split, skip_broken=config.skip_broken, broken=broken
        )


def read_lines(path: str, *, split: str, skip_broken: bool, broken: list[str]) -> Iterator[Line]:
    """Yield the objects of a JSONL file, or the rows of a local data set or one on the Hub.

    A line that is not JSON raises ValueError; with skip_broken it is appended to `broken`.
    """
    if path.endswith((".jsonl", ".json")):
        yield from _json_lines(Path(path), skip_broken, broken)
    else:
        yield from _dataset(path, split)


def _json_lines(path: Path, skip_broken: bool, broken: list[str]) -> Iterator[Line]:
    """Read JSONL line by line, so that a broken line can be named."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"Cannot read the data file {path}: {error.strerror}.") from error
    empty = True
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            empty = False
            where = f"{path}:{number}"
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                message = f"{where} is not valid JSON in UTF-8: {error}."
                if not skip_broken:
                    raise BrokenLine(
                        f"{message} Repair the line, or set data.skip_broken=true to leave such "
                        "lines out."
                    ) from error
                broken.append(message)
                continue
            yield where, value
    if empty:
        raise ValueError(f"The data file {path} is empty. It should hold one JSON object per line.")


def _dataset(path: str, split: str) -> Iterator[Line]:
    """Read a folder or a data set on the Hub, through `datasets`."""
    from datasets import load_dataset  # slow to import, and only needed here

    try:
        rows = load_dataset(path, split=split)
    except Exception as error:  # the library and the network raise many kinds
        raise ValueError(
            f"Cannot open the data {path!r} (split {split!r}): {error} Give a .jsonl file, a "
            "folder of data, or the name of a data set on the Hub, and one of its splits."
        ) from error
    for number, row in enumerate(rows):
        yield f"{path} row {number}", row


def _random_rows(count: int, max_length: int, vocab_size: int) -> Iterator[Line]:
    """Yield random sequences for a random target: runs that step through the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    length = min(max_length, 64)
    for number in range(count):
        start, step = torch.randint(1, vocab_size, (2,), generator=generator).tolist()
        tokens = [(start + step * place) % vocab_size for place in range(length)]
        yield f"random row {number}", {"tokens": tokens, "spans": [[length // 4, length]]}


def _rendered(value: Any, where: str, target: Target) -> list[Rendered]:
    if not isinstance(value, Mapping):
        raise BrokenLine(f"{where} holds {type(value).__name__}, not a JSON object.")
    if value.get("tokens") is not None and value.get("spans") is not None:
        return [_from_tokens(value, where)]
    if value.get("messages") is None:
        raise BrokenLine(
            f"{where} has neither `tokens` with `spans` nor `messages` (it has: "
            f"{', '.join(map(str, value))}). One of them is needed."
        )
    messages = value["messages"]
    well_formed = isinstance(messages, list) and all(
        isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in messages
    )
    if not well_formed:
        raise BrokenLine(f"{where}: `messages` should be a list of objects with role and content.")
    tokenizer: PreTrainedTokenizerBase = target.tokenizer
    try:
        return render([dict(message) for message in messages], tokenizer)
    except ValueError as error:
        raise BrokenLine(f"{where}: {error}") from error


def _from_tokens(value: Mapping[str, Any], where: str) -> Rendered:
    tokens, spans = value["tokens"], value["spans"]
    if not _whole_numbers(tokens):
        raise BrokenLine(f"{where}: `tokens` should be a list of whole numbers.")
    if not isinstance(spans, list):
        raise BrokenLine(f"{where}: `spans` should be a list of [start, end) pairs.")
    pairs: list[tuple[int, int]] = []
    for span in spans:
        if not _whole_numbers(span) or len(span) != 2 or not 0 <= span[0] <= span[1] <= len(tokens):
            raise BrokenLine(
                f"{where}: the span {span} does not lie within the {len(tokens)} tokens. A span is "
                "[start, end) with 0 <= start <= end <= number of tokens."
            )
        pairs.append((span[0], span[1]))
    return Rendered(tokens, pairs)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


def _checked(row: Rendered, where: str, target: Target) -> Rendered:
    if row.tokens and not 0 <= min(row.tokens) <= max(row.tokens) < target.vocab_size:
        wrong = next(t for t in row.tokens if not 0 <= t < target.vocab_size)
        raise BrokenLine(
            f"{where}: token {wrong} is not in the vocabulary of {target.name} (0 to "
            f"{target.vocab_size - 1}). The data was made with another tokenizer: make it again "
            "with this target."
        )
    return row


def _cut(row: Rendered, length: int) -> Rendered:
    spans = [(start, min(end, length)) for start, end in row.spans if start < min(end, length)]
    return Rendered(row.tokens[:length], spans)


def grouped_by_length(
    corpus: Corpus, batch_tokens: int, among: Sequence[int] | None = None
) -> Iterator[list[int]]:
    """Yield the conversations of one batch after the other, longest first, under a token budget.

    among: conversations to group (default: all of the corpus).
    """
    places = torch.arange(len(corpus)) if among is None else torch.tensor(among)
    rows: list[int] = []
    for row in places[corpus.lengths[places].sort(descending=True, stable=True).indices].tolist():
        first = int(corpus.lengths[rows[0]]) if rows else 0
        if rows and (len(rows) + 1) * padded_length(first, corpus.longest) > batch_tokens:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
