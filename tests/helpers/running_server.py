"""A running `headstart serve` with a tiny model, a client of it and its metrics."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import torch
from openai import OpenAI

from headstart.inference.config import SpeculativeConfig
from headstart.inference.generate import SpeculativeModel
from headstart.inference.rollout import prompt_ids
from headstart.inference.serving.server import Server, ServerConfig, make_server
from headstart.inference.tree_policy.defaults import DEFAULT_TREE

TOKENS = 40


@dataclass
class Served:
    """A running server, a client of it, and the same model offline."""

    server: Server
    model: SpeculativeModel
    address: str
    client: OpenAI
    offline: SpeculativeModel

    def ids(self, content: str) -> list[int]:
        return prompt_ids(self.offline.target, [{"role": "user", "content": content}])

    def tokens(self, ids: list[int], count: int = TOKENS, **options: Any) -> list[int]:
        """The response of `generate`."""
        generated = self.offline.generate(torch.tensor([ids]), max_new_tokens=count, **options)
        assert isinstance(generated, torch.Tensor)
        return generated[0, len(ids) :].tolist()

    def text(self, ids: list[int], **options: Any) -> str:
        return self.offline.target.text(self.tokens(ids, **options))

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        content = json.dumps(request_body(**body))  # escaped, so that lone surrogates get through
        return httpx.post(self.address + path, content=content, headers=headers, timeout=30)

    def metric(self, name: str) -> float:
        return metric(httpx.get(f"{self.address}/metrics").text, name)


def request_body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | more


def metric(metrics: str, name: str) -> float:
    lines = (line.rsplit(" ", 1) for line in metrics.splitlines())
    return next(float(value) for key, value in lines if key == f"headstart_{name}")


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def serving(folder: Path, **settings: Any) -> Iterator[Served]:
    model = SpeculativeModel.from_pretrained(folder)
    speculative = SpeculativeConfig(model.head, DEFAULT_TREE, ngram=True)
    addresses: Queue[str] = Queue()
    config = ServerConfig("tiny", port=0, **settings)
    server = make_server(model, speculative, config, addresses.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    address = addresses.get(timeout=60)
    client = OpenAI(
        base_url=f"{address}/v1", api_key=settings.get("api_key", "none"), max_retries=0
    )
    yield Served(server, model, address, client, SpeculativeModel.from_pretrained(folder))
    server.shut_down()
    thread.join(30)
    assert not thread.is_alive()
