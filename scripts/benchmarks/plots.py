"""The plots of a benchmark's report. A plot with nothing to show is left out.

`report.py` documents the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETTING = ("dtype", "context", "temperature", "batch_size")
PHASES = ("prefill", "draft", "verify", "host")


def draw_all(metrics: Mapping[str, Any], out: Path) -> list[str]:
    """Save the plots that have something to show; the Markdown that shows them."""
    from matplotlib.figure import Figure

    shown = []
    for name, (title, draw) in PLOTS.items():
        plot = Figure(figsize=(9, 4), layout="constrained")
        axes = plot.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}: {setting(first_of(metrics))}", loc="left", fontsize=10)
        draw(axes, metrics)
        if axes.has_data():
            plot.savefig(out / f"{name}.png", dpi=130)
            shown.append(f"![{title}]({name}.png)")
    return shown


def setting(run: Mapping[str, Any]) -> str:
    sampling = "greedy" if run["temperature"] == 0 else f"temperature {run['temperature']:g}"
    context = "" if run["context"] is None else f", prompts of about {run['context']} tokens"
    return f"{run['dtype']}, {sampling}, batch size {run['batch_size']}{context}"


def first_of(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The total of the first setting, or its first run after an interruption."""
    first: Mapping[str, Any] = (metrics["totals"] or metrics["runs"])[0]
    return first


def working(run: Mapping[str, Any]) -> dict[str, Any]:
    """The results that did not fail."""
    return {name: one for name, one in run["results"].items() if "error" not in one}


def _same(metrics: Mapping[str, Any], kind: str, but: str | None = None) -> list[Mapping[str, Any]]:
    """Runs or totals of the first setting; its part `but` may differ."""
    first = first_of(metrics)
    keys = [key for key in SETTING if key != but]
    return [run for run in metrics[kind] if all(run[key] == first[key] for key in keys)]


def _speedup(over: str, axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Bars by suite, a colour per configuration."""
    runs = _same(metrics, "runs") + _same(metrics, "totals")
    bars = {name: None for run in runs for name, one in working(run).items() if over in one}
    names = [name for name in bars if not over.endswith(name)]
    for place, name in enumerate(names):
        there = [number for number, run in enumerate(runs) if over in run["results"].get(name, ())]
        heights = [runs[number]["results"][name][over] for number in there]
        spots = [number + 0.8 * (place + 0.5) / len(names) - 0.4 for number in there]
        axes.bar(spots, heights, 0.75 / len(names), label=name)
    if names:
        axes.axhline(1, color="grey", linewidth=1)
        axes.set_xticks(range(len(runs)), [run["suite"] for run in runs])
        axes.set_ylabel("times as fast")
        axes.legend()


def _by(key: str, axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Speed against one part of the setting, a line per configuration."""
    totals = [run for run in _same(metrics, "totals", but=key) if run[key] is not None]
    if len(totals) < 2:
        return
    for name in dict.fromkeys(name for run in totals for name in working(run)):
        points = [
            (run[key], working(run)[name]["tokens_per_second"])
            for run in totals
            if name in working(run)
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel=key, ylabel="tokens per second", ylim=(0, None))
    axes.legend()


def _nodes(axes: Axes, metrics: Mapping[str, Any]) -> None:
    results, configs = working(first_of(metrics)), metrics["configs"]
    points = sorted(
        (configs[name]["nodes"], results[name]["acceptance_length"], name)
        for name in configs
        if name in results
    )
    if len(points) > 1:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        for x, y, name in points:
            axes.annotate(name, (x, y), xytext=(4, -12), textcoords="offset points", fontsize=8)
        axes.set(xlabel="nodes of the tree", ylabel="acceptance length")


def _positions(axes: Axes, metrics: Mapping[str, Any]) -> None:
    for name, one in working(first_of(metrics)).items():
        rates = one["acceptance_rate_per_position"]
        if rates:
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
            axes.set(xlabel="position", ylabel="acceptance rate", ylim=(0, 1))
            axes.legend()


def _times(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Stacked bars: milliseconds per token by phase."""
    results = working(first_of(metrics))
    left = dict.fromkeys(results, 0.0)
    for phase in (*PHASES, "total"):
        # The total of those that do not time their phases.
        shown = [
            name
            for name, one in results.items()
            if phase in one["seconds"] and (phase != "total" or "host" not in one["seconds"])
        ]
        sizes = [1e3 * results[name]["seconds"][phase] / results[name]["tokens"] for name in shown]
        label = "not split" if phase == "total" else phase
        axes.barh(shown, sizes, left=[left[name] for name in shown], label=label)
        for name, size in zip(shown, sizes, strict=True):
            left[name] += size
    axes.set_xlabel("milliseconds per token")
    axes.legend()


def _costs(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """The time to verify a tree, beside an autoregressive step."""
    measured = [config["costs"] for config in metrics["configs"].values() if "costs" in config]
    for costs in measured[:1]:  # of the machine, so all are the same
        times = [1e3 * seconds for seconds in costs["verify"]]
        axes.plot(costs["nodes"], times, marker="o", label="verify")
        axes.axhline(times[0], color="grey", linewidth=1, label="autoregressive step")
        drafts = [1e3 * (costs["advance"] + depth * costs["deepen"]) for depth in range(8)]
        axes.plot(range(1, 9), drafts, marker=".", label="draft to this depth")
        axes.set(xlabel="nodes (or depth)", ylabel="milliseconds", ylim=(0, None))
        axes.legend()


def _calibration(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Share of accepted draft tokens by the probability that the draft assigned them."""
    for name, one in working(first_of(metrics)).items():
        bins = [
            (stated / count, accepted / count)
            for count, stated, accepted in one["reliability"]
            if count
        ]
        if bins:
            axes.plot(*zip(*bins, strict=True), marker="o", label=name)
            axes.axline((0, 0), slope=1, color="grey", linewidth=1)
            axes.set(xlabel="probability of the path", ylabel="share accepted", ylim=(0, 1))
            axes.legend()


PLOTS: dict[str, tuple[str, Callable[..., None]]] = {
    "speedup": (
        "Speed-up over autoregressive decoding",
        partial(_speedup, "speedup_over_autoregressive"),
    ),
    "generate": (
        "Speed-up over transformers' generate",
        partial(_speedup, "speedup_over_generate"),
    ),
    "batch_size": ("Speed by batch size", partial(_by, "batch_size")),
    "context": ("Speed by prompt length", partial(_by, "context")),
    "nodes": ("Acceptance length by tree size", _nodes),
    "position": ("Acceptance rate by position", _positions),
    "time": ("Time per token by phase", _times),
    "cost": ("Cost of a decode step", _costs),
    "calibration": ("Calibration of the draft's probabilities", _calibration),
}
