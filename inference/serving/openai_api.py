"""What OpenAI's API says: requests, answers and errors as JSON.

A setting that is not supported is refused by its name, unless it asks for what happens anyway.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

# They do not change an answer.
IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
)
# Other settings, and the only value that is not refused.
NEUTRAL: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": False,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "tools": [],
    "functions": [],
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "store": False,
}
MOST_STOPS = 4
LEAST_TEMPERATURE = 1e-3  # logits divided by less than this leave the range of floats
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": ""}

Reason = Literal["stop", "length"]


@dataclass
class Usage:
    """Tokens of one request. accepted, rejected: guesses that became part of the answer, and that
    the target read in vain."""

    prompt: int
    completion: int = 0
    accepted: int = 0
    rejected: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.rejected,
            },
        }


class ApiError(Exception):
    """An answer that is an error. param: the setting at fault; code: for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        kind = {429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_left_open(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


def _encodable(text: str) -> str:
    """JSON can hold halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!a} is half a character") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _joined(content: Any) -> Any:
    """A list of parts as one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise ValueError("only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part has no text")
    return "".join(part["text"] for part in content)


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]

    def plain(self) -> dict[str, str]:
        """For a chat template, which knows a developer's message as the system's."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _stops(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _Request(_Body):
    """What both kinds of requests have."""

    model: str
    max_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float = Field(1, ge=0, le=2, allow_inf_nan=False, strict=True)
    top_p: float = Field(1, gt=0, le=1, allow_inf_nan=False, strict=True)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_stops)] = Field(
        [], max_length=MOST_STOPS
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, strict=True)
    stream: bool = Field(False, strict=True)
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name not in IGNORED and not (name in NEUTRAL and _same(value, NEUTRAL[name]))
        }

    @field_validator("temperature")
    @classmethod
    def _not_nearly_greedy(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(f"give 0 (greedy) or at least {LEAST_TEMPERATURE}")
        return value

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for a stream only: set stream to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)

    @property
    def limit(self) -> int | None:
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(given, default=None)


Token = Annotated[int, Field(strict=True)]


def _only_one(prompt: Any) -> Any:
    """The API allows a list of prompts, we only one of a single prompt."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError("one prompt per request is supported")
        return prompt[0]
    return prompt


class CompletionRequest(_Request):
    prompt: Annotated[Text | list[Token], BeforeValidator(_only_one)]
    max_tokens: int | None = Field(16, ge=1, strict=True)  # as OpenAI's

    @property
    def limit(self) -> int | None:
        return self.max_tokens


def _same(value: Any, neutral: Any) -> bool:
    """1 and True are equal, but not the same setting."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


@dataclass(frozen=True)
class Reply:
    """The JSON of one answer, whole or in pieces. chat: which of the two kinds."""

    chat: bool
    id: str
    model: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: Reason, usage: Usage) -> dict[str, Any]:
        content = {"message": ASSISTANT | {"content": text}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, [self._choice(content, reason)]) | {"usage": usage.body()}

    def begin(self) -> list[dict[str, Any]]:
        """What comes before the first piece."""
        return [self._chunk({"delta": ASSISTANT})] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text})

    def end(self, reason: Reason, usage: Usage) -> list[dict[str, Any]]:
        last = self._chunk({"delta": {}} if self.chat else {"text": ""}, reason)
        if not self.include_usage:
            return [last]
        return [last, self._body(self._kind, []) | {"usage": usage.body()}]

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, content: dict[str, Any], reason: Reason | None = None) -> dict[str, Any]:
        body = self._body(self._kind, [self._choice(content, reason)])
        return body | {"usage": None} if self.include_usage else body

    def _choice(self, content: dict[str, Any], reason: Reason | None) -> dict[str, Any]:
        return {"index": 0, "logprobs": None, "finish_reason": reason} | content

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        same = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return same | {"choices": choices}
