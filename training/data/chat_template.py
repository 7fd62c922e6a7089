"""Render conversations to tokens, with the spans of the assistant's responses.

No chat template is known by name. A response's span is found by rendering twice: up to the response
with the generation prompt, and with the response. The first is the target's prompt, so what the
second adds is the response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A tokenized sequence and the [start, end) spans of its labels."""

    tokens: list[int]
    spans: list[tuple[int, int]]


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """Return one sequence per conversation, or one per response where the template rewrites turns.

    Some templates drop the reasoning of earlier responses from the history. Each response then
    follows the history that it was generated from. ValueError when the tokenizer has no chat
    template or the template refuses the messages.
    """
    sequences: list[Rendered] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        turn = _turn(messages[: index + 1], tokenizer)
        if sequences and _continues(sequences[-1], turn):
            spans = sequences[-1].spans + turn.spans
            sequences[-1] = Rendered(turn.tokens, spans)
        else:
            sequences.append(turn)
    return [_without_tail(sequence) for sequence in sequences]


def _continues(earlier: Rendered, turn: Rendered) -> bool:
    end = earlier.spans[-1][1]
    return turn.tokens[:end] == earlier.tokens[:end] and turn.spans[0][0] >= end


def _turn(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Render the conversation up to a response; the span is that response."""
    before = _text(messages[:-1], tokenizer, prompt=True)
    whole = _text(messages, tokenizer, prompt=False)
    prompt, tokens = _ids(before, tokenizer), _ids(whole, tokenizer)
    shared = _common_prefix(prompt, tokens)
    if shared < len(prompt) and whole.startswith(before):
        # A token spans the boundary. The prompt is tokenized first, so its tokens stay.
        tokens = prompt + _ids(whole[len(before) :], tokenizer)
        shared = len(prompt)
    return Rendered(tokens, [(shared, _response_end(tokens, shared, tokenizer))])


def _response_end(tokens: list[int], start: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the index after the token that ends the turn; white space follows in the template."""
    special = set(tokenizer.all_special_ids)
    for index in range(len(tokens) - 1, start - 1, -1):
        if tokens[index] in special:
            blank = not str(tokenizer.decode(tokens[index + 1 :])).strip()
            return index + 1 if blank else len(tokens)
    return len(tokens)


def _without_tail(sequence: Rendered) -> Rendered:
    return Rendered(sequence.tokens[: sequence.spans[-1][1]], sequence.spans)


def _text(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The target's tokenizer has no chat template, so messages cannot be rendered. Use "
            "lines with `tokens` and `spans`, or use an instruction-tuned target."
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # templates raise any exception
        raise ValueError(f"The chat template refuses the messages: {error}") from error
    assert isinstance(text, str)
    return text


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _common_prefix(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))
