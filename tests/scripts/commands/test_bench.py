"""`headstart bench` end to end on a tiny chat model: metrics, report and errors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run_command as called
import torch
from bench_fixtures import Suites
from benchmarking import ScriptedRunner
from families import FAMILIES
from torch import Tensor, nn

from headstart.inference.benchmark import runner as harness
from headstart.model.checkpoint.fuse import fuse
from headstart.model.target.load import wrap_target
from headstart.scripts import console
from headstart.scripts.benchmarks import matrix, report
from headstart.scripts.options.environment import memory_speed
from headstart.scripts.options.parse import parse_sizes

pytestmark = pytest.mark.usefixtures("wide")

Patch = pytest.MonkeyPatch
AUTOREGRESSIVE = "autoregressive"
CONFIGS = ("mtp 4/2/2", "mtp 6/3/2")
TREES = ("--budget", "4/2/2", "--budget", "6/3/2", "--budget", "auto+ngram")
SMALL = ("--max-new-tokens", 10, "--limit", 3)


run, refused = partial(called.run, "bench"), partial(called.refused, "bench")


def test_a_whole_bench(fused: Path, suites: Suites, tmp_path: Path) -> None:
    out = tmp_path / "report"
    file, data = suites
    result = run(
        fused, "--suite", file, "--suite", f"{data}:question", *TREES, *SMALL,
        "--batch-size", "1,2", "--baselines", "generate,prompt_lookup", "--price", 2.5,
        "--out", out,
    )  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(one["suite"], one["batch_size"]) for one in metrics["runs"]] == [
        ("talk", 1), ("sums", 1), ("talk", 2), ("sums", 2),
    ]  # fmt: skip
    assert [one["batch_size"] for one in metrics["totals"]] == [1, 2]
    for one in metrics["runs"]:
        assert one["prompts"] == 3 and one["num_too_long"] == 0
        assert len(one["batches"]) == (3 if one["batch_size"] == 1 else 2)
        check(one["results"], prompts=3)
        assert (
            ("prompt_lookup" in one["results"])
            == ("prompt_lookup" not in one["skipped"])
            == (one["batch_size"] == 1)
        )
    for place, total in enumerate(metrics["totals"]):
        check(total["results"], prompts=6)
        parts = metrics["runs"][2 * place : 2 * place + 2]
        for name, one in total["results"].items():
            assert one["tokens"] == sum(part["results"][name]["tokens"] for part in parts)
    where = metrics["environment"]["float32"]
    assert where["models_in_memory"] == 2 and where["bandwidth_gb_per_second"] > 0
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["totals"] == metrics["totals"]
    check_report(out, metrics)


def check(results: dict[str, Any], prompts: int) -> None:
    """What holds for every greedy float32 run."""
    baseline, generate = results[AUTOREGRESSIVE], results["generate"]
    assert baseline["acceptance_length"] == generate["acceptance_length"] == 1
    assert 0 < baseline["share_of_bandwidth"]
    for name, one in results.items():
        assert one["prompts"] == prompts and one["tokens"] == baseline["tokens"]
        speed = one["tokens_per_second"]
        expected = {
            "tokens_per_second": one["tokens"] / one["seconds"]["total"],
            "speedup_over_autoregressive": speed / baseline["tokens_per_second"],
            "speedup_over_generate": speed / generate["tokens_per_second"],
            "cost_per_million_tokens": 2.5e6 / 3600 / speed,
        }
        assert {key: one[key] for key in expected} == pytest.approx(expected, rel=0.01)
        if name != AUTOREGRESSIVE:
            assert one["identical"] == one["compared"] == prompts
            assert one["bleu"] == one["rouge_l"] == 100
    for name in CONFIGS:
        one = results[name]
        parts = [one["seconds"][phase] for phase in ("prefill", "draft", "verify", "host")]
        assert sum(parts) == pytest.approx(one["seconds"]["total"], abs=0.001)
        assert one["acceptance_length"] >= 1 and one["acceptance_rate_per_position"]
        assert one["num_draft_tokens"] >= one["num_accepted_tokens"]


def check_report(out: Path, metrics: dict[str, Any]) -> None:
    text, page = ((out / f"report.{ending}").read_text() for ending in ("md", "html"))
    results = metrics["totals"][0]["results"]
    best = max(metrics["configs"], key=lambda name: results[name]["speedup_over_autoregressive"])
    assert f"**{best}: " in text and "6 of 6 responses are identical" in text
    speed = metrics["runs"][1]["results"][AUTOREGRESSIVE]["tokens_per_second"]
    assert f"| {speed:.1f} |" in text and f'<td style="text-align:right">{speed:.1f}</td>' in page
    pictures = [path.stem for path in out.glob("*.png")]
    assert sorted(pictures) == [
        "batch_size", "calibration", "cost", "generate", "nodes", "position", "speedup", "time",
    ]  # fmt: skip
    assert page.count('src="data:image/png;base64,') == len(pictures) == page.count("src=")


def test_sampled_responses_are_identical_too(fused: Path, suites: Suites, tmp_path: Path) -> None:
    run(
        fused, "--suite", suites[0], *SMALL, "--temperature", 0, "--temperature", 1,
        "--batch-size", 2, "--baselines", "generate", "--out", tmp_path,
    )  # fmt: skip
    greedy, sampled = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert greedy["results"]["generate"]["compared"] == 3
    assert sampled["results"]["generate"]["compared"] == 0  # its noise is another
    one = sampled["results"]["mtp auto+ngram"]
    assert one["identical"] == one["compared"] == 3
    assert greedy["results"][AUTOREGRESSIVE]["tokens"] and sampled["temperature"] == 1


def test_transformers_own_mtp(fused: Path, suites: Suites, tmp_path: Path) -> None:
    arguments = ("--suite", suites[0], *SMALL, "--baselines", "mtp")
    metrics = json.loads(run(fused, *arguments).stdout.splitlines()[-1])
    one = metrics["runs"][0]["results"]["mtp"]
    assert one["identical"] == 3 and one["acceptance_length"] >= 1
    fuse(fused.parent / "plain", fused.parent / "head", other := tmp_path / "other")
    metrics = json.loads(run(other, *arguments).stdout.splitlines()[-1])
    assert "mtp" not in metrics["runs"][0]["results"]
    assert "--index" in metrics["runs"][0]["skipped"]["mtp"]
    assert metrics["environment"]["float32"]["models_in_memory"] == 1


def test_a_failed_configuration_does_not_stop_the_others(
    fused: Path, suites: Suites, tmp_path: Path, monkeypatch: Patch
) -> None:
    calls: list[Tensor] = []

    def fail_later(tokens_BT: Tensor) -> list[list[int]]:
        calls.append(tokens_BT)
        if len(calls) > 2:  # after the warm-up and one prompt
            raise torch.OutOfMemoryError("no memory | for this")
        return [[1]]

    make = matrix.make_runners
    monkeypatch.setattr(
        matrix,
        "make_runners",
        lambda *given: ({"weak": ScriptedRunner(fail_later), **make(*given)[0]}, {}),
    )
    run(fused, "--suite", suites[0], *SMALL, "--baselines", AUTOREGRESSIVE, "--out", tmp_path)
    (one,) = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    weak, ours = one["results"]["weak"], one["results"]["mtp auto+ngram"]
    assert weak == {"error": "OutOfMemoryError: no memory | for this", "prompts": 1}
    assert len(calls) == 3 and ours["identical"] == ours["prompts"] == 3
    assert ["weak" in batch["measured"] for batch in one["batches"]] == [True, False, False]
    assert "failed: OutOfMemoryError" in (tmp_path / "report.md").read_text()


def test_invalid_options(fused: Path) -> None:
    assert "NODES/DEPTH/WIDTH" in refused(fused, "--budget", "8/4")
    assert "auto+ngram" in refused(fused, "--budget", "auto+lookup")
    assert "nodes >= 2" in refused(fused, "--budget", "1/1/1")
    assert "never calibrated" in refused(fused, "--budget", "static")
    assert "--batch-size takes whole numbers" in refused(fused, "--batch-size", "0,2")
    assert "--context takes whole numbers" in refused(fused, "--context", "many")
    assert "got 'eagle'" in refused(fused, "--baselines", "eagle")
    assert "got 'float8'" in refused(fused, "--dtype", "float8")
    assert parse_sizes("256, 2k,256", "--context") == (256, 2048)


def test_missing_packages(fused: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if "rouge" in name else 1)
    message = refused(fused, "--suite", "dev", "--out", tmp_path / "out")
    assert "headstart[bench]" in message and "(rouge_score)" in message
    assert not (tmp_path / "out").exists()


def test_interruption(fused: Path, suites: Suites, tmp_path: Path, monkeypatch: Patch) -> None:
    run_benchmark, calls = harness.run_benchmark, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_benchmark(*arguments, **options)

    monkeypatch.setattr(harness, "run_benchmark", stopped)
    result = run(
        fused, "--suite", suites[0], "--suite", f"{suites[1]}:question", *SMALL,
        "--baselines", AUTOREGRESSIVE, "--out", tmp_path, ok=False,
    )  # fmt: skip
    assert result.exit_code == console.INTERRUPTED and "1 complete runs" in result.output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [one["suite"] for one in metrics["runs"]] == ["talk"] and metrics["totals"] == []
    assert "talk" in (tmp_path / "report.md").read_text()


def test_a_step_reads_each_weight_once_and_int8_weights_as_bytes() -> None:
    for family in ("llama", "llama_tied"):
        model = FAMILIES[family]()
        norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
        matrices = sum(
            layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)
        )
        step = memory_speed(wrap_target(model))["step_mb"]
        assert step == pytest.approx(4 * (matrices + norms) / 1e6, abs=1e-3)
        step = memory_speed(wrap_target(model, quantize="int8"))["step_mb"]
        assert step == pytest.approx((matrices + 4 * norms) / 1e6, abs=1e-3)
