"""All runs of `headstart bench`: every dtype, context, temperature and batch size on every suite.

`report.py` documents the metrics.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headstart.model.checkpoint.atomic import replace_text
from headstart.scripts.console import Update, console, progress, show
from headstart.scripts.options.environment import GIGA, MEGA, environment, memory_speed
from headstart.scripts.options.quantize_report import report_quantization
from headstart.scripts.options.tree_budget import describe, speculative_configs

from .plots import SETTING
from .report import similarity, table, write_report

if TYPE_CHECKING:
    from headstart.inference.benchmark.metrics import Case, RunMetrics
    from headstart.inference.benchmark.runner import BenchmarkResult, Runner
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.target.target import Target
    from headstart.scripts.options.suites import Suite

INT8 = "int8"  # the target quantised; its own autoregressive decoding is the baseline
DTYPES = ("auto", "float32", "bfloat16", "float16", INT8)
AUTOREGRESSIVE, GENERATE, PROMPT_LOOKUP, MTP = BASELINES = (
    "autoregressive",
    "generate",
    "prompt_lookup",
    "mtp",
)
PROMPT_LOOKUP_TOKENS = 10  # draft tokens per step, as in transformers' own examples
METRICS_FILE = "metrics.json"
ALL_SUITES = "all suites"


@dataclass(frozen=True)
class Plan:
    """The settings to combine with each other.

    contexts: tokens to fill prompts up to; None leaves prompts as they are.
    budgets: values of `--budget`. price: dollars per hour.
    """

    max_new_tokens: int
    batch_sizes: tuple[int, ...]
    contexts: tuple[int | None, ...]
    temperatures: tuple[float, ...]
    budgets: tuple[str, ...]
    dtypes: tuple[str, ...]
    baselines: tuple[str, ...]
    price: float | None
    seed: int
    out: Path | None


@dataclass(frozen=True)
class _Loaded:
    """Models and prompts of one dtype.

    skipped: baselines that cannot run, and why.
    cases: by context and suite, the prompts and how many were left out as too long.
    """

    target: Target
    runners: dict[str, Runner]
    skipped: dict[str, str]
    cases: dict[int | None, dict[str, tuple[list[Case], int]]]


class BenchmarkMatrix:
    """All runs of one command, and their metrics."""

    def __init__(self, plan: Plan, suites: Sequence[Suite], folder: Path):
        self.plan, self.suites, self.folder = plan, suites, folder
        self.metrics: dict[str, Any] = {
            "command": shlex.join(["headstart", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "max_new_tokens": plan.max_new_tokens,
            "price": plan.price,
            "configs": {},
            "environment": {},
            "runs": [],
            "totals": [],
        }

    def run(self) -> None:
        try:
            for dtype in self.plan.dtypes:
                self._run_dtype(dtype)
        except KeyboardInterrupt as stop:
            runs = len(self.metrics["runs"])
            if not runs:
                raise
            self._finish()
            raise KeyboardInterrupt(f"The metrics of {runs} complete runs are kept.") from stop
        self._finish()

    def _finish(self) -> None:
        if self.plan.out is not None:
            write_report(self.metrics, self.plan.out)
            show(f"report: {self.plan.out / 'report.html'}")
        runs = [{key: run[key] for key in run if key != "batches"} for run in self.metrics["runs"]]
        print(json.dumps(self.metrics | {"runs": runs}))

    def _run_dtype(self, dtype: str) -> None:
        plan = self.plan
        loaded = self._load(dtype)
        name = environment(loaded.target)["dtype"]
        settings = list(product(plan.contexts, plan.temperatures, plan.batch_sizes))
        batches = sum(
            ceil(len(cases) / batch_size)
            for context, _, batch_size in settings
            for cases, _ in loaded.cases[context].values()
        )
        with progress(f"decoding, {name}", batches) as update:
            total = _TotalProgress(update)
            for context, temperature, batch_size in settings:
                key = dict(zip(SETTING, (name, context, temperature, batch_size), strict=True))
                self._run_setting(loaded, key, total)

    def _load(self, dtype: str) -> _Loaded:
        from headstart.model.checkpoint.download import fetch_fused
        from headstart.model.checkpoint.fused import load_fused
        from headstart.scripts.options.suites import make_cases

        plan = self.plan
        options = {"quantize": INT8} if dtype == INT8 else {"dtype": dtype}
        target, head = load_fused(self.folder, **options)
        report_quantization(target)
        cases = {
            context: {
                suite.name: make_cases(
                    suite, target, context=context, max_new_tokens=plan.max_new_tokens
                )
                for suite in self.suites
            }
            for context in plan.contexts
        }
        configs = speculative_configs(target, head, plan.budgets)
        self.metrics["configs"] |= {name: describe(one) for name, one in configs.items()}
        runners, skipped = make_runners(target, configs, plan.baselines, fetch_fused(self.folder))
        copies = 1 + any(not one.same_noise for one in runners.values())
        where = environment(target) | memory_speed(target) | {"models_in_memory": copies}
        self.metrics["environment"][where["dtype"]] = where
        return _Loaded(target, runners, skipped, cases)

    def _run_setting(self, loaded: _Loaded, key: dict[str, Any], total: _TotalProgress) -> None:
        """Run all suites in one setting, and add their total."""
        from headstart.inference.benchmark.metrics import RunMetrics
        from headstart.inference.benchmark.runner import run_benchmark
        from headstart.inference.config import SamplingParams

        batch_size = key["batch_size"]
        sampling = SamplingParams(self.plan.max_new_tokens, key["temperature"], seed=self.plan.seed)
        runners = {
            name: runner
            for name, runner in loaded.runners.items()
            if runner.max_batch_size is None or batch_size <= runner.max_batch_size
        }
        too_large = dict.fromkeys(
            loaded.runners.keys() - runners.keys(), "transformers takes one prompt at a time here."
        )
        skipped = loaded.skipped | too_large
        results: list[BenchmarkResult] = []
        for suite, (cases, num_too_long) in loaded.cases[key["context"]].items():
            result = run_benchmark(
                loaded.target,
                runners,
                cases,
                sampling,
                batch_size=batch_size,
                keep_going=True,
                on_batch=total.part(f"{suite}, batch size {batch_size}"),
            )
            results.append(result)
            run = {
                "suite": suite,
                **key,
                "prompts": len(cases),
                "prompt_tokens": sum(len(case.tokens) for case in cases),
                "num_too_long": num_too_long,
                "skipped": skipped,
                "results": self._summaries(loaded.target, result.metrics, [result], key),
                "batches": [vars(timing) for timing in result.timings],
            }
            self._keep("runs", run)
        metrics = {
            name: RunMetrics.total([one.metrics[name] for one in results]) for name in runners
        }
        summed = self._summaries(loaded.target, metrics, results, key)
        self._keep("totals", {"suite": ALL_SUITES, **key, "skipped": skipped, "results": summed})
        console.print(table([*self.metrics["runs"][-len(results) :], self.metrics["totals"][-1]]))

    def _keep(self, kind: str, run: dict[str, Any]) -> None:
        """Add a run and write the file, so that an interruption loses nothing else."""
        self.metrics[kind].append(run)
        if self.plan.out is not None:
            text = json.dumps(self.metrics, indent=1) + "\n"
            replace_text(self.plan.out / METRICS_FILE, text)

    def _summaries(
        self,
        target: Target,
        metrics: Mapping[str, RunMetrics],
        results: Sequence[BenchmarkResult],
        key: dict[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Each configuration's metrics, with those that need the machine, the price or texts."""
        from headstart.inference.benchmark.metrics import summaries

        where = self.metrics["environment"][key["dtype"]]
        ideal_seconds = where["step_mb"] * MEGA / (where["bandwidth_gb_per_second"] * GIGA)
        summed = summaries(metrics)
        for name, one in metrics.items():
            if one.error is not None:
                continue
            if name == AUTOREGRESSIVE and one.decode_steps:
                share = ideal_seconds / one.step_seconds
                summed[name]["share_of_bandwidth"] = round(share, 4)
            if self.plan.price is not None:
                cost = self.plan.price / 3600 / one.tokens_per_second * MEGA
                summed[name]["cost_per_million_tokens"] = round(cost, 4)
            if self.plan.out is not None and one.compared:
                texts, expected = (
                    [target.text(ids) for result in results for ids in result.responses[who]]
                    for who in (name, AUTOREGRESSIVE)
                )
                summed[name] |= similarity(texts, expected)
        return summed


class _TotalProgress:
    """One progress bar over several runs."""

    def __init__(self, update: Update):
        self._update, self._before, self._now = update, 0, 0

    def part(self, note: str) -> Callable[[int], None]:
        """The callback of a new run."""
        self._before += self._now
        self._now = 0
        self._update(self._before, note)

        def on_batch(done: int) -> None:
            self._now = done
            self._update(self._before + done, note)

        return on_batch


def make_runners(
    target: Target,
    configs: Mapping[str, SpeculativeConfig],
    baselines: Sequence[str],
    folder: Path,
) -> tuple[dict[str, Runner], dict[str, str]]:
    """The runners by name, and which baselines cannot run and why."""
    from headstart.inference.benchmark.baselines import TransformersRunner
    from headstart.inference.benchmark.runner import headstart_runners
    from headstart.model.target.pretrained import open_pretrained

    runners: dict[str, Runner] = {**headstart_runners(target, configs)}
    skipped: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {
        GENERATE: {},
        PROMPT_LOOKUP: {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS},
        MTP: {"use_mtp": True},
    }
    wanted = [name for name in options if name in baselines]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if MTP in wanted and "num_mtp_layers" not in config:
        wanted.remove(MTP)
        skipped[MTP] = "the checkpoint does not list an mtp head for transformers (fuse --index)."
    if not wanted:
        return runners, skipped
    show("transformers' runs use a second copy of the model, so memory holds two.")
    model, _ = open_pretrained(str(folder), target.dtype, target.device, None)
    # The head's weights, which the index lists, are not part of the model itself.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{target.num_layers}\..*"]
    for name in wanted:
        runners[name] = TransformersRunner(model, target.eos_ids, target.pad_id, **options[name])
    return runners, skipped
