"""`headstart serve`: OpenAI's client against a tiny model.

Every response must equal that of `generate`, whatever other clients do.
"""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest
from chat_model import save
from openai import APIError, APIStatusError
from run_command import refused, run
from running_server import TOKENS, Served, request_body, serving, wait_until

from headstart.inference.detokenizer import TextStream
from headstart.inference.serving.app import MAX_BODY_BYTES
from headstart.inference.serving.engine_thread import Request
from headstart.model.cache.kv_cache import KVCache
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target

CONTEXT = 300


@pytest.fixture(scope="module")
def served(fused: Path) -> Iterator[Served]:
    yield from serving(fused, max_model_len=CONTEXT)


@pytest.fixture
def narrow(fused: Path) -> Iterator[Served]:
    """A server with a queue of one request and an API key."""
    yield from serving(fused, max_queued=1, api_key="secret", max_tokens=100)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[Served], None]:
    """Slow decode steps, so that requests overlap."""

    def slowed(one: Served) -> None:
        stream = one.model.stream

        def steps(*given: Any, **options: Any) -> Iterator[list[int]]:
            def each() -> Iterator[list[int]]:
                for step in begun:
                    time.sleep(0.1)
                    yield step

            begun = stream(*given, **options)
            return each()

        monkeypatch.setattr(one.model, "stream", steps)

    return slowed


def test_chat(served: Served) -> None:
    ids = served.ids("tell me")
    expected = served.tokens(ids)
    response: Any = served.client.chat.completions.create(
        **request_body(messages=[{"role": "user", "content": "tell me"}]),
        temperature=0,
        max_completion_tokens=TOKENS,
    )
    (choice,) = response.choices
    assert choice.message.content == served.offline.target.text(expected)
    assert choice.message.role == "assistant"
    ended = expected[-1] in served.offline.target.eos_ids
    assert choice.finish_reason == ("stop" if ended else "length")
    usage = response.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected))
    assert usage.total_tokens == len(ids) + len(expected)
    # A tree has more draft tokens than a path can accept.
    details = usage.completion_tokens_details
    assert 0 < details.accepted_prediction_tokens < len(expected)
    assert details.rejected_prediction_tokens > 0
    parts = [{"type": "text", "text": "tell"}, {"type": "text", "text": " me"}]
    again = served.post(
        messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=TOKENS
    )
    assert again.json()["choices"][0]["message"]["content"] == choice.message.content


def test_stream_equals_the_whole_response(served: Served) -> None:
    request = request_body(messages=[{"role": "user", "content": "tell me"}])
    stream: Any = served.client.chat.completions.create(
        **request,
        temperature=0,
        max_tokens=TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    ids = served.ids("tell me")
    assert "".join(pieces) == served.text(ids) and len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * len(chunks[:-1])
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert last.choices == [] and last.usage.completion_tokens == len(served.tokens(ids))
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_completions_of_text_and_of_token_ids(served: Served) -> None:
    ids = served.offline.target.tokenizer("once upon")["input_ids"]
    create: Any = served.client.completions.create
    options = {"model": "tiny", "temperature": 0, "max_tokens": 24}
    expected = served.text(ids, count=24)
    assert create(prompt="once upon", **options).choices[0].text == expected
    assert create(prompt=[ids], **options).choices[0].text == expected
    chunks = list(create(prompt=ids, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    short = create(prompt=ids, model="tiny", temperature=0)
    assert short.usage.completion_tokens <= 16  # OpenAI's own limit where none is given


def test_a_seed_gives_the_tokens_of_generate(served: Served) -> None:
    create: Any = served.client.completions.create

    def completed(**more: Any) -> str:
        given = {"model": "tiny", "prompt": "once", "temperature": 0.9, "top_p": 0.95}
        return create(**given, max_tokens=24, **more).choices[0].text

    ids = served.offline.target.tokenizer("once")["input_ids"]
    sampling = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
    for seed in (5, -7):
        assert (
            completed(seed=seed)
            == completed(seed=seed)
            == served.text(ids, count=24, seed=seed, **sampling)
        )
    assert completed(seed=5) != completed(seed=6)
    assert completed() != completed()


def test_stop_strings_are_never_sent(served: Served) -> None:
    ids = served.ids("stop it")
    tokens = served.tokens(ids)
    text = served.offline.target.text(tokens)
    places = [at for at in range(4, len(text) - 1) if "\ufffd" not in text[at : at + 2]]
    stop = text[places[0] : places[0] + 2]
    expected = text[: text.index(stop)]
    enough = next(n for n in range(TOKENS) if stop in served.offline.target.text(tokens[:n]))
    request = request_body(messages=[{"role": "user", "content": "stop it"}], temperature=0)
    for given in (stop, ["not there", stop + "nor there", stop]):
        whole = served.post(**request, max_tokens=TOKENS, stop=given).json()
        assert whole["choices"][0]["message"]["content"] == expected
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] == enough
        stream: Any = served.client.chat.completions.create(
            **request, max_tokens=TOKENS, stop=given, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(pieces) == expected


WRONG: list[tuple[dict[str, Any], int, str | None]] = [
    ({"n": 2}, 400, "n"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    ({"tempertaure": 1}, 400, "tempertaure"),
    ({"\ud800": 1}, 400, None),
    ({"temperature": 3}, 400, "temperature"),
    ({"temperature": 1e-9}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": True}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 400, "max_tokens"),
    ({"seed": 1 << 63}, 400, "seed"),
    ({"stop": ["a"] * 5}, 400, "stop"),
    ({"stop": ""}, 400, "stop.0"),
    ({"stream_options": {"include_usage": True}}, 400, None),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages.0.content",
    ),
    ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, 400, None),
    ({"max_tokens": CONTEXT - 1}, 400, None),
    ({"model": "gpt"}, 404, "model"),
]


@pytest.mark.parametrize(("given", "status", "param"), WRONG)
def test_unsupported_parameters_are_refused_by_name(
    served: Served, given: dict[str, Any], status: int, param: str | None
) -> None:
    response = served.post(**given)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert error["message"] and error["type"] == "invalid_request_error"


def test_neutral_values_are_accepted(served: Served) -> None:
    neutral = {"n": 1, "logprobs": None, "user": "me", "tools": [], "presence_penalty": 0}
    more = {"response_format": {"type": "text"}, "logit_bias": {}, "metadata": {"a": "b"}}
    plain = served.post(temperature=0, max_tokens=8).json()
    full = served.post(temperature=0, max_tokens=8, **neutral, **more).json()
    assert plain["choices"] == full["choices"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{oops", "no valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe", ""),
        (b"", ""),
        (b"[" * 9999, ""),
    ],
)
def test_malformed_bodies(served: Served, body: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{served.address}/v1/completions", content=body, headers=headers)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_invalid_prompts(served: Served) -> None:
    for prompt in ("", [], [0, 10**9], [-1], ["a", "b"], "\ud800", [[1], [2]], [1.5], 3):
        body = {"model": "tiny", "prompt": prompt}
        content = json.dumps(body)
        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{served.address}/v1/completions", content=content, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"]


def test_large_requests_are_refused(served: Served) -> None:
    host = served.address.removeprefix("http://")
    asked = HTTPConnection(host, timeout=20)
    asked.putrequest("POST", "/v1/completions")
    asked.putheader("Content-Length", str(MAX_BODY_BYTES + 1))
    asked.endheaders()
    assert asked.getresponse().status == 413
    asked.close()

    def parts() -> Iterator[bytes]:
        for _ in range(18):
            yield b" " * (1 << 20)

    address = f"{served.address}/v1/completions"
    counted = httpx.post(address, content=parts(), headers={"Content-Type": "application/json"})
    assert counted.status_code == 413 and "MiB" in counted.json()["error"]["message"]


def test_models_health_metrics(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{served.address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.address}/v2").json()["error"]["message"] == "Not Found"
    before = {
        name: served.metric(name) for name in ("generation_tokens_total", "decode_steps_total")
    }
    usage = served.post(temperature=0, max_tokens=TOKENS).json()["usage"]
    more = {name: served.metric(name) - value for name, value in before.items()}
    assert more["generation_tokens_total"] == usage["completion_tokens"]
    accepted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
    assert 0 < more["decode_steps_total"] <= usage["completion_tokens"] - accepted
    for name in (
        "spec_decode_acceptance_length",
        "request_tokens_per_second",
        "request_inference_time_seconds",
        "time_to_first_token_seconds",
    ):
        assert served.metric(f"{name}_count") > 0 < served.metric(f"{name}_sum")
    assert served.metric('http_requests_total{status="200"}') > 0
    assert served.metric("num_requests_waiting") == 0


def test_a_disconnect_ends_the_request(served: Served, slow: Callable[[Served], None]) -> None:
    slow(served)
    before = served.metric("generation_tokens_total"), served.metric("client_disconnects_total")
    address = f"{served.address}/v1/chat/completions"
    with httpx.stream("POST", address, json=request_body(max_tokens=200, stream=True)) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):  # and without a stream
        httpx.post(address, json=request_body(max_tokens=200), timeout=0.5)
    wait_until(
        lambda: (
            served.metric("num_requests_running") == 0
            and served.metric("client_disconnects_total") > before[1]
        )
    )
    assert served.metric("client_disconnects_total") == before[1] + 2
    assert served.metric("generation_tokens_total") < before[0] + 200


def test_nothing_of_a_request_is_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    made: list[str] = []
    for kind in (Request, TextStream, KVCache):

        def init(self: Any, *given: Any, make: Any = kind.__init__, **more: Any) -> None:
            make(self, *given, **more)
            alive.add(self)
            made.append(type(self).__name__)

        monkeypatch.setattr(kind, "__init__", init)
    served.post(max_tokens=8)
    address = f"{served.address}/v1/chat/completions"
    with httpx.stream("POST", address, json=request_body(max_tokens=200, stream=True)) as response:
        next(response.iter_lines())
    wait_until(lambda: served.metric("num_requests_running") == 0)
    wait_until(lambda: gc.collect() >= 0 and not alive)
    assert set(made) == {"Request", "TextStream", "KVCache"}


def test_an_internal_error_ends_one_request_only(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[list[int]]:
        yield [65, 66]
        raise RuntimeError("boom")

    with monkeypatch.context() as patch:
        patch.setattr(served.model, "stream", broken)
        assert served.post().status_code == 500
        stream: Any = served.client.chat.completions.create(**request_body(), stream=True)
        with pytest.raises(APIError, match="Internal error"):
            list(stream)
    assert served.post(max_tokens=4).status_code == 200


def test_key_queue_and_shutdown(narrow: Served, slow: Callable[[Served], None]) -> None:
    slow(narrow)
    assert narrow.post().status_code == 401
    assert httpx.get(f"{narrow.address}/health").status_code == 200
    assert narrow.post(max_tokens=101, temperature=0).json()["error"]["code"] == "invalid_api_key"
    statuses: Queue[int | str] = Queue()

    def ask(tokens: int) -> None:
        try:
            narrow.client.chat.completions.create(**request_body(max_tokens=tokens, temperature=0))
            statuses.put("completed")
        except APIStatusError as error:
            statuses.put(error.status_code)

    threads = [threading.Thread(target=ask, args=(tokens,)) for tokens in (30, 5)]
    for thread, name in zip(threads, ("num_requests_running", "num_requests_waiting"), strict=True):
        thread.start()
        wait_until(lambda name=name: narrow.metric(name) == 1)  # type: ignore[misc]
    with pytest.raises(APIStatusError, match="waiting") as full:
        narrow.client.chat.completions.create(**request_body())
    assert full.value.status_code == 429 and int(full.value.response.headers["Retry-After"]) > 0
    narrow.server.shut_down()
    assert statuses.get(timeout=10) == 503  # the waiting request
    assert httpx.get(f"{narrow.address}/health").status_code == 503
    with pytest.raises(APIStatusError) as ending:
        narrow.client.chat.completions.create(**request_body())
    assert ending.value.status_code == 503
    assert statuses.get(timeout=10) == "completed"  # the running request
    for thread in threads:
        thread.join(10)


def test_max_model_len_beyond_the_target(fused: Path) -> None:
    assert "(512 tokens)" in refused("serve", fused, "--max-model-len", 513, "--budget", "off")


@pytest.mark.parametrize("window", [None, 8])
def test_print_shows_the_command_of_other_engines(tmp_path: Path, window: int | None) -> None:
    target = load_target(save(tmp_path / "plain"))
    head = make_head(target, "eagle3", {"taps": [0, 1], "window": window})
    save_head(head, tmp_path / "head", HeadMeta(target="tiny", steps=4))
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "a b")
    folder = tmp_path / "a b"
    if window is not None:
        assert "attention window" in refused("serve", folder, "--print", "vllm")
        return
    drafting = (
        f'{{"method": "eagle3", "model": "{folder}/draft_heads", "num_speculative_tokens": 4}}'
    )
    line = run("serve", folder, "--print", "vllm").output.strip()
    assert line == f"vllm serve '{folder}' --speculative-config '{drafting}'"
    assert (
        line.replace(f"'{folder}'", "FOLDER").replace(str(folder), "FOLDER")
        in (folder / "README.md").read_text()
    )
    assert run("serve", folder, "--print", "sglang").output.strip() == (
        f"python -m sglang.launch_server --model-path '{folder}' --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path '{folder}/draft_heads' --speculative-num-steps 4 "
        "--speculative-eagle-topk 1 --speculative-num-draft-tokens 5"
    )


def test_print_refuses_unsupported_heads(fused: Path) -> None:
    assert "headstart serve" in refused("serve", fused, "--print", "sglang")
