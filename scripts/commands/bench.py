"""`headstart bench`: suites of prompts in many settings, beside plain decoding and Hugging Face's.

`bench_report.py` says what the figures are.
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
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.model.checkpoint.atomic import replace_text
from headstart.scripts.benchmarks.plots import SETTING
from headstart.scripts.benchmarks.report import check_extra, likeness, table, write_report
from headstart.scripts.console import Update, console, progress, show
from headstart.scripts.options.quantize_report import tell_quantized
from headstart.scripts.options.tree_budget import HELP, check_budgets, contestants, described

from .evaluate import conditions

if TYPE_CHECKING:
    import torch

    from headstart.inference.benchmark.baselines import Case, Results, Runner, Score
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.target.target import Target
    from headstart.scripts.options.suites import Plan, Suite

INT8 = "int8"  # the target quantised; its own plain decoding is the baseline
PLAIN, GENERATE, LOOKUP, MTP = BASELINES = ("plain", "generate", "lookup", "mtp")
DTYPES = ("auto", "float32", "bfloat16", "float16", INT8)
LOOKUP_TOKENS = 10  # guesses per pass, as in transformers' own examples
FIGURES = "figures.json"
READ = 1 << 29  # bytes that are summed to measure the memory
ALL = "all suites"
MEGA, GIGA = 1e6, 1e9


def bench(
    folder: Annotated[
        Path | None,
        typer.Argument(help="Fused checkpoint (folder or Hub id), else the shipped one."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="FILE.jsonl, shipped prompts, or a data set as OWNER/NAME:COLUMN."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first of each suite.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    batch: Annotated[str, typer.Option(help="Prompts at a time, e.g. 1,4,16.")] = "1",
    context: Annotated[
        str | None, typer.Option(help="Prompts filled up to so many tokens, e.g. 256,2k.")
    ] = None,
    temperature: Annotated[list[float] | None, typer.Option(min=0, help="0 is greedy.")] = None,
    budget: Annotated[
        list[str] | None, typer.Option(callback=check_budgets, help=f"{HELP} Give several.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, or e.g. float32,bfloat16,int8.")] = "auto",
    baselines: Annotated[
        str, typer.Option(help="Of plain (always there), generate, lookup, mtp.")
    ] = "plain,generate,lookup",
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per hour.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the report.")] = None,
) -> None:
    """Measure accepted length, speed, memory and exactness on suites of prompts."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint
    from headstart.scripts.options.suites import Plan, names, numbers, read_suites

    plan = Plan(
        max_new_tokens=max_new_tokens,
        batches=numbers(batch, "--batch"),
        contexts=(None,) if context is None else numbers(context, "--context"),
        temperatures=tuple(dict.fromkeys(temperature or [0.0])),
        budgets=tuple(budget or []),
        dtypes=names(dtype, DTYPES, "--dtype"),
        baselines=names(baselines, BASELINES, "--baselines"),
        price=price,
        seed=seed,
        out=out,
    )
    if out is not None:  # before the work: what is missing now would waste it
        check_extra()
        out.mkdir(parents=True, exist_ok=True)
    _Bench(plan, read_suites(suite or ["heldout"], limit), folder or shipped_checkpoint()).run()


@dataclass(frozen=True)
class _Opened:
    """One dtype's models and prompts. missing: baselines that cannot run, and why.

    cases: by context and suite, the prompts and how many were left out as too long.
    """

    target: Target
    runners: dict[str, Runner]
    missing: dict[str, str]
    cases: dict[int | None, dict[str, tuple[list[Case], int]]]


class _Bench:
    """All runs of one command, and their figures."""

    def __init__(self, plan: Plan, suites: Sequence[Suite], folder: Path):
        self.plan, self.suites, self.folder = plan, suites, folder
        self.figures: dict[str, Any] = {
            "command": shlex.join(["headstart", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "max_new_tokens": plan.max_new_tokens,
            "price": plan.price,
            "trees": {},
            "conditions": {},
            "runs": [],
            "totals": [],
        }

    def run(self) -> None:
        try:
            for dtype in self.plan.dtypes:
                self._with_dtype(dtype)
        except KeyboardInterrupt as stop:
            runs = len(self.figures["runs"])
            if not runs:
                raise
            self._finish()
            raise KeyboardInterrupt(f"The figures of {runs} complete runs are kept.") from stop
        self._finish()

    def _finish(self) -> None:
        if self.plan.out is not None:
            write_report(self.figures, self.plan.out)
            show(f"report: {self.plan.out / 'report.html'}")
        runs = [{key: run[key] for key in run if key != "cases"} for run in self.figures["runs"]]
        print(json.dumps(self.figures | {"runs": runs}))

    def _with_dtype(self, dtype: str) -> None:
        plan = self.plan
        opened = self._open(dtype)
        name = conditions(opened.target)["dtype"]
        settings = list(product(plan.contexts, plan.temperatures, plan.batches))
        batches = sum(
            ceil(len(cases) / batch)
            for context, _, batch in settings
            for cases, _ in opened.cases[context].values()
        )
        with progress(f"decoding, {name}", batches) as update:
            done = _Done(update)
            for context, temperature, batch in settings:
                key = dict(zip(SETTING, (name, context, temperature, batch), strict=True))
                self._setting(opened, key, done)

    def _open(self, dtype: str) -> _Opened:
        from headstart.model.checkpoint.download import fetch_fused
        from headstart.model.checkpoint.head import load_fused
        from headstart.scripts.options.suites import make_cases

        plan = self.plan
        how = {"quantize": INT8} if dtype == INT8 else {"dtype": dtype}
        target, head = load_fused(self.folder, **how)
        tell_quantized(target)
        cases = {
            context: {
                suite.name: make_cases(suite, target, context=context, room=plan.max_new_tokens)
                for suite in self.suites
            }
            for context in plan.contexts
        }
        own = contestants(target, head, plan.budgets)
        self.figures["trees"] |= {name: described(one) for name, one in own.items()}
        runners, missing = make_runners(target, own, plan.baselines, fetch_fused(self.folder))
        copies = 1 + any(not one.ours for one in runners.values())
        where = conditions(target) | machine(target) | {"models_in_memory": copies}
        self.figures["conditions"][where["dtype"]] = where
        return _Opened(target, runners, missing, cases)

    def _setting(self, opened: _Opened, key: dict[str, Any], done: _Done) -> None:
        """All suites in one setting, and their total."""
        from headstart.inference.benchmark.baselines import Score, Setting, bench

        setting = Setting(
            self.plan.max_new_tokens, key["batch"], key["temperature"], self.plan.seed
        )
        fitting = {
            name: runner
            for name, runner in opened.runners.items()
            if runner.rows is None or setting.batch <= runner.rows
        }
        alone = "transformers answers one prompt at a time with it."
        left_out = opened.missing | dict.fromkeys(opened.runners.keys() - fitting.keys(), alone)
        everything: list[Results] = []
        for suite, (cases, too_long) in opened.cases[key["context"]].items():
            report = done.of(f"{suite}, batch {setting.batch}")
            results = bench(opened.target, fitting, cases, setting, report=report)
            everything.append(results)
            run = {
                "suite": suite,
                **key,
                "prompts": len(cases),
                "prompt_tokens": sum(len(case.tokens) for case in cases),
                "too_long": too_long,
                "left_out": left_out,
                "contestants": self._summaries(opened.target, results.scores, [results], key),
                "cases": [vars(timing) for timing in results.timings],
            }
            self._keep("runs", run)
        scores = {name: Score.total([one.scores[name] for one in everything]) for name in fitting}
        summed = self._summaries(opened.target, scores, everything, key)
        self._keep("totals", {"suite": ALL, **key, "left_out": left_out, "contestants": summed})
        console.print(
            table([*self.figures["runs"][-len(everything) :], self.figures["totals"][-1]])
        )

    def _keep(self, kind: str, run: dict[str, Any]) -> None:
        """Add a run, and write down what there is: an interruption loses nothing else."""
        self.figures[kind].append(run)
        if self.plan.out is not None:
            replace_text(self.plan.out / FIGURES, json.dumps(self.figures, indent=1) + "\n")

    def _summaries(
        self,
        target: Target,
        scores: Mapping[str, Score],
        results: Sequence[Results],
        key: dict[str, Any],
    ) -> dict[str, dict[str, Any]]:
        """Every contestant's figures, with what needs the texts."""
        where = self.figures["conditions"][key["dtype"]]
        ideal = where["step_mb"] * MEGA / (where["bandwidth_gb_per_second"] * GIGA)
        figures = summaries(scores, ideal, self.plan.price)
        if self.plan.out is None or scores[PLAIN].error is not None:
            return figures
        for name, score in scores.items():
            if score.error is None and score.compared:
                texts, expected = (
                    [target.text(tokens) for one in results for tokens in one.answers[who]]
                    for who in (name, PLAIN)
                )
                figures[name] |= likeness(texts, expected)
        return figures


class _Done:
    """A bar over several runs."""

    def __init__(self, update: Update):
        self._update, self._before, self._now = update, 0, 0

    def of(self, note: str) -> Callable[[int], None]:
        """What a new run reports to."""
        self._before += self._now
        self._now = 0
        self._update(self._before, note)

        def report(done: int) -> None:
            self._now = done
            self._update(self._before + done, note)

        return report


def make_runners(
    target: Target, own: Mapping[str, SpeculativeConfig], baselines: Sequence[str], folder: Path
) -> tuple[dict[str, Runner], dict[str, str]]:
    """Everybody who takes part, and which baselines cannot and why."""
    from headstart.inference.benchmark.baselines import Ours, Stock
    from headstart.model.target.pretrained import open_pretrained

    runners: dict[str, Runner] = {PLAIN: Ours(target)}
    runners |= {name: Ours(target, one) for name, one in own.items()}
    missing: dict[str, str] = {}
    options: dict[str, dict[str, Any]] = {
        GENERATE: {},
        LOOKUP: {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
        MTP: {"use_mtp": True},
    }
    wanted = [name for name in options if name in baselines]
    listed = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if MTP in wanted and "num_mtp_layers" not in listed:
        wanted.remove(MTP)
        missing[MTP] = "the checkpoint does not list an mtp head for transformers (fuse --index)."
    if not wanted:
        return runners, missing
    show("Hugging Face's runs have a copy of the model of their own, so memory holds it twice.")
    model, _ = open_pretrained(str(folder), target.dtype, target.device, None)
    # The head's weights, which are listed there, are no part of the model itself.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{target.num_layers}\..*"]
    for name in wanted:
        runners[name] = Stock(model, target.eos_ids, target.pad_id, **options[name])
    return runners, missing


def machine(target: Target) -> dict[str, float]:
    """How fast memory is, and what a pass over one token reads of it.

    Of an embedding only one row is read, unless it is the LM head too; of a mixture of experts less
    than this says.
    """
    model = target.model
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = [weight for weight in model.parameters() if weight is not embedding]
    read += [output] if output is embedding else []
    matrices = 1 if target.quantized else output.element_size()  # bytes of a number
    size = sum(one.numel() * (matrices if one.dim() > 1 else one.element_size()) for one in read)
    speed = bandwidth(target.device) / GIGA
    return {"bandwidth_gb_per_second": round(speed, 3), "step_mb": round(size / MEGA, 3)}


def bandwidth(device: torch.device) -> float:
    """Bytes per second that torch reads with all its threads: the best of five sums."""
    import torch

    values = torch.ones(READ // 4, device=device)
    # On an accelerator many sums, so that the way there and back does not count.
    sums = 1 if device.type == "cpu" else 16
    best = float("inf")
    for _ in range(5):
        values[0].item()  # waits for the device
        start = time.perf_counter()
        for _ in range(sums):
            last = values.sum()
        last.item()
        best = min(best, time.perf_counter() - start)
    return sums * READ / best


def summaries(
    scores: Mapping[str, Score], ideal_seconds: float, price: float | None
) -> dict[str, dict[str, Any]]:
    """Figures of each contestant. ideal_seconds: of one step, if only memory speed counted."""
    figures: dict[str, dict[str, Any]] = {}
    baselines = {
        f"speedup_over_{name}": scores[name].tokens_per_second
        for name in (PLAIN, GENERATE)
        if name in scores and scores[name].error is None
    }
    for name, score in scores.items():
        if score.error is not None:
            figures[name] = {"error": score.error, "prompts": score.prompts}
            continue
        speed = score.tokens_per_second
        figures[name] = _summary(score) | {
            key: round(speed / other, 4) for key, other in baselines.items()
        }
        if name == PLAIN and score.steps:
            figures[name]["share_of_bandwidth"] = round(ideal_seconds / score.step_seconds, 4)
        if price is not None:
            figures[name]["cost_per_million_tokens"] = round(price / 3600 / speed * MEGA, 4)
    return figures


def _summary(score: Score) -> dict[str, Any]:
    stats = score.stats
    figures: dict[str, Any] = {
        "prompts": score.prompts,
        "tokens": stats.tokens,
        "acceptance_length": round(stats.acceptance_length, 4),
        "acceptance_per_depth": [round(rate, 4) for rate in stats.acceptance],
        "tokens_per_second": round(score.tokens_per_second, 3),
        "seconds": {"total": round(score.seconds, 4)},
        "cpu_ms_per_token": round(1e3 * score.cpu_seconds / stats.tokens, 4),
        "peak_memory_mb": None if score.peak is None else round(score.peak / MEGA, 1),
        "working_memory_mb": None if score.working is None else round(score.working / MEGA, 1),
        "calibration_error": stats.calibration_error,
        "reliability": [[count, round(said, 2), hits] for count, said, hits in stats.reliability],
        "compared": score.compared,
        "identical": score.identical,
        "first_differences": [vars(one) for one in score.differences],
    }
    if stats.wall:  # our own loop, which knows what it did when
        seconds = {phase: stats.seconds[phase] for phase in ("prefill", "draft", "verify")}
        seconds["host"] = max(score.seconds - sum(seconds.values()), 0.0)
        figures["seconds"] |= {phase: round(value, 4) for phase, value in seconds.items()}
        figures["host_share"] = round(seconds["host"] / score.seconds, 4)
        decoding = score.seconds - seconds["prefill"]
        speed = (stats.tokens - score.prompts) / decoding
        figures["decode_tokens_per_second"] = round(speed, 3)
    return figures
