"""One process, one model, one port: the server from its start to its end."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from headstart.inference.config import SpeculativeConfig
from headstart.inference.generate import SpeculativeModel

from .app import Service, make_app
from .engine_thread import Worker

GRACE = 20.0  # seconds that the running answer gets at the end


@dataclass(frozen=True)
class Settings:
    """name: what requests call the model. queue: requests that may wait. context: tokens of prompt
    and answer together, None for what the model reads. max_tokens: of an answer, None for what the
    context leaves. key: that requests have to bring."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    queue: int = 64
    context: int | None = None
    max_tokens: int | None = None


class Server(uvicorn.Server):
    """At the first signal to end, new requests get 503 and the running one is finished, for `GRACE`
    seconds at most; the second one ends everything.

    ready: is told the address when requests are answered.
    """

    def __init__(self, service: Service, settings: Settings, ready: Callable[[str], None]):
        config = uvicorn.Config(
            make_app(service),
            host=settings.host,
            port=settings.port,
            lifespan="on",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._worker, self._ready = service.worker, ready
        self._until: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def leave(self) -> None:
        """End when the running request is answered."""
        if self._until is None:
            self._until = time.monotonic() + GRACE

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Only noted here: a handler may not wait for a lock that the interrupted code holds.
        if self._until is None:
            self.leave()
        else:
            super().handle_exit(signal.Signals(sig), frame)

    async def on_tick(self, counter: int) -> bool:
        if self._until is not None:
            self._worker.drain()
            if self._worker.idle or time.monotonic() > self._until:
                self._worker.stop()
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(
    model: SpeculativeModel,
    candidates: SpeculativeConfig | None,
    settings: Settings,
    ready: Callable[[str], None],
) -> Server:
    """A server for `Server.run()`. ValueError for limits that the model cannot keep."""
    context = _context(model, settings.context)
    service = Service(
        Worker(model, candidates, settings.queue),
        settings.name,
        context,
        min(settings.max_tokens or context, context),
        settings.key,
    )
    return Server(service, settings, ready)


def _context(model: SpeculativeModel, wanted: int | None) -> int:
    limit = model.target.context_limit
    if wanted is None and limit is None:
        raise ValueError(
            f"{model.target.name} names no limit of its context. Say how many tokens prompt and "
            "answer may have together: --context."
        )
    if wanted is not None and limit is not None and wanted > limit:
        raise ValueError(
            f"A context of {wanted} tokens was asked for, but {model.target.name} reads {limit}. "
            "Ask for less."
        )
    context = limit if wanted is None else wanted
    assert context is not None
    return context
