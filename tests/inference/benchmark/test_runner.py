"""The benchmark harness: turns, exactness, memory, and transformers' `generate` as a baseline.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench_fixtures import Opened
from benchmarking import ScriptedRunner
from torch import Tensor

from headstart.inference.benchmark.acceptance import measure_acceptance
from headstart.inference.benchmark.baselines import TransformersRunner
from headstart.inference.benchmark.metrics import AUTOREGRESSIVE, Case, RunMetrics, summaries
from headstart.inference.benchmark.resources import PEAK_IS_KNOWN
from headstart.inference.benchmark.runner import HeadstartRunner, headstart_runners, run_benchmark
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.model.target.pretrained import open_pretrained
from headstart.model.tree.shape import TreeShape

TREE = TreeShape.dynamic(6, 3, 2)


def test_a_difference_has_its_position_and_margin(opened: Opened) -> None:
    target, _ = opened
    case = Case("one", tuple(range(20, 40)))
    sampling = SamplingParams(max_new_tokens=6)
    runner = HeadstartRunner(target)
    result = run_benchmark(target, {AUTOREGRESSIVE: runner}, [case], sampling)
    right = result.responses[AUTOREGRESSIVE][0]
    wrong = [*right[:2], (right[2] + 1) % 50, *right[3:]]
    runners = {"wrong": ScriptedRunner(lambda _: [wrong]), AUTOREGRESSIVE: runner}
    metrics = run_benchmark(target, runners, [case], sampling).metrics["wrong"]
    (difference,) = metrics.differences
    assert (metrics.identical, metrics.compared) == (0, 1)
    assert (difference.prompt, difference.position) == ("one", 2)
    logits = target.model(torch.tensor([[*case.tokens, *right[:2]]])).logits[0, -1]
    best, second = logits.topk(2).values.tolist()
    assert difference.margin == pytest.approx(best - second, abs=1e-4) and difference.margin > 0


def test_the_first_runner_changes_and_all_are_warmed_up(opened: Opened) -> None:
    target, _ = opened
    order: list[str] = []

    def scripted(name: str) -> ScriptedRunner:
        def respond(tokens_BT: Tensor) -> list[list[int]]:
            order.append(name)
            return [[1] for _ in tokens_BT]

        return ScriptedRunner(respond)

    names = (AUTOREGRESSIVE, "b", "c")
    cases = [Case(str(n), (5, 6, 7 + n)) for n in range(4)]
    runners = {name: scripted(name) for name in names}
    run_benchmark(target, runners, cases, SamplingParams(4), batch_size=2)
    assert order == [*names, *names, "b", "c", AUTOREGRESSIVE]


@pytest.mark.skipif(not PEAK_IS_KNOWN, reason="this system does not report peak memory")
def test_memory_belongs_to_the_runner_that_allocates_it(opened: Opened) -> None:
    target, _ = opened
    size = 1 << 27
    runners = {
        "large": ScriptedRunner(lambda _: [[1]], size),
        "small": ScriptedRunner(lambda _: [[1]]),
    }
    result = run_benchmark(target, runners, [Case("a", (1, 2))] * 2, SamplingParams(4))
    large, small = (result.metrics[name].working_bytes or 0 for name in runners)
    assert large > 0.9 * size and 0 <= small < 0.5 * size


def test_an_error_is_raised_or_recorded(opened: Opened) -> None:
    target, _ = opened

    def fail(_: Tensor) -> list[list[int]]:
        raise RuntimeError("no memory")

    runners = {AUTOREGRESSIVE: HeadstartRunner(target), "broken": ScriptedRunner(fail)}
    cases = [Case("a", (1, 2))]
    with pytest.raises(RuntimeError, match="no memory"):
        run_benchmark(target, runners, cases, SamplingParams(4))
    result = run_benchmark(target, runners, cases, SamplingParams(4), keep_going=True)
    assert summaries(result.metrics)["broken"] == {"error": "RuntimeError: no memory", "prompts": 0}
    assert result.metrics[AUTOREGRESSIVE].prompts == 1


def test_generate_trees_and_autoregressive_decoding_agree(fused: Path, opened: Opened) -> None:
    """Left padding, end-of-sequence inside a batch, and the counting of decode steps."""
    target, head = opened
    model, _ = open_pretrained(str(fused), "float32", None, None)
    sampling = SamplingParams(12)
    first = Case("a", tuple(range(30)))
    result = run_benchmark(target, headstart_runners(target, {}), [first], sampling)
    eos = result.responses[AUTOREGRESSIVE][0][5]  # so that a response ends early
    target.model.generation_config.eos_token_id = eos
    runners = {
        **headstart_runners(target, {"tree": SpeculativeConfig(head, TREE)}),
        "generate": TransformersRunner(model, target.eos_ids, target.pad_id),
    }
    cases = [first, Case("b", (9, 8, 7)), Case("c", tuple(range(50, 60)))]
    result = run_benchmark(target, runners, cases, sampling, batch_size=3)
    target.model.generation_config.eos_token_id = target.tokenizer.eos_token_id
    responses = result.responses
    assert responses[AUTOREGRESSIVE][0][-1] == eos and len(responses[AUTOREGRESSIVE][0]) <= 6
    assert responses["generate"] == responses["tree"] == responses[AUTOREGRESSIVE]
    assert all(result.metrics[name].decode_steps == 11 for name in ("generate", AUTOREGRESSIVE))


def test_prompt_lookup_counts_its_passes(fused: Path, opened: Opened) -> None:
    target, _ = opened
    model, _ = open_pretrained(str(fused), "float32", None, None)
    runner = TransformersRunner(model, (), target.pad_id, prompt_lookup_num_tokens=10)
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    result = run_benchmark(target, {"x": runner}, [Case("a", (5, 6) * 20)], SamplingParams(12))
    metrics = result.metrics["x"]
    assert metrics.stats.num_tokens == 12 and runner.max_batch_size == 1
    assert 0 < metrics.stats.num_steps <= min(12, len(passes))  # the warm-up is not counted


def test_total_adds_up() -> None:
    parts = [
        RunMetrics(prompts=n, seconds=2.0 * n, decode_steps=3 * n, peak_bytes=n) for n in (1, 2)
    ]
    for n, part in enumerate(parts, 1):
        part.stats.num_tokens, part.stats.num_steps, part.stats.num_sequences = 10 * n, 4 * n, n
        part.stats.accepted_per_position, part.stats.tried_per_position = [n] * n, [2 * n] * n
    parts[1].error = "it broke"
    total = RunMetrics.total(parts)
    assert (total.stats.num_tokens, total.prompts, total.seconds, total.decode_steps) == (
        30,
        3,
        6.0,
        9,
    )
    assert total.stats.acceptance_length == 27 / 12 and total.stats.acceptance_rates == [0.5, 0.5]
    assert (total.peak_bytes, total.working_bytes, total.error) == (2, None, "it broke")
    assert parts[0].stats.num_tokens == 10


def test_acceptance_alone_equals_that_of_the_benchmark(opened: Opened) -> None:
    target, head = opened
    config, sampling = SpeculativeConfig(head, TREE), SamplingParams(12)
    prompts = [list(range(30)), [9, 8, 7]]
    stats, responses = measure_acceptance(target, config, prompts, sampling)
    cases = [Case(str(n), tuple(ids)) for n, ids in enumerate(prompts)]
    result = run_benchmark(target, headstart_runners(target, {"tree": config}), cases, sampling)
    assert stats.acceptance_length == result.metrics["tree"].stats.acceptance_length
    flat = [[token for step in response for token in step] for response in responses]
    assert flat == result.responses["tree"] == result.responses[AUTOREGRESSIVE]
