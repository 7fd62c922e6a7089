"""Metrics and samples of a run: responses, longer prompts, utilisation of a GPU."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chat_model import save
from rich.console import Console
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.inference.benchmark import acceptance
from headstart.inference.benchmark.acceptance import measure_acceptance
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.rollout import prompt_ids
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.scripts.options import recipe as command
from headstart.scripts.options.recipe import evaluator, run_recipe, show_sample
from headstart.training import cost_estimate as estimate
from headstart.training.config.schema import EvalConfig, Recipe, make_recipe
from headstart.training.reporting.metrics_log import Progress
from headstart.training.reporting.samples import Sample
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import train

SAMPLE = Sample("is <b> 1 < 2?", (("yes ", 1), ("& <i>no", 3)))


class PowerCut(Exception):
    pass


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save(tmp_path_factory.mktemp("target"), context=512), dtype="float32")


@pytest.fixture(scope="module")
def head(chatty) -> DraftHead:
    torch.manual_seed(1)
    return make_head(chatty, "mtp", {})


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": name, "prompt": f"tell {name}"}) for name in ("a", "bc", "def")]
    path.write_text("\n".join(lines))
    return str(path)


def recipe_for(tmp_path: Path, evaluation: dict, **settings) -> Recipe:
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    plain = tiny_recipe(tmp_path / "run", data, **{"steps": 6, "log_every": 1} | settings)
    return make_recipe(plain.model_dump(exclude_none=True) | {"eval": {"every": 2} | evaluation})


def run(recipe: Recipe, **options):
    target = tiny_target()
    shown = {"acceptance_length": 2.0, "samples": [SAMPLE]}
    options = {"evaluate": lambda head: shown} | options
    return train(recipe, target=target, head=tiny_head(target), **options)


def lines(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]


def test_answers_are_told_and_kept_once(tmp_path):
    told: list[Progress] = []

    def cut(at: Progress) -> None:
        told.append(at)
        if at.kind == "eval" and at.step == 4:
            raise PowerCut  # behind what is written, before the run knows that it evaluated

    with pytest.raises(PowerCut):
        run(recipe_for(tmp_path, {}), log=cut)
    assert [at.samples for at in told if at.kind == "eval"] == [[SAMPLE], [SAMPLE]]
    assert [one["step"] for one in lines(tmp_path, "samples.jsonl")] == [2, 4]
    run(recipe_for(tmp_path, {}, resume=True))
    kept = lines(tmp_path, "samples.jsonl")
    assert [one["step"] for one in kept] == [2, 4, 6]
    assert kept[0]["prompt"] == SAMPLE.prompt and kept[0]["response"] == [
        ["yes ", 1],
        ["& <i>no", 3],
    ]
    assert all("samples" not in one for one in lines(tmp_path, "metrics.jsonl"))


def test_without_answers_there_is_no_file(tmp_path):
    run(recipe_for(tmp_path, {}), evaluate=lambda head: {"acceptance_length": 2.0})
    assert not (tmp_path / "run" / "samples.jsonl").exists()


def test_answers_go_to_tensorboard(tmp_path):
    run(recipe_for(tmp_path, {}, tensorboard=True))
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    written = events.read_bytes()
    assert b"eval/samples" in written and b"<strong>is &lt;b&gt; 1 &lt; 2?" in written
    assert b"yes |&amp; &lt;i&gt;no</pre>" in written


def test_answers_go_to_wandb(tmp_path):
    pytest.importorskip("wandb")
    run(recipe_for(tmp_path, {}, wandb={"project": "test", "mode": "offline"}))
    pages = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/html/eval/*.html"))
    assert len(pages) == 3
    page = pages[0].read_text()
    assert "is &lt;b&gt; 1 &lt; 2?" in page
    assert '<span style="color:gray" title="1">yes </span>' in page
    assert '<span style="color:teal" title="3">&amp; &lt;i&gt;no</span>' in page


def test_what_is_only_shown_does_not_choose_the_best_head_anew(tmp_path):
    def stop(at: Progress) -> None:
        if at.kind == "train" and at.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(recipe_for(tmp_path, {}), log=stop)
    told: list[Progress] = []
    changed = recipe_for(tmp_path, {"samples": 3, "contexts": [64, 128]}, resume=True)
    lower = {"acceptance_length": 1.5, "acceptance_length_64": 9.0}
    result = run(changed, evaluate=lambda head: lower, log=told.append)
    assert (result.best_step, result.score) == (2, 2.0)
    assert not any("Evaluation has changed" in at.message for at in told)


def test_samples_are_the_answers_step_by_step(chatty, head, prompts):
    config = EvalConfig(prompts=prompts, max_new_tokens=24, samples=2)
    found = evaluator(config, chatty)(head)
    assert [one.prompt for one in found["samples"]] == ["tell a", "tell bc"]
    for sample in found["samples"]:
        tokens = prompt_ids(chatty, [{"role": "user", "content": sample.prompt}])
        stats, [steps] = measure_acceptance(
            chatty,
            SpeculativeConfig(head, TreeShape.dynamic(8, 4, 4)),
            [tokens],
            SamplingParams(24),
        )
        answer = [token for step in steps for token in step]
        assert len(answer) == stats.num_tokens and max(len(step) for step in steps) <= 5
        assert "".join(text for text, _ in sample.response) == chatty.text(answer)
        assert 0 < sum(count for _, count in sample.response) <= len(answer)
    none = evaluator(config.model_copy(update={"samples": 0}), chatty)(head)
    assert none == found | {"samples": []}


def test_longer_prompts_have_their_own_metrics(chatty, head, prompts, monkeypatch):
    lengths: list[list[int]] = []
    real = measure_acceptance

    def seen(target, speculative, ids, sampling):
        lengths.append([len(one) for one in ids])
        return real(target, speculative, ids, sampling)

    monkeypatch.setattr(acceptance, "measure_acceptance", seen)
    config = EvalConfig(prompts=prompts, max_new_tokens=8, contexts=[100, 300])
    found = evaluator(config, chatty)(head)
    assert {name for name in found if name.startswith("acceptance_length")} == {
        "acceptance_length",
        "acceptance_length_100",
        "acceptance_length_300",
    }
    assert found["acceptance_length_300"] >= 1
    as_they_are, *filled = lengths
    assert max(as_they_are) < 80
    for context, counts in zip((100, 300), filled, strict=True):
        assert len(counts) == 3 and all(abs(one - context) < 8 for one in counts)


def test_contexts_beyond_the_target_are_refused_first(chatty, prompts):
    config = EvalConfig(prompts=prompts, max_new_tokens=64, contexts=[100, 449])
    with pytest.raises(ValueError, match=r"eval\.contexts asks for prompts of 449.*is 512"):
        evaluator(config, chatty)
    assert evaluator(config.model_copy(update={"contexts": (100, 400)}), chatty) is not None
    with pytest.raises(ValueError, match="prompts is null"):
        EvalConfig(prompts=None, contexts=[100])
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        EvalConfig(contexts=[0])


def test_an_answer_is_shown_in_colours_and_cut(monkeypatch):
    console = Console(record=True, width=2000, force_terminal=True, color_system="standard")
    monkeypatch.setattr(command, "console", console)
    monkeypatch.setattr("headstart.scripts.console.console", console)
    show_sample(Sample("why " * 100, (("one ", 1), ("[two] three ", 3), ("x" * 600, 2))))
    shown = console.export_text(styles=True)
    assert "\x1b[36m[two] three " in shown and "\x1b[2mone " in shown
    assert "tokens per step" in shown and "> why why" in shown
    assert shown.count("why") < 26 and 450 < shown.count("x") < 500


def test_the_command_shows_and_keeps_what_the_head_helps_to_write(
    chatty, prompts, tmp_path, capsys, wide
):
    rows = write_rows(tmp_path / "data.jsonl", mixed_rows(8))
    values = {
        "target": {"name": chatty.name, "dtype": "float32"},
        "head": {"kind": "mtp"},
        "data": {"path": str(rows), "max_length": 32, "global_batch_tokens": 64},
        "loss": {"steps": 2},
        "train": {"output": str(tmp_path / "run"), "steps": 1, "precision": "float32"},
        "eval": {"prompts": prompts, "max_new_tokens": 8, "contexts": [64]},
    }
    run_recipe(make_recipe(values), chatty)
    (kept,) = lines(tmp_path, "samples.jsonl")
    assert kept["prompt"] == "tell a" and kept["step"] == 1
    told = capsys.readouterr().out
    assert "> tell a" in told and " at 64 tokens)" in told
    (metrics,) = [one for one in lines(tmp_path, "metrics.jsonl") if one["kind"] == "eval"]
    assert metrics["acceptance_length_64"] >= 1


# --- how much of the GPU's arithmetic is used


def on_a_gpu(monkeypatch, name: str, **changes) -> float | None:
    """The peak of a GPU of that name for a target and a head in 16 bits."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    settings = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "precision": "bfloat16"}
    settings |= changes
    recipe = SimpleNamespace(train=SimpleNamespace(precision=settings.pop("precision")))
    return estimate.peak(recipe, SimpleNamespace(**settings))


def test_the_peak_is_that_of_the_data_sheet_or_none(monkeypatch):
    assert on_a_gpu(monkeypatch, "NVIDIA H100 80GB HBM3") == 989e12
    assert on_a_gpu(monkeypatch, "NVIDIA A100-SXM4-40GB") == 312e12
    assert on_a_gpu(monkeypatch, "NVIDIA H200", dtype=torch.float16) == 989e12
    others = ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "Tesla T4")
    parts = ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "")
    assert all(on_a_gpu(monkeypatch, name) is None for name in others + parts)
    for change in ({"dtype": torch.float32}, {"precision": "float32"}):
        assert on_a_gpu(monkeypatch, "NVIDIA H200", **change) is None
    assert on_a_gpu(monkeypatch, "NVIDIA H200", device=torch.device("cpu")) is None


def test_no_peak_no_utilisation(tmp_path):
    run(recipe_for(tmp_path, {}, steps=1))
    first = lines(tmp_path, "metrics.jsonl")[0]
    assert first["tflops"] > 0 and "mfu" not in first


def test_utilisation_is_logged_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "peak", lambda recipe, target: 1e12)
    run(recipe_for(tmp_path, {}, steps=2))
    for line in lines(tmp_path, "metrics.jsonl")[:2]:  # a part of the tokens is only read
        assert 0 < line["mfu"] < line["tflops"]


def test_utilisation_counts_what_the_result_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "peak", lambda recipe, target: 1e9)
    target = tiny_target()
    plain, found = recipe_for(tmp_path, {}), {}
    for recompute in (False, True):
        loss = plain.loss.model_copy(update={"recompute": recompute})
        recipe = plain.model_copy(update={"loss": loss})
        found[recompute] = estimate.Throughput(recipe, target, tiny_head(target), 2)
    tokens, rows = 1000.0, 600.0
    once, again = (found[key].metrics(tokens, rows) for key in (False, True))
    assert once["mfu"] == again["mfu"] and once["tflops"] < again["tflops"]
    everything = found[False].metrics(tokens, tokens)
    assert everything["mfu"] == pytest.approx(everything["tflops"] * 1e12 / 1e9)
    vocab = target.vocab_size  # the target's logits, and the head's forward and backward, two steps
    unused = 2 * (tokens - rows) * target.hidden_size * (vocab + 2 * 2 * vocab) / 2
    assert (everything["mfu"] - once["mfu"]) * 1e9 == pytest.approx(unused)
