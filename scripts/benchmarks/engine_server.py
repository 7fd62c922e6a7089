"""A vLLM or llama.cpp server as a process: start it, request greedy responses, read its counters.

Both engines name their speculative decoding counters alike.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

Dialect = Literal["vllm", "llama.cpp"]
LOCAL = "127.0.0.1"
START_SECONDS = 900  # large models take long to load
RESPONSE_SECONDS = 900  # a response on a CPU may take minutes
HEALTH_SECONDS = 10
STOP_SECONDS = 60
COUNTER = re.compile(r"^\w+:spec_decode_(?P<name>\w+)_total(?P<labels>{.*})? (?P<value>\S+)$", re.M)
POSITION = re.compile(r'position="(\d+)"')
DIRECT = build_opener(
    ProxyHandler({})
)  # a proxy of the environment must not be used for this machine


@dataclass(frozen=True)
class DraftCounters:
    """num_drafts: target passes that verified a draft. accepted_per_position: how often the draft
    token at each position was accepted."""

    num_drafts: int
    accepted_per_position: tuple[int, ...]

    def since(self, before: DraftCounters) -> DraftCounters:
        now, then = self.accepted_per_position, before.accepted_per_position
        then += (0,) * (len(now) - len(then))
        accepted = tuple(new - old for new, old in zip(now, then, strict=True))
        return DraftCounters(self.num_drafts - before.num_drafts, accepted)


@dataclass(frozen=True)
class EngineServer:
    """A running engine. model: the served model name."""

    dialect: Dialect
    model: str
    address: str

    def generate(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """The tokens of a greedy response, and the seconds it took."""
        request: dict[str, Any] = {"prompt": list(prompt), "temperature": 0}
        if self.dialect == "vllm":
            more = {"max_tokens": max_new_tokens, "return_token_ids": True}
            # The model's generation config may set penalties, which would change greedy decoding.
            request |= {"model": self.model, "repetition_penalty": 1.0, **more}
        else:
            request |= {"n_predict": max_new_tokens, "return_tokens": True, "cache_prompt": False}
        path = "/v1/completions" if self.dialect == "vllm" else "/completion"
        started = time.perf_counter()
        response = json.loads(self._fetch(path, request))
        seconds = time.perf_counter() - started
        if self.dialect == "vllm":
            tokens = response["choices"][0]["token_ids"]
        else:
            tokens = response["tokens"]
        return list(tokens), seconds

    def draft_counters(self) -> DraftCounters:
        """The counters since the start; zeros for an engine that does not draft."""
        values: dict[str, int] = {}
        accepted: dict[int, int] = {}
        for line in COUNTER.finditer(self._fetch("/metrics")):
            position = POSITION.search(line["labels"] or "")
            if position is not None:
                accepted[int(position[1])] = int(float(line["value"]))
            else:
                values[line["name"]] = int(float(line["value"]))
        per_position = tuple(accepted[at] for at in sorted(accepted))
        return DraftCounters(values.get("num_drafts", 0), per_position)

    def version(self) -> str:
        if self.dialect == "vllm":
            return str(json.loads(self._fetch("/version"))["version"])
        return str(json.loads(self._fetch("/props"))["build_info"])

    def ready(self) -> bool:
        try:
            self._open("/health", None, HEALTH_SECONDS)
        except (OSError, HTTPException):
            return False
        return True

    def _fetch(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """Raises ValueError if the engine refuses, has ended or does not respond in time."""
        try:
            return self._open(path, body, RESPONSE_SECONDS)
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"{self.dialect} does not respond any more ({self.address}{path}: {error}). Give "
                "--logs FOLDER to keep its log, which has the reason."
            ) from error

    def _open(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> str:
        """Raises ValueError with the engine's message if it refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request, timeout=seconds) as reply:
                return str(reply.read().decode())
        except HTTPError as error:
            if error.code == 503:  # still loading the model
                raise
            raise ValueError(f"{self.address}{path}: {error.read().decode()}") from error


@contextmanager
def running(
    dialect: Dialect, model: str, command: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[EngineServer]:
    """Run an engine for the duration of the context. log: file for its output.

    Raises ValueError if it does not start.
    """
    port = _free_port()
    address = ["--host", LOCAL, "--port", str(port)]
    server = EngineServer(dialect, model, f"http://{LOCAL}:{port}")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*command, *address], env=os.environ | env, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            _wait(server, process, log)
            yield server
        finally:
            _stop(process)


def _wait(server: EngineServer, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not server.ready():
        if process.poll() is not None or time.monotonic() > end:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = "\n".join(lines[-15:])
            raise ValueError(
                f"{server.dialect} did not start. The last lines of its output:\n{last}"
            )
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((LOCAL, 0))
        return int(free.getsockname()[1])
