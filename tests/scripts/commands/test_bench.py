"""`headstart bench` end to end on a tiny chat model: figures, report, and what may go wrong.

Legend: B batch rows, T positions.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run_command as called
import torch
from bench_fixtures import Opened, Suites
from families import FAMILIES
from torch import Tensor, nn

from headstart.inference.benchmark import baselines as runs
from headstart.inference.benchmark.baselines import Case, Ours, Score, Setting, Stock
from headstart.inference.config import SpeculativeConfig
from headstart.inference.engine.sequence import StopCriteria
from headstart.model.checkpoint.fuse import fuse
from headstart.model.target.load import wrap_target
from headstart.model.target.pretrained import open_pretrained
from headstart.model.tree.shape import TreeShape
from headstart.scripts import console as ui
from headstart.scripts.benchmarks import report as bench_report
from headstart.scripts.commands import bench as command
from headstart.scripts.options.suites import numbers

pytestmark = pytest.mark.usefixtures("wide")

Patch = pytest.MonkeyPatch
OURS = ("mtp 4/2/2", "mtp 6/3/2")
TREES = ("--budget", "4/2/2", "--budget", "6/3/2", "--budget", "auto+lookup")
SMALL = ("--max-new-tokens", 10, "--limit", 3)


run, refused = partial(called.run, "bench"), partial(called.refused, "bench")


def test_a_whole_bench(fused: Path, suites: Suites, tmp_path: Path) -> None:
    out = tmp_path / "report"
    file, data = suites
    result = run(
        fused, "--suite", file, "--suite", f"{data}:question", *TREES, *SMALL, "--batch", "1,2",
        "--baselines", "generate,lookup", "--price", 2.5, "--out", out,
    )  # fmt: skip
    figures = json.loads((out / "figures.json").read_text())
    assert [(one["suite"], one["batch"]) for one in figures["runs"]] == [
        ("talk", 1), ("sums", 1), ("talk", 2), ("sums", 2),
    ]  # fmt: skip
    assert [one["batch"] for one in figures["totals"]] == [1, 2]
    for one in figures["runs"]:
        assert one["prompts"] == 3 and one["too_long"] == 0
        assert len(one["cases"]) == (3 if one["batch"] == 1 else 2)
        check(one["contestants"], prompts=3)
        assert (
            ("lookup" in one["contestants"])
            == ("lookup" not in one["left_out"])
            == (one["batch"] == 1)
        )
    for place, total in enumerate(figures["totals"]):
        check(total["contestants"], prompts=6)
        parts = figures["runs"][2 * place : 2 * place + 2]
        for name, one in total["contestants"].items():
            assert one["tokens"] == sum(part["contestants"][name]["tokens"] for part in parts)
    where = figures["conditions"]["float32"]
    assert where["models_in_memory"] == 2 and where["bandwidth_gb_per_second"] > 0
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed["totals"] == figures["totals"]
    check_report(out, figures)


def check(contestants: dict[str, Any], prompts: int) -> None:
    """What holds for the figures of any greedy float32 run."""
    plain, stock = contestants["plain"], contestants["generate"]
    assert plain["acceptance_length"] == stock["acceptance_length"] == 1
    assert 0 < plain["share_of_bandwidth"]
    for name, one in contestants.items():
        assert one["prompts"] == prompts and one["tokens"] == plain["tokens"]
        speed = one["tokens_per_second"]
        expected = {
            "tokens_per_second": one["tokens"] / one["seconds"]["total"],
            "speedup_over_plain": speed / plain["tokens_per_second"],
            "speedup_over_generate": speed / stock["tokens_per_second"],
            "cost_per_million_tokens": 2.5e6 / 3600 / speed,
        }
        assert {key: one[key] for key in expected} == pytest.approx(expected, rel=0.01)
        if name != "plain":
            assert one["identical"] == one["compared"] == prompts
            assert one["bleu"] == one["rouge_l"] == 100
    for name in OURS:
        one = contestants[name]
        parts = [one["seconds"][phase] for phase in ("prefill", "draft", "verify", "host")]
        assert sum(parts) == pytest.approx(one["seconds"]["total"], abs=0.001)
        assert one["acceptance_length"] >= 1 and one["acceptance_per_depth"]


def check_report(out: Path, figures: dict[str, Any]) -> None:
    text, page = ((out / f"report.{ending}").read_text() for ending in ("md", "html"))
    ways = figures["totals"][0]["contestants"]
    best = max(figures["trees"], key=lambda name: ways[name]["speedup_over_plain"])
    assert f"**{best} is " in text and "6 of 6 answers are identical" in text
    speed = figures["runs"][1]["contestants"]["plain"]["tokens_per_second"]
    assert f"| {speed:.1f} |" in text and f'<td style="text-align:right">{speed:.1f}</td>' in page
    pictures = [path.stem for path in out.glob("*.png")]
    assert sorted(pictures) == [
        "batch", "calibration", "cost", "depth", "generate", "nodes", "speedup", "time",
    ]  # fmt: skip
    assert page.count('src="data:image/png;base64,') == len(pictures) == page.count("src=")


def test_sampled_answers_are_the_plain_ones(fused: Path, suites: Suites, tmp_path: Path) -> None:
    run(
        fused, "--suite", suites[0], *SMALL, "--temperature", 0, "--temperature", 1, "--batch", 2,
        "--baselines", "generate", "--out", tmp_path,
    )  # fmt: skip
    greedy, sampled = json.loads((tmp_path / "figures.json").read_text())["runs"]
    assert greedy["contestants"]["generate"]["compared"] == 3
    assert sampled["contestants"]["generate"]["compared"] == 0  # it draws with other noise
    one = sampled["contestants"]["mtp auto+lookup"]
    assert one["identical"] == one["compared"] == 3
    assert greedy["contestants"]["plain"]["tokens"] and sampled["temperature"] == 1


def test_transformers_own_mtp(fused: Path, suites: Suites, tmp_path: Path) -> None:
    arguments = ("--suite", suites[0], *SMALL, "--baselines", "mtp")
    figures = json.loads(run(fused, *arguments).stdout.splitlines()[-1])
    one = figures["runs"][0]["contestants"]["mtp"]
    assert one["identical"] == 3 and one["acceptance_length"] >= 1
    fuse(fused.parent / "plain", fused.parent / "head", other := tmp_path / "other")
    figures = json.loads(run(other, *arguments).stdout.splitlines()[-1])
    assert "mtp" not in figures["runs"][0]["contestants"]
    assert "--index" in figures["runs"][0]["left_out"]["mtp"]
    assert figures["conditions"]["float32"]["models_in_memory"] == 1


class Odd:
    """Somebody who answers as he is told. memory: bytes that he takes while he does."""

    rows: int | None = None
    ours = True
    device = torch.device("cpu")

    def __init__(self, say: Callable[[Tensor], list[list[int]]], memory: int = 0):
        self.say, self.memory = say, memory

    def answer(
        self, tokens_BT: Tensor, mask_BT: Tensor, stop: StopCriteria, setting: Setting, score: Score
    ) -> list[list[int]]:
        torch.ones(self.memory, dtype=torch.uint8)
        answers = self.say(tokens_BT)
        score.stats.tokens += sum(map(len, answers))
        return answers


def test_failure(fused: Path, suites: Suites, tmp_path: Path, monkeypatch: Patch) -> None:
    seen: list[Tensor] = []

    def tire(tokens_BT: Tensor) -> list[list[int]]:
        seen.append(tokens_BT)
        if len(seen) > 2:  # the warm-up and one prompt went well
            raise torch.OutOfMemoryError("no memory | for this")
        return [[1]]

    make = command.make_runners
    monkeypatch.setattr(
        command, "make_runners", lambda *given: ({"weak": Odd(tire), **make(*given)[0]}, {})
    )
    run(fused, "--suite", suites[0], *SMALL, "--baselines", "plain", "--out", tmp_path)
    (one,) = json.loads((tmp_path / "figures.json").read_text())["runs"]
    weak, ours = one["contestants"]["weak"], one["contestants"]["mtp auto+lookup"]
    assert weak == {"error": "OutOfMemoryError: no memory | for this", "prompts": 1}
    assert len(seen) == 3 and ours["identical"] == ours["prompts"] == 3
    assert ["weak" in case["took"] for case in one["cases"]] == [True, False, False]
    assert "failed: OutOfMemoryError" in (tmp_path / "report.md").read_text()


def test_a_difference_is_found_with_its_margin(opened: Opened) -> None:
    target, _ = opened
    case = Case("one", tuple(range(20, 40)))
    setting = Setting(max_new_tokens=6)
    right = runs.bench(target, {"plain": Ours(target)}, [case], setting).answers["plain"][0]
    wrong = [*right[:2], (right[2] + 1) % 50, *right[3:]]
    results = runs.bench(
        target, {"liar": Odd(lambda _: [wrong]), "plain": Ours(target)}, [case], setting
    )
    score = results.scores["liar"]
    (found,) = score.differences
    assert (score.identical, score.compared) == (0, 1)
    assert (found.prompt, found.place) == ("one", 2)
    logits = target.model(torch.tensor([[*case.tokens, *right[:2]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert found.margin == pytest.approx(best - second, abs=1e-4) and found.margin > 0


def test_the_first_one_changes_and_none_is_warm_alone(opened: Opened) -> None:
    target, _ = opened
    order: list[str] = []
    names = ("plain", "b", "c")

    def called(name: str) -> Odd:
        def say(tokens_BT: Tensor) -> list[list[int]]:
            order.append(name)
            return [[1] for _ in tokens_BT]

        return Odd(say)

    cases = [Case(str(n), (5, 6, 7 + n)) for n in range(4)]
    runs.bench(target, {name: called(name) for name in names}, cases, Setting(4, batch=2))
    assert order == ["plain", "b", "c", "plain", "b", "c", "b", "c", "plain"]


@pytest.mark.skipif(not runs.TOLD, reason="this system does not tell peaks")
def test_memory_is_of_the_contestant_that_takes_it(opened: Opened) -> None:
    target, _ = opened
    size = 1 << 27
    runners = {"plain": Odd(lambda _: [[1]], size), "small": Odd(lambda _: [[1]])}
    results = runs.bench(target, runners, [Case("a", (1, 2))] * 2, Setting(4))
    large, small = (results.scores[name].working or 0 for name in runners)
    assert large > 0.9 * size and 0 <= small < 0.5 * size


def test_stock_is_generate_and_ours_agrees(fused: Path, opened: Opened) -> None:
    """Left padding, end-of-text inside a batch, and the counting of passes."""
    target, head = opened
    model, _ = open_pretrained(str(fused), "float32", None, None)
    plain = runs.bench(target, {"plain": Ours(target)}, [Case("a", tuple(range(30)))], Setting(12))
    eos = plain.answers["plain"][0][5]  # so that an answer ends early
    target.model.generation_config.eos_token_id = eos
    runners = {
        "plain": Ours(target),
        "tree": Ours(target, SpeculativeConfig(head, TreeShape.dynamic(6, 3, 2))),
        "generate": Stock(model, target.eos_ids, target.pad_id),
    }
    cases = [Case("a", tuple(range(30))), Case("b", (9, 8, 7)), Case("c", tuple(range(50, 60)))]
    results = runs.bench(target, runners, cases, Setting(12, batch=3))
    target.model.generation_config.eos_token_id = target.tokenizer.eos_token_id
    assert results.answers["plain"][0][-1] == eos and len(results.answers["plain"][0]) <= 6
    assert results.answers["generate"] == results.answers["tree"] == results.answers["plain"]
    assert results.scores["generate"].steps == results.scores["plain"].steps == 11


def test_lookup_counts_its_passes(fused: Path, opened: Opened) -> None:
    target, _ = opened
    model, _ = open_pretrained(str(fused), "float32", None, None)
    lookup = Stock(model, (), target.pad_id, prompt_lookup_num_tokens=10)
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    results = runs.bench(target, {"lookup": lookup}, [Case("a", (5, 6) * 20)], Setting(12))
    score = results.scores["lookup"]
    assert score.stats.tokens == 12 and lookup.rows == 1
    assert 0 < score.stats.rounds <= min(12, len(passes))  # the warm-up's passes are not counted


def test_total_adds_up() -> None:
    parts = [Score(prompts=n, seconds=2.0 * n, steps=3 * n, peak=n) for n in (1, 2)]
    for n, part in enumerate(parts, 1):
        part.stats.tokens, part.stats.rounds, part.stats.rows = 10 * n, 4 * n, n
        part.stats.accepted, part.stats.tried = [n] * n, [2 * n] * n
    parts[1].error = "it broke"
    whole = Score.total(parts)
    assert (whole.stats.tokens, whole.prompts, whole.seconds, whole.steps) == (30, 3, 6.0, 9)
    assert whole.stats.acceptance_length == 27 / 12 and whole.stats.acceptance == [0.5, 0.5]
    assert (whole.peak, whole.working, whole.error) == (2, None, "it broke")
    assert parts[0].stats.tokens == 10


def test_options_that_mean_nothing(fused: Path) -> None:
    assert "NODES/DEPTH/WIDTH" in refused(fused, "--budget", "8/4")
    assert "nodes >= 2" in refused(fused, "--budget", "1/1/1")
    assert "never calibrated" in refused(fused, "--budget", "static")
    assert "--batch takes whole numbers" in refused(fused, "--batch", "0,2")
    assert "--context takes whole numbers" in refused(fused, "--context", "many")
    assert "got 'eagle'" in refused(fused, "--baselines", "eagle")
    assert "got 'float8'" in refused(fused, "--dtype", "float8")
    assert numbers("256, 2k,256", "--context") == (256, 2048)


def test_missing_packages(fused: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(bench_report, "find_spec", lambda name: None if "rouge" in name else 1)
    message = refused(fused, "--suite", "dev", "--out", tmp_path / "out")
    assert "headstart[bench]" in message and "(rouge_score)" in message
    assert not (tmp_path / "out").exists()


def test_interruption(fused: Path, suites: Suites, tmp_path: Path, monkeypatch: Patch) -> None:
    bench, calls = runs.bench, []

    def stopped(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return bench(*arguments, **options)

    monkeypatch.setattr(runs, "bench", stopped)
    result = run(
        fused, "--suite", suites[0], "--suite", f"{suites[1]}:question", *SMALL,
        "--baselines", "plain", "--out", tmp_path, ok=False,
    )  # fmt: skip
    assert result.exit_code == ui.INTERRUPTED and "1 complete runs" in result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [one["suite"] for one in figures["runs"]] == ["talk"] and figures["totals"] == []
    assert "talk" in (tmp_path / "report.md").read_text()


def test_a_step_reads_each_weight_once_and_those_in_integers_as_bytes() -> None:
    for family in ("llama", "llama_tied"):
        model = FAMILIES[family]()
        norms = sum(weight.numel() for weight in model.parameters() if weight.dim() == 1)
        matrices = sum(
            layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear)
        )
        step = command.machine(wrap_target(model))["step_mb"]
        assert step == pytest.approx(4 * (matrices + norms) / 1e6, abs=1e-3)
        step = command.machine(wrap_target(model, quantize="int8"))["step_mb"]
        assert step == pytest.approx((matrices + 4 * norms) / 1e6, abs=1e-3)
