"""The commands, end to end on a tiny chat model, and their error messages."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from chat_model import save
from run_command import refused, run

from headstart.model.checkpoint.head import read_head_file
from headstart.scripts import console

pytestmark = pytest.mark.usefixtures("wide")

RECIPE = """
target: {{name: {target}}}
head: {{kind: {kind}, {settings}}}
data: {{path: {data}, max_length: 128, global_batch_tokens: 512}}
loss: {{steps: 2}}
train: {{output: {out}, steps: 4, precision: float32}}
eval: {{prompts: {prompts}, count: 2, max_new_tokens: 8, every: 2}}
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"id": f"p{n}", "prompt": "say " + "ab" * n} for n in range(1, 7)]
    lines.append({"id": "two", "turns": ["first", "second"]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def responses(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    run("data", prompts, "--target", target, "--out", out, "--max-new-tokens", 24)
    return out


@pytest.fixture
def recipe(target: Path, prompts: Path, responses: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str = "mtp", settings: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            RECIPE.format(
                target=target, kind=kind, settings=settings, data=responses,
                out=tmp_path / "run", prompts=prompts,
            )
        )  # fmt: skip
        return path

    return write


@pytest.mark.parametrize("kind", ["mtp", "eagle3", "medusa"])
def test_main_job(kind, target, prompts, recipe, tmp_path):
    run("train", recipe(kind, "num_heads: 2" if kind == "medusa" else ""))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0
    run("fuse", target, tmp_path / "run" / "best", tmp_path / "fused")
    metrics_file = tmp_path / "metrics.json"
    run(
        "eval", tmp_path / "fused", "--prompts", prompts, "--limit", 3,
        "--max-new-tokens", 12, "--out", metrics_file, "--record",
    )  # fmt: skip
    metrics = json.loads(metrics_file.read_text())["results"][kind]
    assert metrics["identical"] == metrics["compared"] == 3
    assert metrics["acceptance_length"] >= 1
    (stored,) = read_head_file(tmp_path / "fused").meta.measured
    assert stored.acceptance_length == metrics["acceptance_length"]
    assert (
        f"| {stored.prompts} | {stored.tokens} | 3/3 |"
        in (tmp_path / "fused/README.md").read_text()
    )
    settings = ("--max-new-tokens", 12)
    fast = run("generate", tmp_path / "fused", "tell me", *settings).output
    slow = run("generate", tmp_path / "fused", "tell me", "--plain", *settings).output
    assert fast.splitlines()[1] == slow.splitlines()[1]
    assert kind in run("inspect", "head", tmp_path / "fused").output


def test_data_is_what_the_target_generates(target, prompts, responses):
    lines = [json.loads(line) for line in responses.read_text().splitlines()]
    assert len(lines) == 8  # 6 prompts of one turn, one of two
    second = next(line for line in lines if line["id"] == "two/1")
    assert [message["role"] for message in second["messages"]] == [
        "user", "assistant", "user", "assistant",
    ]  # fmt: skip
    for line in lines:
        ((begin, end),) = line["spans"]
        assert 0 < begin < end == len(line["tokens"])
    # transformers' own generate on the same prompt.
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target)
    ((begin, end),) = lines[0]["spans"]
    given = torch.tensor([lines[0]["tokens"][:begin]])
    expected = model.generate(given, max_new_tokens=24, do_sample=False)[0].tolist()
    assert lines[0]["tokens"] == expected


def test_data_resumes_where_it_stopped(target, prompts, responses, tmp_path):
    out = tmp_path / "responses.jsonl"
    arguments = ("data", prompts, "--target", target, "--out", out, "--max-new-tokens", 24)
    run(*arguments, "--limit", 3)
    whole = out.read_text()
    out.write_text(whole[:-20])  # as if it was killed while it wrote
    run(*arguments)
    ours = {json.loads(line)["id"]: line for line in out.read_text().splitlines()}
    theirs = {json.loads(line)["id"]: line for line in responses.read_text().splitlines()}
    assert ours == theirs
    before = out.read_text()
    run(*arguments)
    assert out.read_text() == before
    assert "other settings" in refused(*arguments, "--temperature", 1)


def test_inspect_data_marks_the_responses(target, responses):
    output = run("inspect", "data", responses, "--target", target, "--count", 1).output
    assert "<|im_start|>assistant" in output and "8 conversations" in output


def test_chat_keeps_the_conversation(target, prompts, recipe, tmp_path, monkeypatch):
    run("train", recipe(), "train.steps=1")
    run("fuse", target, tmp_path / "run" / "best", tmp_path / "fused")
    inputs = iter(["hello", "and now?", ""])
    seen: list[int] = []
    from headstart.scripts.commands import generate

    monkeypatch.setattr(generate.console, "input", lambda _: next(inputs))
    stream = generate.stream
    monkeypatch.setattr(
        generate,
        "stream",
        lambda model, ids, *given: seen.append(len(ids)) or stream(model, ids, *given),
    )
    run("generate", tmp_path / "fused", "--chat", "--max-new-tokens", 5)
    assert len(seen) == 2 and seen[1] > seen[0] + 5


def test_explain_prints_the_resolved_recipe(recipe):
    output = run("train", recipe(), "train.lr=0.5", "--explain").output
    assert "0.5" in output and "batch_tokens" in output


# What a user can get wrong -----------------------------------------------------------------------


def test_unknown_recipe_key_names_the_nearest(recipe):
    assert "train.lr" in refused("train", recipe(), "train.lrr=1")


def test_unknown_recipe(recipe):
    assert "smollm2" in refused("train", "no-such-recipe")


def test_unknown_head_kind(recipe):
    message = refused("train", recipe("medusae"))
    assert "medusae" in message and "medusa" in message


def test_unknown_head_setting(recipe):
    assert "num_head" in refused("train", recipe("medusa", "num_head: 3"))


def test_missing_target(recipe, tmp_path):
    assert "nowhere" in refused("train", recipe(), f"target.name={tmp_path / 'nowhere'}")


def test_empty_data_file(recipe, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert "empty" in refused("train", recipe(), f"data.path={tmp_path / 'empty.jsonl'}")


def test_broken_line_is_named_and_can_be_skipped(recipe, responses, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(responses.read_text() + "{oops\n")
    message = refused("train", recipe(), f"data.path={broken}")
    assert "broken.jsonl:9" in message and "skip_broken" in message
    run("train", recipe(), f"data.path={broken}", "data.skip_broken=true")


def test_data_of_another_vocabulary(recipe, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"id": "x", "tokens": [1, 2, 99999], "spans": [[1, 3]]}) + "\n")
    assert "vocabulary" in refused("train", recipe(), f"data.path={other}")


def test_broken_prompt_line(target, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "fine"}\n{"prompt": "   "}\n')
    arguments = ("data", bad, "--target", target, "--out", tmp_path / "o.jsonl")
    message = refused(*arguments)
    assert "bad.jsonl:2" in message and "empty prompt" in message
    run(*arguments, "--skip-broken", "--max-new-tokens", 4)
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 1


def test_prompt_that_does_not_fit(tmp_path):
    small = save(tmp_path / "small", context=64)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 100}) + '\n{"prompt": "short"}\n')
    out = tmp_path / "o.jsonl"
    output = run("data", long, "--target", small, "--out", out, "--max-new-tokens", 4).output
    assert "skipped" in output and len(out.read_text().splitlines()) == 1


def test_target_without_chat_template(target, prompts, tmp_path):
    import shutil

    silent = Path(shutil.copytree(target, tmp_path / "silent"))
    (silent / "chat_template.jinja").unlink()
    message = refused("data", prompts, "--target", silent, "--out", tmp_path / "o.jsonl")
    assert "chat template" in message


def test_head_of_another_target(recipe, tmp_path):
    run("train", recipe(), "train.steps=1")
    other = save(tmp_path / "other", seed=1)
    message = refused("fuse", other, tmp_path / "run" / "best", tmp_path / "fused")
    assert "hash" in message and not (tmp_path / "fused").exists()


def test_generate_without_a_prompt_or_checkpoint(target):
    assert "There is no prompt" in refused("generate")
    assert "fuse" in refused("generate", target, "hello")
    assert "no prompt follows" in refused("generate", target)


def test_empty_prompt(target, recipe, tmp_path):
    run("train", recipe(), "train.steps=1")
    run("fuse", target, tmp_path / "run" / "best", tmp_path / "fused")
    assert "empty" in refused("generate", tmp_path / "fused", " ")


def test_full_disk_keeps_what_is_there(target, prompts, tmp_path, monkeypatch):
    out = tmp_path / "responses.jsonl"
    arguments = ("data", prompts, "--target", target, "--out", out, "--max-new-tokens", 4)
    run(*arguments, "--limit", 2)
    before = out.read_text()

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    from headstart.scripts.commands import generate_data as data

    with monkeypatch.context() as patch:
        patch.setattr(data, "json", SimpleNamespace(dumps=full, loads=json.loads))
        patch.setattr(data, "_check_settings", lambda *_: None)
        assert "disk is full" in refused(*arguments)
    assert out.read_text() == before
    run(*arguments)


def test_interruption_says_how_to_go_on(target, prompts, tmp_path, monkeypatch):
    from headstart.scripts.commands import generate_data as data

    def stop(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "write_responses", stop)
    result = run("data", prompts, "--target", target, "--out", tmp_path / "o.jsonl", ok=False)
    assert result.exit_code == console.INTERRUPTED and "Stopped" in result.output
