"""`headstart serve` as a process with 64 clients: some disconnect, some send invalid requests.

Every complete response must equal that of `generate`, and neither memory, threads nor files leak.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from openai import APIStatusError, AsyncOpenAI
from running_server import metric, request_body, wait_until

from headstart.inference.config import SpeculativeConfig
from headstart.inference.generate import SpeculativeModel
from headstart.inference.rollout import prompt_ids

CLIENTS = 64
TOKENS = 8
LONG = 40
MEGABYTES = 8  # that memory may differ by
CONTENTS = [f"tell {'ab' * n}" for n in range(8)]
INVALID: list[dict[str, Any]] = [{"n": 3}, {"temperature": "x"}, {"model": "no"}, {"stop": 1}]


@pytest.fixture
def child(fused: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headstart.scripts.cli", "serve", str(fused)]
    options = ["--port", "0", "--served-model-name", "tiny", "--budget", "8/4/3+ngram"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "HEADSTART_API_KEY": "secret",
        "HEADSTART_HOME": str(tmp_path),
    }
    with subprocess.Popen(
        command + options, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def expected(fused: Path) -> dict[tuple[str, int | None], str]:
    """Responses by content and seed; greedy without a seed."""
    model = SpeculativeModel.from_pretrained(fused)
    texts: dict[tuple[str, int | None], str] = {}
    for number, content in enumerate(CONTENTS):
        ids = prompt_ids(model.target, [{"role": "user", "content": content}])
        for seed in (None, number):
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": seed}
            texts[content, seed] = decoded(model, ids, TOKENS, **({} if seed is None else sampling))
    assert len(set(texts.values())) > 12  # or mixed-up responses would go unnoticed
    texts["long", None] = decoded(
        model, prompt_ids(model.target, [{"role": "user", "content": "long"}]), LONG
    )
    return texts


def decoded(model: SpeculativeModel, ids: list[int], count: int, **options: Any) -> str:
    ids_BT = model.generate(
        torch.tensor([ids]), max_new_tokens=count, speculative=SpeculativeConfig(), **options
    )
    assert isinstance(ids_BT, torch.Tensor)
    return model.target.text(ids_BT[0, len(ids) :].tolist())


def request(content: str, seed: int | None, tokens: int = TOKENS) -> dict[str, Any]:
    body = request_body(
        messages=[{"role": "user", "content": content}], max_tokens=tokens, seed=seed
    )
    return body | {"temperature": 0 if seed is None else 1}


async def read(client: AsyncOpenAI, body: dict[str, Any]) -> str:
    stream: Any = await client.chat.completions.create(**body, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def disconnect(client: AsyncOpenAI, body: dict[str, Any], number: int) -> None:
    """Disconnect in a stream, before its first chunk, or before a response without a stream."""
    if number % 3:
        response = client.chat.completions.create(**body, stream=number % 3 == 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(response, 0.02 * (1 + number % 5))
        return
    stream: Any = await client.chat.completions.create(**body, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()


async def crowd(address: str, expected: dict[tuple[str, int | None], str]) -> None:
    async with AsyncOpenAI(base_url=address, api_key="secret", max_retries=0) as client:

        async def one(number: int) -> None:
            place = number // 4 % len(CONTENTS)
            content, kind = CONTENTS[place], number % 4
            if kind == 0:
                assert await read(client, request(content, None)) == expected[content, None]
            elif kind == 1:
                whole: Any = await client.chat.completions.create(**request(content, place))
                assert whole.choices[0].message.content == expected[content, place]
            elif kind == 2:
                await disconnect(client, request(content, None, 400), number // 4)
            else:
                with pytest.raises(APIStatusError) as error:
                    await read(client, request(content, None) | INVALID[number // 4 % 4])
                assert error.value.status_code in (400, 404)

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))


def test_a_crowd(child: subprocess.Popen[str], expected: dict[tuple[str, int | None], str]) -> None:
    assert child.stdout is not None
    address = child.stdout.readline().split()[-1]
    metrics = address.replace("/v1", "/metrics")

    def now(name: str) -> float:
        return metric(httpx.get(metrics).text, name)

    process = psutil.Process(child.pid)
    held: list[tuple[float, int, int]] = []
    for _ in range(2):
        asyncio.run(crowd(address, expected))
        wait_until(lambda: now("num_requests_waiting") == now("num_requests_running") == 0)
        wait_until(lambda: len(process.net_connections()) == 1)  # the listening socket
        held.append((process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()))
    assert held[1][0] < held[0][0] + MEGABYTES and held[1][1:] == held[0][1:], held
    # Clients that disconnected before their request arrived are not counted.
    assert 2 * 6 <= now("client_disconnects_total") <= 2 * 16

    async def during_shutdown() -> str:
        async with AsyncOpenAI(base_url=address, api_key="secret", max_retries=0) as client:
            body = request("long", None, LONG)
            stream: Any = await client.chat.completions.create(**body, stream=True)
            pieces: list[str] = []
            async for chunk in stream:
                if not pieces:
                    child.send_signal(signal.SIGTERM)
                pieces.append(chunk.choices[0].delta.content or "")
            return "".join(pieces)

    assert asyncio.run(during_shutdown()) == expected["long", None]
    assert child.wait(30) == 0
