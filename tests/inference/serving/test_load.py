"""`headstart serve` as a process, with 64 clients at once: some leave, some talk nonsense.

Every answer that is read to its end must be what `generate` says, and nothing may pile up.
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
from running_server import asking, figure, until

from headstart.inference.config import SpeculativeConfig
from headstart.inference.generate import SpeculativeModel
from headstart.inference.rollout import prompt_ids

CLIENTS = 64
TOKENS = 8
LONG = 40
MEGABYTES = 8  # that memory may differ by
WORDS = [f"tell {'ab' * n}" for n in range(8)]
NONSENSE: list[dict[str, Any]] = [{"n": 3}, {"temperature": "x"}, {"model": "no"}, {"stop": 1}]


@pytest.fixture
def child(fused: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "headstart.scripts.cli", "serve", str(fused)]
    options = ["--port", "0", "--name", "tiny", "--budget", "8/4/3+lookup"]
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
    """Texts by words and seed; without a seed greedy."""
    model = SpeculativeModel.from_pretrained(fused)
    texts: dict[tuple[str, int | None], str] = {}
    for number, words in enumerate(WORDS):
        ids = prompt_ids(model.target, [{"role": "user", "content": words}])
        for seed in (None, number):
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": seed}
            texts[words, seed] = said(model, ids, TOKENS, **({} if seed is None else sampling))
    assert len(set(texts.values())) > 12  # or a mix-up would go unseen
    texts["long", None] = said(
        model, prompt_ids(model.target, [{"role": "user", "content": "long"}]), LONG
    )
    return texts


def said(model: SpeculativeModel, ids: list[int], count: int, **options: Any) -> str:
    out = model.generate(
        torch.tensor([ids]), max_new_tokens=count, speculative=SpeculativeConfig(), **options
    )
    assert isinstance(out, torch.Tensor)
    return model.target.text(out[0, len(ids) :].tolist())


def request(words: str, seed: int | None, tokens: int = TOKENS) -> dict[str, Any]:
    body = asking(messages=[{"role": "user", "content": words}], max_tokens=tokens, seed=seed)
    return body | {"temperature": 0 if seed is None else 1}


async def read(client: AsyncOpenAI, body: dict[str, Any]) -> str:
    stream: Any = await client.chat.completions.create(**body, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def leave(client: AsyncOpenAI, body: dict[str, Any], number: int) -> None:
    """In the middle of a stream, before it, or before an answer that is no stream."""
    if number % 3:
        asked = client.chat.completions.create(**body, stream=number % 3 == 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asked, 0.02 * (1 + number % 5))
        return
    stream: Any = await client.chat.completions.create(**body, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()


async def crowd(address: str, expected: dict[tuple[str, int | None], str]) -> None:
    async with AsyncOpenAI(base_url=address, api_key="secret", max_retries=0) as client:

        async def one(number: int) -> None:
            place = number // 4 % len(WORDS)
            words, kind = WORDS[place], number % 4
            if kind == 0:
                assert await read(client, request(words, None)) == expected[words, None]
            elif kind == 1:
                whole: Any = await client.chat.completions.create(**request(words, place))
                assert whole.choices[0].message.content == expected[words, place]
            elif kind == 2:
                await leave(client, request(words, None, 400), number // 4)
            else:
                with pytest.raises(APIStatusError) as error:
                    await read(client, request(words, None) | NONSENSE[number // 4 % 4])
                assert error.value.status_code in (400, 404)

        await asyncio.gather(*(one(number) for number in range(CLIENTS)))


def test_a_crowd(child: subprocess.Popen[str], expected: dict[tuple[str, int | None], str]) -> None:
    assert child.stdout is not None
    address = child.stdout.readline().split()[-1]
    metrics = address.replace("/v1", "/metrics")

    def now(name: str) -> float:
        return figure(httpx.get(metrics).text, name)

    process = psutil.Process(child.pid)
    held: list[tuple[float, int, int]] = []
    for _ in range(2):
        asyncio.run(crowd(address, expected))
        until(lambda: now("queue_length") == now("running") == 0)
        until(lambda: len(process.net_connections()) == 1)  # where it listens
        held.append((process.memory_info().rss / 1e6, process.num_threads(), process.num_fds()))
    assert held[1][0] < held[0][0] + MEGABYTES and held[1][1:] == held[0][1:], held
    # Clients that left before their request was there are not counted.
    assert 2 * 6 <= now("disconnects_total") <= 2 * 16

    async def while_it_ends() -> str:
        async with AsyncOpenAI(base_url=address, api_key="secret", max_retries=0) as client:
            body = request("long", None, LONG)
            stream: Any = await client.chat.completions.create(**body, stream=True)
            pieces: list[str] = []
            async for chunk in stream:
                if not pieces:
                    child.send_signal(signal.SIGTERM)
                pieces.append(chunk.choices[0].delta.content or "")
            return "".join(pieces)

    assert asyncio.run(while_it_ends()) == expected["long", None]
    assert child.wait(30) == 0
