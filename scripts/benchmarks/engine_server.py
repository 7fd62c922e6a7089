"""A production engine as a process of its own: started, asked for greedy answers, and read for what
it counted. Both vLLM and llama.cpp count under the same names."""

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
START_SECONDS = 900  # large models take long to read
ANSWER_SECONDS = 900  # one answer on a CPU may take minutes
HEALTH_SECONDS = 10
STOP_SECONDS = 60
COUNTER = re.compile(r"^\w+:spec_decode_(?P<name>\w+)_total(?P<labels>{.*})? (?P<value>\S+)$", re.M)
POSITION = re.compile(r'position="(\d+)"')
DIRECT = build_opener(ProxyHandler({}))  # a proxy of the environment does not lead to this machine


@dataclass(frozen=True)
class Counted:
    """passes: of the target over a draft. accepted[d]: in how many of them guess d + 1 came."""

    passes: int
    accepted: tuple[int, ...]

    def since(self, before: Counted) -> Counted:
        past = before.accepted + (0,) * (len(self.accepted) - len(before.accepted))
        accepted = tuple(now - then for now, then in zip(self.accepted, past, strict=True))
        return Counted(self.passes - before.passes, accepted)


@dataclass(frozen=True)
class Server:
    """A running engine. model: the name that it serves under."""

    dialect: Dialect
    model: str
    address: str

    def answer(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[list[int], float]:
        """The tokens of a greedy answer, and seconds."""
        request: dict[str, Any] = {"prompt": list(prompt), "temperature": 0}
        if self.dialect == "vllm":
            more = {"max_tokens": max_new_tokens, "return_token_ids": True}
            # What the model's own settings ask for would change what is greedy.
            request |= {"model": self.model, "repetition_penalty": 1.0, **more}
        else:
            request |= {"n_predict": max_new_tokens, "return_tokens": True, "cache_prompt": False}
        path = "/v1/completions" if self.dialect == "vllm" else "/completion"
        begun = time.perf_counter()
        answer = json.loads(self._fetch(path, request))
        seconds = time.perf_counter() - begun
        tokens = answer["choices"][0]["token_ids"] if self.dialect == "vllm" else answer["tokens"]
        return list(tokens), seconds

    def counted(self) -> Counted:
        """Since it was started; nothing for an engine that does not draft."""
        values: dict[str, int] = {}
        accepted: dict[int, int] = {}
        for line in COUNTER.finditer(self._fetch("/metrics")):
            position = POSITION.search(line["labels"] or "")
            if position is not None:
                accepted[int(position[1])] = int(float(line["value"]))
            else:
                values[line["name"]] = int(float(line["value"]))
        return Counted(values.get("num_drafts", 0), tuple(accepted[at] for at in sorted(accepted)))

    def version(self) -> str:
        if self.dialect == "vllm":
            return str(json.loads(self._fetch("/version"))["version"])
        return str(json.loads(self._fetch("/props"))["build_info"])

    def ready(self) -> bool:
        try:
            self._opened("/health", None, HEALTH_SECONDS)
        except (OSError, HTTPException):
            return False
        return True

    def _fetch(self, path: str, body: Mapping[str, Any] | None = None) -> str:
        """ValueError where it refuses, has ended or does not answer in time."""
        try:
            return self._opened(path, body, ANSWER_SECONDS)
        except (OSError, HTTPException) as error:
            raise ValueError(
                f"{self.dialect} does not answer any more ({self.address}{path}: {error}). What it "
                "wrote says why: give --logs FOLDER to keep that."
            ) from error

    def _opened(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> str:
        """ValueError with the engine's own words where it refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with DIRECT.open(request, timeout=seconds) as reply:
                return str(reply.read().decode())
        except HTTPError as error:
            if error.code == 503:  # still reading the model
                raise
            raise ValueError(f"{self.address}{path}: {error.read().decode()}") from error


@contextmanager
def running(
    dialect: Dialect, model: str, command: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[Server]:
    """Start an engine, and end it. log: what it says. ValueError where it does not start."""
    port = _free_port()
    where = ["--host", LOCAL, "--port", str(port)]
    server = Server(dialect, model, f"http://{LOCAL}:{port}")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [*command, *where], env=os.environ | env, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            _wait(server, process, log)
            yield server
        finally:
            _stop(process)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while not server.ready():
        if process.poll() is not None or time.monotonic() > end:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = "\n".join(lines[-15:])
            raise ValueError(
                f"{server.dialect} did not start. The last lines that it wrote:\n{last}"
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
