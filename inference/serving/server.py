"""The server process: one model, one port, from start-up to a graceful shutdown."""

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
from .engine_thread import EngineThread

SHUTDOWN_GRACE = 20.0  # seconds that the running request gets


@dataclass(frozen=True)
class ServerConfig:
    """served_model_name: name of the model in requests and responses.
    api_key: requests without it are refused; None accepts all.
    max_queued: maximum number of waiting requests.
    max_model_len: maximum tokens of prompt and response; None for the target's context.
    max_tokens: maximum new tokens per response; None for the remaining context.
    """

    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_queued: int = 64
    max_model_len: int | None = None
    max_tokens: int | None = None


class Server(uvicorn.Server):
    """Shuts down gracefully: the first signal refuses new requests with 503 and lets the running
    one finish within `SHUTDOWN_GRACE`; the second signal ends everything.

    on_ready: receives the address once the server accepts requests.
    """

    def __init__(self, service: Service, config: ServerConfig, on_ready: Callable[[str], None]):
        uvicorn_config = uvicorn.Config(
            make_app(service),
            host=config.host,
            port=config.port,
            lifespan="on",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        super().__init__(uvicorn_config)
        self._engine, self._on_ready = service.engine, on_ready
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def shut_down(self) -> None:
        """End once the running request has finished."""
        if self._deadline is None:
            self._deadline = time.monotonic() + SHUTDOWN_GRACE

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Only recorded here: a signal handler must not wait for a lock that the interrupted code
        # holds.
        if self._deadline is None:
            self.shut_down()
        else:
            super().handle_exit(signal.Signals(sig), frame)

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            self._engine.drain()
            if self._engine.idle or time.monotonic() > self._deadline:
                self._engine.stop()
                self.should_exit = True
        return await super().on_tick(counter)


def make_server(
    model: SpeculativeModel,
    speculative: SpeculativeConfig,
    config: ServerConfig,
    on_ready: Callable[[str], None],
) -> Server:
    """Build a server for `Server.run()`. Raises ValueError for limits beyond the model's."""
    max_model_len = _max_model_len(model, config.max_model_len)
    service = Service(
        EngineThread(model, speculative, config.max_queued),
        config.served_model_name,
        max_model_len,
        min(config.max_tokens or max_model_len, max_model_len),
        config.api_key,
    )
    return Server(service, config, on_ready)


def _max_model_len(model: SpeculativeModel, requested: int | None) -> int:
    limit = model.target.context_limit
    if requested is None and limit is None:
        raise ValueError(
            f"{model.target.name} does not declare a context length. Set the maximum tokens of "
            "prompt and response with --max-model-len."
        )
    if requested is not None and limit is not None and requested > limit:
        raise ValueError(
            f"--max-model-len {requested} exceeds the context length of {model.target.name} "
            f"({limit} tokens). Lower it."
        )
    max_model_len = limit if requested is None else requested
    assert max_model_len is not None
    return max_model_len
