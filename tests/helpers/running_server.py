"""A running `headstart serve` with a tiny model, and what it has to say."""

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
from headstart.inference.serving.server import Server, Settings, make_server
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

    def ids(self, words: str) -> list[int]:
        return prompt_ids(self.offline.target, [{"role": "user", "content": words}])

    def tokens(self, ids: list[int], count: int = TOKENS, **options: Any) -> list[int]:
        """What `generate` answers."""
        said = self.offline.generate(torch.tensor([ids]), max_new_tokens=count, **options)
        assert isinstance(said, torch.Tensor)
        return said[0, len(ids) :].tolist()

    def text(self, ids: list[int], **options: Any) -> str:
        return self.offline.target.text(self.tokens(ids, **options))

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        content = json.dumps(asking(**body))  # escaped, so that half characters get through
        return httpx.post(self.address + path, content=content, headers=headers, timeout=30)

    def figure(self, name: str) -> float:
        return figure(httpx.get(f"{self.address}/metrics").text, name)


def asking(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]} | more


def figure(metrics: str, name: str) -> float:
    lines = (line.rsplit(" ", 1) for line in metrics.splitlines())
    return next(float(value) for key, value in lines if key == f"headstart_{name}")


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def serving(folder: Path, **settings: Any) -> Iterator[Served]:
    model = SpeculativeModel.from_pretrained(folder)
    candidates = SpeculativeConfig(model.head, DEFAULT_TREE, ngram=True)
    told: Queue[str] = Queue()
    server = make_server(model, candidates, Settings("tiny", port=0, **settings), told.put)
    thread = threading.Thread(target=server.run)
    thread.start()
    address = told.get(timeout=60)
    client = OpenAI(base_url=f"{address}/v1", api_key=settings.get("key", "none"), max_retries=0)
    yield Served(server, model, address, client, SpeculativeModel.from_pretrained(folder))
    server.leave()
    thread.join(30)
    assert not thread.is_alive()
