"""The plots of a benchmark's report: each shows one thing, and is left out where there is none.

`bench_report.py` says what the figures are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SETTING = ("dtype", "context", "temperature", "batch")
PHASES = ("prefill", "draft", "verify", "host")


def draw_all(figures: Mapping[str, Any], out: Path) -> list[str]:
    """Save the plots that have something to show; what shows them in Markdown."""
    from matplotlib.figure import Figure

    shown = []
    for name, (title, draw) in PLOTS.items():
        plot = Figure(figsize=(9, 4), layout="constrained")
        axes = plot.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}: {setting(first_of(figures))}", loc="left", fontsize=10)
        draw(axes, figures)
        if axes.has_data():
            plot.savefig(out / f"{name}.png", dpi=130)
            shown.append(f"![{title}]({name}.png)")
    return shown


def setting(run: Mapping[str, Any]) -> str:
    how = "greedy" if run["temperature"] == 0 else f"temperature {run['temperature']:g}"
    context = "" if run["context"] is None else f", prompts of about {run['context']} tokens"
    return f"{run['dtype']}, {how}, batch {run['batch']}{context}"


def first_of(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """The total of the first setting; its first run where it was interrupted."""
    first: Mapping[str, Any] = (figures["totals"] or figures["runs"])[0]
    return first


def working(run: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one for name, one in run["contestants"].items() if "error" not in one}


def _same(figures: Mapping[str, Any], kind: str, but: str | None = None) -> list[Mapping[str, Any]]:
    """Runs or totals in the first setting, whatever one of its parts is."""
    first = first_of(figures)
    keys = [key for key in SETTING if key != but]
    return [run for run in figures[kind] if all(run[key] == first[key] for key in keys)]


def _speedup(over: str, axes: Axes, figures: Mapping[str, Any]) -> None:
    """Bars by suite, a colour each contestant."""
    runs = _same(figures, "runs") + _same(figures, "totals")
    bars = {name: None for run in runs for name, one in working(run).items() if over in one}
    names = [name for name in bars if not over.endswith(name)]
    for place, name in enumerate(names):
        there = [
            number for number, run in enumerate(runs) if over in run["contestants"].get(name, ())
        ]
        heights = [runs[number]["contestants"][name][over] for number in there]
        spots = [number + 0.8 * (place + 0.5) / len(names) - 0.4 for number in there]
        axes.bar(spots, heights, 0.75 / len(names), label=name)
    if names:
        axes.axhline(1, color="grey", linewidth=1)
        axes.set_xticks(range(len(runs)), [run["suite"] for run in runs])
        axes.set_ylabel("times as fast")
        axes.legend()


def _by(key: str, axes: Axes, figures: Mapping[str, Any]) -> None:
    """Speed against one part of the setting, a line each contestant."""
    totals = [run for run in _same(figures, "totals", but=key) if run[key] is not None]
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


def _nodes(axes: Axes, figures: Mapping[str, Any]) -> None:
    ways, trees = working(first_of(figures)), figures["trees"]
    points = sorted(
        (trees[name]["nodes"], ways[name]["acceptance_length"], name)
        for name in trees
        if name in ways
    )
    if len(points) > 1:
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
        for x, y, name in points:
            axes.annotate(name, (x, y), xytext=(4, -12), textcoords="offset points", fontsize=8)
        axes.set(xlabel="nodes of the tree", ylabel="accepted length")


def _depths(axes: Axes, figures: Mapping[str, Any]) -> None:
    for name, one in working(first_of(figures)).items():
        rates = one["acceptance_per_depth"]
        if rates:
            axes.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
            axes.set(xlabel="depth", ylabel="guesses accepted", ylim=(0, 1))
            axes.legend()


def _times(axes: Axes, figures: Mapping[str, Any]) -> None:
    """Stacked bars: where the milliseconds of a token go."""
    ways = working(first_of(figures))
    left = dict.fromkeys(ways, 0.0)
    for phase in (*PHASES, "total"):
        # The total is of those that do not know their phases.
        shown = [
            name
            for name, one in ways.items()
            if phase in one["seconds"] and (phase != "total" or "host" not in one["seconds"])
        ]
        sizes = [1e3 * ways[name]["seconds"][phase] / ways[name]["tokens"] for name in shown]
        label = "not split" if phase == "total" else phase
        axes.barh(shown, sizes, left=[left[name] for name in shown], label=label)
        for name, size in zip(shown, sizes, strict=True):
            left[name] += size
    axes.set_xlabel("milliseconds per token")
    axes.legend()


def _costs(axes: Axes, figures: Mapping[str, Any]) -> None:
    """What a read of so many nodes takes, beside a plain step."""
    measured = [tree["costs"] for tree in figures["trees"].values() if "costs" in tree]
    for costs in measured[:1]:  # the machine's, whoever has them
        times = [1e3 * seconds for seconds in costs["verify"]]
        axes.plot(costs["nodes"], times, marker="o", label="one read of the target")
        axes.axhline(times[0], color="grey", linewidth=1, label="a plain step")
        drafts = [1e3 * (costs["advance"] + depth * costs["deepen"]) for depth in range(8)]
        axes.plot(range(1, 9), drafts, marker=".", label="drafting so many depths")
        axes.set(xlabel="nodes (or depths)", ylabel="milliseconds", ylim=(0, None))
        axes.legend()


def _calibration(axes: Axes, figures: Mapping[str, Any]) -> None:
    """How often guesses came true, by how likely the draft held them."""
    for name, one in working(first_of(figures)).items():
        bins = [(said / count, hits / count) for count, said, hits in one["reliability"] if count]
        if bins:
            axes.plot(*zip(*bins, strict=True), marker="o", label=name)
            axes.axline((0, 0), slope=1, color="grey", linewidth=1)
            axes.set(xlabel="probability of the path", ylabel="share accepted", ylim=(0, 1))
            axes.legend()


PLOTS: dict[str, tuple[str, Callable[..., None]]] = {
    "speedup": ("Speed over plain decoding", partial(_speedup, "speedup_over_plain")),
    "generate": ("Speed over Hugging Face's generate", partial(_speedup, "speedup_over_generate")),
    "batch": ("Speed by batch size", partial(_by, "batch")),
    "context": ("Speed by length of the prompts", partial(_by, "context")),
    "nodes": ("Accepted length by size of the tree", _nodes),
    "depth": ("Acceptance by depth", _depths),
    "time": ("Where the time goes", _times),
    "cost": ("What a read costs", _costs),
    "calibration": ("What the draft's probabilities mean", _calibration),
}
