"""Generate on-policy training data: the target's own responses to prompts.

The target responds with the sampling that it will be served with, in batches of prompts of similar
length, and finished sequences leave their batch. A conversation of several turns passes once per
turn, each time with the responses so far. Every turn gives one record, with exactly the token ids
of the target's context and response.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from headstart.inference.config import SamplingParams
from headstart.inference.engine.loop import decode
from headstart.model.target.target import Target

WINDOW = 8  # batches whose prompts are sorted by length

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """The user's side of a conversation.

    turns: the user messages.
    before: messages that come first (a system message, say).
    source: the data set, for the record.
    """

    id: str
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()
    source: str | None = None


@dataclass(frozen=True)
class _Turn:
    """One response to generate.

    number: of the turn. messages: before it. tokens: the rendered prompt.
    """

    prompt: Prompt
    number: int
    messages: tuple[Message, ...]
    tokens: list[int]


def prompt_ids(target: Target, messages: Sequence[Message]) -> list[int]:
    """The token ids of a conversation, up to the next response.

    ValueError without a chat template.
    """
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


def generate_responses(
    target: Target,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    *,
    batch_size: int,
    skipped: Callable[[str, str], None],
) -> Iterator[list[dict[str, Any]]]:
    """Yield batches of records in the conversation format, one per turn, as they finish.

    sampling: of the responses; each batch derives its own seed from it.
    skipped: called with the id of a prompt that is too long, and the reason.
    """
    waiting = [_Turn(prompt, 0, prompt.before, []) for prompt in prompts]
    while waiting:
        window = waiting[: WINDOW * batch_size]
        waiting = waiting[WINDOW * batch_size :]
        ready = [turn for one in window if (turn := _render_turn(target, one, skipped)) is not None]
        ready.sort(key=lambda turn: len(turn.tokens))
        follow: list[_Turn] = []
        for at in range(0, len(ready), batch_size):
            batch = list(_batch(target, ready[at : at + batch_size], sampling))
            follow += [turn for _, next_turn in batch for turn in next_turn]
            yield [record for record, _ in batch]
        waiting = follow + waiting


def _render_turn(target: Target, turn: _Turn, skipped: Callable[[str, str], None]) -> _Turn | None:
    """The turn with its user message and prompt tokens; None if the prompt is too long."""
    question = {"role": "user", "content": turn.prompt.turns[turn.number]}
    messages = (*turn.messages, question)
    tokens = prompt_ids(target, messages)
    limit = target.context_limit
    if limit is not None and len(tokens) >= limit:
        skipped(
            turn.prompt.id,
            f"{len(tokens)} tokens, but the context of {target.name} is {limit} tokens",
        )
        return None
    return _Turn(turn.prompt, turn.number, messages, tokens)


def _batch(
    target: Target, turns: Sequence[_Turn], sampling: SamplingParams
) -> Iterator[tuple[dict[str, Any], list[_Turn]]]:
    """Each turn's record, and the turn that follows it, if any."""
    longest = max(len(turn.tokens) for turn in turns)
    tokens_BT = torch.zeros(len(turns), longest, dtype=torch.int64)
    mask_BT = torch.zeros_like(tokens_BT)
    for index, turn in enumerate(turns):
        tokens_BT[index, : len(turn.tokens)] = torch.tensor(turn.tokens)
        mask_BT[index, : len(turn.tokens)] = 1
    # The batch has its own seed, so that a response does not depend on what was generated before.
    sampling = replace(sampling, seed=sampling.seed + _seed_of(turns[0].prompt.id))
    responses: list[list[int]] = [[] for _ in turns]
    for emitted in decode(target, tokens_BT, mask_BT, sampling=sampling):
        for response, tokens in zip(responses, emitted, strict=True):
            response += tokens
    for turn, tokens in zip(turns, responses, strict=True):
        yield _record(target, turn, tokens), _next_turn(target, turn, tokens)


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


def _next_turn(target: Target, turn: _Turn, tokens: list[int]) -> list[_Turn]:
    if turn.number + 1 == len(turn.prompt.turns):
        return []
    messages = (*turn.messages, {"role": "assistant", "content": target.text(tokens)})
    return [_Turn(turn.prompt, turn.number + 1, messages, [])]


def _seed_of(name: str) -> int:
    return int.from_bytes(name.encode()[-6:], "big")
