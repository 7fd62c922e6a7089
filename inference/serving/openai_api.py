"""OpenAI's API schema: requests, responses and errors as JSON.

An unsupported parameter is refused by its name, unless its value is the one that is used anyway.
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

# Parameters that do not change a response.
IGNORED = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
)
# Unsupported parameters, and the only value of each that is accepted.
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
MAX_STOP_STRINGS = 4
MIN_TEMPERATURE = 1e-3  # logits divided by less than this leave the range of floats
ASSISTANT_MESSAGE: dict[str, Any] = {"role": "assistant", "content": ""}

FinishReason = Literal["stop", "length"]


@dataclass
class Usage:
    """Tokens of one request. accepted, rejected: verified draft tokens, by outcome."""

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
    """A response that is an error. param: the parameter at fault. code: for programs."""

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
        details = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": details}


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


def _encodable(text: str) -> str:
    """JSON can contain lone surrogates, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!a} is a lone surrogate") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]


def _join_parts(content: Any) -> Any:
    """Concatenate a list of text parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or set(part) - {"type", "text"}:
            raise ValueError("only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part has no text")
    return "".join(part["text"] for part in content)


class Message(_StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_join_parts)]

    def for_template(self) -> dict[str, str]:
        """The message for a chat template, which knows a developer message as a system one."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content,
        }


class StreamOptions(_StrictModel):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class _CommonParams(_StrictModel):
    """The parameters of both endpoints."""

    model: str
    max_tokens: int | None = Field(None, ge=1, strict=True)
    temperature: float = Field(1, ge=0, le=2, allow_inf_nan=False, strict=True)
    top_p: float = Field(1, gt=0, le=1, allow_inf_nan=False, strict=True)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        [], max_length=MAX_STOP_STRINGS
    )
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63, strict=True)
    stream: bool = Field(False, strict=True)
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if name not in IGNORED and not (name in NEUTRAL and _same(value, NEUTRAL[name]))
        }

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value: float) -> float:
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"give 0 (greedy) or at least {MIN_TEMPERATURE}")
        return value

    @model_validator(mode="after")
    def _check_stream_options(self) -> _CommonParams:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options need a stream: set stream to true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_CommonParams):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, strict=True)

    @property
    def limit(self) -> int | None:
        given = [n for n in (self.max_tokens, self.max_completion_tokens) if n is not None]
        return min(given, default=None)


Token = Annotated[int, Field(strict=True)]


def _single_prompt(prompt: Any) -> Any:
    """Unpack a list of one prompt; OpenAI's API allows several."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError("one prompt per request is supported")
        return prompt[0]
    return prompt


class CompletionRequest(_CommonParams):
    prompt: Annotated[Text | list[Token], BeforeValidator(_single_prompt)]
    max_tokens: int | None = Field(16, ge=1, strict=True)  # as OpenAI's

    @property
    def limit(self) -> int | None:
        return self.max_tokens


def _same(value: Any, neutral: Any) -> bool:
    """Whether two values are equal and of one kind: 1 and True are different values here."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the JSON of one response, whole or in chunks. chat: which of the two endpoints."""

    chat: bool
    id: str
    model: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def response(self, text: str, reason: FinishReason, usage: Usage) -> dict[str, Any]:
        if self.chat:
            content: dict[str, Any] = {"message": ASSISTANT_MESSAGE | {"content": text}}
        else:
            content = {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._body(kind, [self._choice(content, reason)]) | {"usage": usage.body()}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks before the first text."""
        return [self._chunk({"delta": ASSISTANT_MESSAGE})] if self.chat else []

    def chunk(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text})

    def last_chunks(self, reason: FinishReason, usage: Usage) -> list[dict[str, Any]]:
        last = self._chunk({"delta": {}} if self.chat else {"text": ""}, reason)
        if not self.include_usage:
            return [last]
        return [last, self._body(self._chunk_kind, []) | {"usage": usage.body()}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, content: dict[str, Any], reason: FinishReason | None = None) -> dict[str, Any]:
        body = self._body(self._chunk_kind, [self._choice(content, reason)])
        return body | {"usage": None} if self.include_usage else body

    def _choice(self, content: dict[str, Any], reason: FinishReason | None) -> dict[str, Any]:
        return {"index": 0, "logprobs": None, "finish_reason": reason} | content

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        common = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return common | {"choices": choices}
