"""The HTTP side: what comes in is checked here, and waits here for what the worker tells."""

from __future__ import annotations

import asyncio
import hmac
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headstart.inference.rollout import prompt_ids

from .engine_thread import Done, Event, Job, Order, Piece, Worker
from .openai_api import ApiError, ChatRequest, CompletionRequest, Reply

MOST_BYTES = 16 << 20  # of a request: more than any context holds as text


@dataclass
class Service:
    """A worker, and what requests may ask of it. name: of the model. context: tokens of prompt and
    answer together; max_tokens: of an answer. key: without it requests are refused."""

    worker: Worker
    name: str
    context: int
    max_tokens: int
    key: str | None = None
    # One thread, so that tokenizing neither stops the server nor runs many times at once.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    async def order(self, asked: ChatRequest | CompletionRequest) -> Order:
        """ApiError for what cannot be answered."""
        if asked.model != self.name:
            raise ApiError(
                404,
                f"There is no model {asked.model!r} here, only {self.name!r}.",
                code="model_not_found",
                param="model",
            )
        self.worker.check()  # before the work of tokenizing
        loop = asyncio.get_running_loop()
        tokens = await loop.run_in_executor(self.tokenizing, self._tokens, asked)
        room = self._room(tokens, asked.limit)
        return Order(
            tokens, room, asked.temperature, asked.top_p, asked.seed, stop=tuple(asked.stop)
        )

    def _tokens(self, asked: ChatRequest | CompletionRequest) -> list[int]:
        target = self.worker.model.target
        if isinstance(asked, ChatRequest):
            try:
                return prompt_ids(target, [message.plain() for message in asked.messages])
            except (ValueError, TemplateError) as wrong:
                raise ApiError(400, str(wrong), param="messages") from wrong
        if isinstance(asked.prompt, str):
            tokens: list[int] = target.tokenizer(asked.prompt)["input_ids"]
        else:
            tokens = asked.prompt
        odd = [token for token in tokens if not 0 <= token < target.vocab_size]
        if odd:
            raise ApiError(
                400,
                f"The prompt holds the token {odd[0]}, but this model knows the tokens 0 to "
                f"{target.vocab_size - 1}.",
                param="prompt",
            )
        return tokens

    def _room(self, tokens: list[int], wanted: int | None) -> int:
        """How many tokens the answer may have."""
        if not tokens:
            raise ApiError(400, "The prompt is empty, so there is nothing to continue.")
        if wanted is not None and wanted > self.max_tokens:
            raise ApiError(
                400,
                f"At most {self.max_tokens} tokens can be asked for here, not {wanted}.",
                param="max_tokens",
            )
        if len(tokens) + (wanted or 1) > self.context:
            answer = "" if wanted is None else f" and {wanted} are asked for"
            raise ApiError(
                400,
                f"The prompt has {len(tokens)} tokens{answer}, but prompt and answer together may "
                f"have {self.context}. Shorten it, or ask for less.",
                code="context_length_exceeded",
            )
        return wanted or min(self.max_tokens, self.context - len(tokens))


def make_app(service: Service) -> ASGIApp:
    """The routes, behind a door that every request comes through."""
    worker = service.worker

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()
        service.tokenizing.shutdown()

    app = FastAPI(lifespan=life, openapi_url=None)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await _answer(service, asked, request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await _answer(service, asked, request)

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
        status = "ok" if worker.alive else "dead"
        status = "ending" if worker.draining else status
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(RequestValidationError, _told)
    app.add_exception_handler(HTTPException, _told)
    app.add_exception_handler(Exception, _told)
    return _Door(app, service)


def _card(service: Service) -> dict[str, Any]:
    card = {"id": service.name, "object": "model", "created": 0, "owned_by": "headstart"}
    return card | {"max_model_len": service.context}


async def _answer(
    service: Service, asked: ChatRequest | CompletionRequest, request: Request
) -> Response:
    order = await service.order(asked)
    chat = isinstance(asked, ChatRequest)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
    reply = Reply(chat, name, service.name, asked.include_usage)
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    job = Job(order, lambda event: _put(loop, events, event))
    service.worker.submit(job)
    try:
        async with _cancelled_when_gone(service.worker, job, request):
            first = await events.get()
            if isinstance(first, ApiError):
                raise first  # while the status can still say so
            if not asked.stream:
                text, done = await _whole(first, events)
                return JSONResponse(reply.whole(text, done.reason, done.usage))
    except BaseException:
        service.worker.cancel(job)
        raise
    return _Stream(_chunks(reply, first, events), lambda: service.worker.cancel(job))


def _put(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


@asynccontextmanager
async def _cancelled_when_gone(worker: Worker, job: Job, request: Request) -> AsyncIterator[None]:
    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        worker.cancel(job)

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _whole(event: Event, events: asyncio.Queue[Event]) -> tuple[str, Done]:
    text = ""
    while isinstance(event, Piece):
        text += event.text
        event = await events.get()
    if isinstance(event, ApiError):
        raise event
    return text, event


async def _chunks(reply: Reply, event: Event, events: asyncio.Queue[Event]) -> AsyncIterator[bytes]:
    """Server-sent events. What goes wrong from here on is one of them."""
    for chunk in reply.begin():
        yield _sent(chunk)
    while isinstance(event, Piece):
        yield _sent(reply.piece(event.text))
        event = await events.get()
    if isinstance(event, ApiError):
        yield _sent(event.body())
        return
    for chunk in reply.end(event.reason, event.usage):
        yield _sent(chunk)
    yield b"data: [DONE]\n\n"


def _sent(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body)}\n\n".encode()


class _Stream(StreamingResponse):
    """`left` is called at the end, however it comes."""

    def __init__(self, content: AsyncIterator[bytes], left: Callable[[], None]):
        super().__init__(content, media_type="text/event-stream")
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


async def _told(_: Request, error: Exception) -> Response:
    """Every error in the shape of OpenAI's."""
    if isinstance(error, RequestValidationError):
        error = _invalid(error)
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "The server could not answer; its log says why.")
    # Characters are escaped, because a part of a request that is no text may be in it.
    body = json.dumps(error.body())
    return Response(body, error.status, error.headers, media_type="application/json")


def _invalid(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["loc"] == ("body",) and "attributes" in first["type"]:
        return ApiError(
            400, "The request is no JSON object, or does not say Content-Type: application/json."
        )
    # Without the alternatives of a type ("str", "list[int]"), which pydantic names too.
    parts = [str(part) for part in first["loc"]]
    where = [part for part in parts if part not in ("body", "str") and "[" not in part]
    if first["type"] == "json_invalid":
        return ApiError(400, f"The request is no JSON: {first['ctx']['error']}.")
    name = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        return ApiError(
            400,
            f"{name} is not supported here, or not with this value. Leave it away.",
            code="unsupported_parameter",
            param=name,
        )
    said = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{name or 'The request'}: {said}.", code="invalid_value", param=name)


class _Door:
    """Checks the key and the size of a request, and counts answers by their status."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.service.worker.metrics.requests.labels(str(message["status"])).inc()
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_key(scope["path"], headers)
            _check_size(int(headers.get(b"content-length", b"0")))
        except ApiError as error:
            response = await _told(Request(scope), error)
            return await response(scope, receive, counted)
        await self.app(scope, _limited(receive), counted)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        key = self.service.key
        if key is None or not path.startswith("/v1"):
            return
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, key.encode()):
            raise ApiError(
                401,
                "The key is missing or wrong: Authorization: Bearer KEY.",
                code="invalid_api_key",
            )


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ApiError(413, f"A request may have {MOST_BYTES >> 20} MiB, not more.")


def _limited(receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The body of a request that does not say its length is counted as it comes."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        try:
            _check_size(size)
        except ApiError as error:  # FastAPI passes on its own kind of errors only
            raise HTTPException(error.status, error.message) from error
        return message

    return counted
