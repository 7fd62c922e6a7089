"""HTTP routes: validate requests, submit them to the engine thread, and stream its events."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.inference.config import SamplingParams
from headstart.inference.rollout import prompt_ids

from .engine_thread import EngineThread, Event, Finished, Request, RequestParams, TextDelta
from .openai_api import ApiError, ChatRequest, CompletionRequest, ResponseBuilder

MAX_BODY_BYTES = 16 << 20  # per request: more than any context holds as text


@dataclass
class Service:
    """An engine thread and the limits of its requests.

    name: of the served model.
    max_model_len: maximum tokens of prompt and response together.
    max_tokens: maximum new tokens per response.
    api_key: requests without it are refused; None accepts all.
    """

    engine: EngineThread
    name: str
    max_model_len: int
    max_tokens: int
    api_key: str | None = None
    # One thread, so that tokenizing neither blocks the event loop nor runs many times at once.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    async def request_params(self, body: ChatRequest | CompletionRequest) -> RequestParams:
        """Tokenize and check a request body. Raises ApiError if it cannot be served."""
        if body.model != self.name:
            raise ApiError(
                404,
                f"There is no model {body.model!r} here, only {self.name!r}.",
                code="model_not_found",
                param="model",
            )
        self.engine.check_capacity()  # before the work of tokenizing
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self.tokenizing, self._tokenize, body)
        max_tokens = self._max_tokens(tokens, body.limit)
        sampling = SamplingParams(
            max_tokens,
            body.temperature,
            top_p=body.top_p,
            seed=secrets.randbits(62) if body.seed is None else body.seed,
        )
        return RequestParams(tokens, sampling, tuple(body.stop))

    def _tokenize(self, body: ChatRequest | CompletionRequest) -> list[int]:
        target = self.engine.model.target
        if isinstance(body, ChatRequest):
            try:
                return prompt_ids(target, [message.for_template() for message in body.messages])
            except (ValueError, TemplateError) as error:
                raise ApiError(400, str(error), param="messages") from error
        if isinstance(body.prompt, str):
            tokens: list[int] = target.tokenizer(body.prompt)["input_ids"]
        else:
            tokens = body.prompt
        unknown = [token for token in tokens if not 0 <= token < target.vocab_size]
        if unknown:
            raise ApiError(
                400,
                f"The prompt contains the token id {unknown[0]}, outside the model's vocabulary "
                f"(0 to {target.vocab_size - 1}).",
                param="prompt",
            )
        return tokens

    def _max_tokens(self, tokens: list[int], requested: int | None) -> int:
        """Maximum new tokens of the response. Raises ApiError if prompt or request are too long."""
        if not tokens:
            raise ApiError(400, "The prompt is empty. Give at least one token.")
        if requested is not None and requested > self.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {requested}, but this server allows at most {self.max_tokens}.",
                param="max_tokens",
            )
        if len(tokens) + (requested or 1) > self.max_model_len:
            response = "" if requested is None else f" and max_tokens is {requested}"
            raise ApiError(
                400,
                f"The prompt has {len(tokens)} tokens{response}, but the maximum context length "
                f"is {self.max_model_len} tokens. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
            )
        return requested or min(self.max_tokens, self.max_model_len - len(tokens))


def make_app(service: Service) -> ASGIApp:
    """Build the ASGI app: the routes behind `AuthMiddleware`."""
    engine = service.engine

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        engine.close()
        service.tokenizing.shutdown()

    app = FastAPI(lifespan=lifespan, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: HTTPRequest) -> Response:
        return await _respond(service, body, request)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: HTTPRequest) -> Response:
        return await _respond(service, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"There is no model {name!r} here.", code="model_not_found")
        return _card(service)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if engine.alive else "dead"
        status = "shutting down" if engine.draining else status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(ApiError, error_response)
    app.add_exception_handler(RequestValidationError, error_response)
    app.add_exception_handler(HTTPException, error_response)
    app.add_exception_handler(Exception, error_response)
    return AuthMiddleware(app, service)


def _card(service: Service) -> dict[str, Any]:
    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "headstart"}
    return card | {"max_model_len": service.max_model_len}


async def _respond(
    service: Service, body: ChatRequest | CompletionRequest, http_request: HTTPRequest
) -> Response:
    params = await service.request_params(body)
    chat = isinstance(body, ChatRequest)
    request_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    builder = ResponseBuilder(chat, request_id, service.name, body.include_usage)
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    request = Request(params, lambda event: _put(loop, events, event))
    service.engine.submit(request)
    try:
        async with _cancelled_on_disconnect(service.engine, request, http_request):
            first = await events.get()
            if isinstance(first, ApiError):
                raise first  # while the HTTP status can still report it
            if not body.stream:
                text, finished = await _collect(first, events)
                return JSONResponse(builder.response(text, finished.reason, finished.usage))
    except BaseException:
        service.engine.cancel(request)
        raise
    return _EventStream(_chunks(builder, first, events), lambda: service.engine.cancel(request))


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


@asynccontextmanager
async def _cancelled_on_disconnect(
    engine: EngineThread, request: Request, http_request: HTTPRequest
) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(request)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _collect(event: Event, events: asyncio.Queue[Event]) -> tuple[str, Finished]:
    """Wait for the whole response."""
    text = ""
    while isinstance(event, TextDelta):
        text += event.text
        event = await events.get()
    if isinstance(event, ApiError):
        raise event
    return text, event


async def _chunks(
    builder: ResponseBuilder, event: Event, events: asyncio.Queue[Event]
) -> AsyncIterator[bytes]:
    """Server-sent events. An error after the first chunk is one of them."""
    for chunk in builder.first_chunks():
        yield _server_sent(chunk)
    while isinstance(event, TextDelta):
        yield _server_sent(builder.chunk(event.text))
        event = await events.get()
    if isinstance(event, ApiError):
        yield _server_sent(event.body())
        return
    for chunk in builder.last_chunks(event.reason, event.usage):
        yield _server_sent(chunk)
    yield b"data: [DONE]\n\n"


def _server_sent(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


class _EventStream(StreamingResponse):
    """A stream that calls `on_close` when it ends for whatever reason."""

    def __init__(self, content: AsyncIterator[bytes], on_close: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def error_response(_: HTTPRequest, error: Exception) -> Response:
    """Any error in the shape of OpenAI's error object."""
    if isinstance(error, RequestValidationError):
        error = _validation_error(error)
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "Internal error; see the server's log.")
    # Escaped, because a message may quote a part of the request that is not valid text.
    body = json.dumps(error.body())
    return Response(body, error.status, error.headers, media_type="application/json")


def _validation_error(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["loc"] == ("body",) and "attributes" in first["type"]:
        return ApiError(
            400, "The request is no JSON object, or lacks Content-Type: application/json."
        )
    # Without the members of a union ("str", "list[int]"), which pydantic lists too.
    parts = [str(part) for part in first["loc"]]
    where = [part for part in parts if part not in ("body", "str") and "[" not in part]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The request is no valid JSON: {first['ctx']['error']}.")
    name = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{name} is not supported, or not with this value. Remove it.",
            code="unsupported_parameter",
            param=name,
        )
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name or 'The request'}: {message}.", code="invalid_value", param=name)


class AuthMiddleware:
    """Checks the API key and the size of a request, and counts responses by HTTP status."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.engine.metrics.http_requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            _check_size(int(headers.get(b"content-length", b"0")))
        except ApiError as error:
            response = await error_response(HTTPRequest(scope), error)
            return await response(scope, receive, counted_send)
        await self.app(scope, _limited(receive), counted_send)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        expected = self.service.api_key
        if expected is None or not path.startswith("/v1"):
            return
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, expected.encode()):
            raise ApiError(
                401,
                "Missing or invalid API key. Send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
            )


def _check_size(size: int) -> None:
    if size > MAX_BODY_BYTES:
        raise ApiError(413, f"The request body exceeds {MAX_BODY_BYTES >> 20} MiB.")


def _limited(receive: Receive) -> Callable[[], Awaitable[Message]]:
    """Count a body as it arrives: a chunked request does not declare its length."""
    size = 0

    async def limited_receive() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        try:
            _check_size(size)
        except ApiError as error:  # FastAPI passes on only errors of its own kind
            raise HTTPException(error.status, error.message) from error
        return message

    return limited_receive
