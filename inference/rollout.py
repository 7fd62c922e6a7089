"""Let the target answer prompts: the text that a head has to learn.

The target answers with the sampling that it will be served with, in batches of prompts of similar
length, and finished rows leave their batch. A conversation of several turns goes through once per
turn, each time with the answers so far; every turn gives one record, whose tokens are exactly what
the target read and wrote.

Legend: B batch rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headstart.inference.engine.loop import plain
from headstart.inference.engine.sampler import Sampler
from headstart.inference.engine.sequence import StopCriteria
from headstart.model.target.target import Target

WINDOW = 8  # batches among which prompts of similar length are looked for

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered. before: messages that come first (a system message, say)."""

    id: str
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class AnswerSettings:
    """How the target answers. temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Turn:
    prompt: Prompt
    number: int
    messages: tuple[Message, ...]
    tokens: list[int]


def prompt_ids(target: Target, messages: Sequence[Message]) -> list[int]:
    """What the target reads before it answers. ValueError without a chat template."""
    tokenizer = target.tokenizer
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{target.name} has no chat template, so a conversation cannot be written down for it. "
            "Use an instruction-tuned model, or set chat_template in its tokenizer."
        )
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answer(
    target: Target,
    prompts: Sequence[Prompt],
    settings: AnswerSettings,
    *,
    batch_size: int,
    skipped: Callable[[str, str], None],
) -> Iterator[list[dict[str, Any]]]:
    """Batches of records of the conversation format, one per turn, as they finish.

    skipped: told the id of a prompt that cannot be answered (too long), and why.
    """
    waiting = [_Turn(prompt, 0, prompt.before, []) for prompt in prompts]
    while waiting:
        window = waiting[: WINDOW * batch_size]
        waiting = waiting[WINDOW * batch_size :]
        ready = [turn for one in window if (turn := _asked(target, one, skipped)) is not None]
        ready.sort(key=lambda turn: len(turn.tokens))
        follow: list[_Turn] = []
        for at in range(0, len(ready), batch_size):
            batch = list(_batch(target, ready[at : at + batch_size], settings))
            follow += [turn for _, next_turn in batch for turn in next_turn]
            yield [record for record, _ in batch]
        waiting = follow + waiting


def _asked(target: Target, turn: _Turn, skipped: Callable[[str, str], None]) -> _Turn | None:
    """The turn with its user message and the tokens to read; None if they are too many."""
    question = {"role": "user", "content": turn.prompt.turns[turn.number]}
    messages = (*turn.messages, question)
    tokens = prompt_ids(target, messages)
    limit = target.context_limit
    if limit is not None and len(tokens) >= limit:
        skipped(turn.prompt.id, f"{len(tokens)} tokens, but {target.name} reads {limit}")
        return None
    return _Turn(turn.prompt, turn.number, messages, tokens)


def _batch(
    target: Target, turns: Sequence[_Turn], settings: AnswerSettings
) -> Iterator[tuple[dict[str, Any], list[_Turn]]]:
    longest = max(len(turn.tokens) for turn in turns)
    tokens_BT = torch.zeros(len(turns), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(tokens_BT)
    for row, turn in enumerate(turns):
        tokens_BT[row, : len(turn.tokens)] = torch.tensor(turn.tokens)
        mask_BT[row, : len(turn.tokens)] = 1
    sampler = Sampler.of(
        settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        # The batch's own seed, so that an answer does not depend on what was answered before.
        seed=settings.seed + _number(turns[0].prompt.id),
    )
    stop = StopCriteria(settings.max_new_tokens, frozenset(target.eos_ids))
    answers: list[list[int]] = [[] for _ in turns]
    for emitted in plain(target, tokens_BT, mask_BT, sampler=sampler, stop=stop):
        for row, tokens in enumerate(emitted):
            answers[row] += tokens
    for turn, tokens in zip(turns, answers, strict=True):
        yield _record(target, turn, tokens), _next(target, turn, tokens)


def _record(target: Target, turn: _Turn, tokens: list[int]) -> dict[str, Any]:
    text = target.text(tokens)
    begin = len(turn.tokens)
    ended = bool(tokens) and tokens[-1] in target.eos_ids
    record = {
        "id": f"{turn.prompt.id}/{turn.number}",
        "messages": [*turn.messages, {"role": "assistant", "content": text}],
        "tokens": turn.tokens + tokens,
        "spans": [[begin, begin + len(tokens)]],
        "end": "eos" if ended else "length",
    }
    return record if turn.prompt.source is None else record | {"source": turn.prompt.source}


def _next(target: Target, turn: _Turn, tokens: list[int]) -> list[_Turn]:
    if turn.number + 1 == len(turn.prompt.turns):
        return []
    messages = (*turn.messages, {"role": "assistant", "content": target.text(tokens)})
    return [_Turn(turn.prompt, turn.number + 1, messages, [])]


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[-6:], "big")
