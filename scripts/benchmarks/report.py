"""The report of `headstart bench`: Markdown, one HTML file, plots as PNG.

metrics.json holds:

    command, date, max_new_tokens, price    the options; dollars per hour or null
    configs         by name: nodes, depth, width, static, budget, ngram; costs, the measured
                    seconds, where the budget is auto
    environment     by dtype: machine and versions as `headstart eval` reports them, and
                    bandwidth_gb_per_second (measured), step_mb (weights that an autoregressive
                    step reads), models_in_memory (2 beside transformers' runs)
    runs            one per dtype, context, temperature, batch size and suite:
        suite, dtype, context, temperature, batch_size    context null: prompts as they are
        prompts, prompt_tokens, num_too_long    counts; num_too_long prompts were left out
        skipped                                 baselines that did not run, and why
        results                                 by configuration, see below
        batches     prompts (their ids) and measured: by configuration [tokens, seconds, target
                    passes]
    totals          the same over all suites of a setting, without counts and batches

A result (one that failed has `error` and `prompts`, the number of responses before):

    prompts, tokens              responses and generated tokens, end-of-sequence included
    acceptance_length            tokens per target pass, up to the end of each response; for
                                 transformers' runs the prefill counts as a pass too
    acceptance_rate_per_position share of draft tokens accepted where all before were accepted
    num_draft_tokens, num_accepted_tokens    verified and accepted draft tokens
    tokens_per_second, speedup_over_autoregressive, speedup_over_generate    total tokens by total
                                 seconds
    decode_tokens_per_second     without the prefill's time and the tokens that it gave
    seconds                      total; of Headstart also prefill, draft, verify, host
    host_share                   of the total
    share_of_bandwidth           of autoregressive decoding: the time to read step_mb over a step's
    peak_memory_mb, working_memory_mb    peak memory, and how much of it decoding allocated
    cpu_ms_per_token             of all threads
    calibration_error            of the verified nodes' probabilities; null without drafts
    reliability                  behind it: by probability, [nodes, sum of probabilities, accepted]
    compared, identical          responses beside the autoregressive ones
    first_differences            prompt, position, margin: the top-2 distance of the logits there
    bleu, rouge_l                against the autoregressive texts, 0 to 100; only with a report
    cost_per_million_tokens      dollars; only with a price
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.model.checkpoint.atomic import replace_text

from .plots import PHASES, draw_all, first_of, setting, working

AUTOREGRESSIVE = "autoregressive"
EXTRA = ("matplotlib", "rouge_score", "sacrebleu", "markdown_it")
SLOWEST = 5  # batches that are listed
COLUMNS = (
    "", "identical", "acceptance length", "rate per position", "tokens/s", "x autoregressive",
    "x generate",
    "prefill/draft/verify/host", "ms CPU/token", "peak MB", "$/M tokens",
)  # fmt: skip
IN_TERMINAL = (
    "", "identical", "acceptance length", "tokens/s", "x autoregressive", "x generate",
)  # fmt: skip
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2733; max-width: 62rem; margin: 3rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 2rem; } h2 { margin-top: 2.6rem; border-bottom: 1px solid #dde3ea; }
table { border-collapse: collapse; font-size: .88rem; display: block; overflow-x: auto; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #e4e9ef; text-align: right;
         white-space: nowrap; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } tr:hover td { background: #f4f8fb; }
img { max-width: 100%; } code { background: #f1f4f7; padding: .1rem .3rem; border-radius: 3px; }
"""


def check_extra() -> None:
    """Raise ValueError if a package that the report needs is missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"A report needs packages that are not installed ({', '.join(missing)}). Run "
            "pip install 'headstart[bench]', or remove --out: the metrics are printed too."
        )


def similarity(texts: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Similarity of two lists of texts, 0 to 100: corpus BLEU, mean ROUGE-L (F1)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    # BLEU of equal texts without a word would be 0.
    same = list(texts) == list(expected)
    bleu = 100.0 if same else corpus_bleu(list(texts), [list(expected)]).score
    scorer = RougeScorer(["rougeL"])
    rouge = [
        1.0 if text == right else scorer.score(right, text)["rougeL"].fmeasure
        for text, right in zip(texts, expected, strict=True)
    ]
    return {"bleu": round(bleu, 3), "rouge_l": round(100 * sum(rouge) / len(rouge), 3)}


def write_report(metrics: Mapping[str, Any], out: Path) -> None:
    """Write report.md, report.html (self-contained) and the plots."""
    from markdown_it import MarkdownIt

    text = markdown(metrics, draw_all(metrics, out))
    replace_text(out / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(\w+\.png)"', lambda name: f'src="{_data(out / name[1])}"', body)
    title = f"<title>{html.escape(_title(metrics))}</title>"
    head = f'<!doctype html>\n<meta charset="utf-8">{title}<style>{STYLE}</style>\n'
    replace_text(out / "report.html", head + body)


def _data(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def cells(name: str, one: Mapping[str, Any]) -> list[str]:
    """The row of a result under `COLUMNS`."""
    if "error" in one:
        return [name, "failed", *[""] * (len(COLUMNS) - 2)]

    def shown(key: str, form: str) -> str:
        return "-" if one.get(key) is None else form.format(one[key])

    seconds = one["seconds"]
    shares = [f"{seconds[phase] / seconds['total']:.0%}" for phase in PHASES if phase in seconds]
    return [
        name,
        f"{one['identical']}/{one['compared']}" if one["compared"] else "-",
        shown("acceptance_length", "{:.2f}"),
        " ".join(f"{rate:.2f}" for rate in one["acceptance_rate_per_position"]) or "-",
        shown("tokens_per_second", "{:.1f}"),
        shown("speedup_over_autoregressive", "{:.2f}"),
        shown("speedup_over_generate", "{:.2f}"),
        " ".join(shares) or "-",
        shown("cpu_ms_per_token", "{:.1f}"),
        shown("peak_memory_mb", "{:.0f}"),
        shown("cost_per_million_tokens", "{:.3f}"),
    ]


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """The runs of one setting, for the terminal."""
    narrow = [place for place, column in enumerate(COLUMNS) if column in IN_TERMINAL]
    shown = Table(title=setting(runs[0]), title_justify="left")
    for column in ("suite", *(COLUMNS[place] for place in narrow)):
        shown.add_column(column, justify="left" if column in ("suite", "") else "right")
    for run in runs:
        for place, (name, one) in enumerate(run["results"].items()):
            row = cells(name, one)
            shown.add_row("" if place else run["suite"], *(row[column] for column in narrow))
        shown.add_section()
    return shown


def markdown(metrics: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report as Markdown. pictures: Markdown that shows the plots."""
    runs, totals = metrics["runs"], metrics["totals"]
    parts = [f"# {_title(metrics)}", _headline(metrics)]
    for run in totals or runs[:1]:
        parts += [f"## {run['suite'].capitalize()}: {setting(run)}", _results(run)]
    parts += pictures
    if len(runs) > len(totals):
        parts += ["## Suite by suite"]
        for run in runs:
            sizes = f"{run['prompts']} prompts, {run['prompt_tokens']} tokens"
            parts += [f"### {run['suite']}: {setting(run)}, {sizes}", _results(run)]
    parts += ["## Responses that differ", _differences(runs)]
    parts += ["## The slowest batches", _slow(metrics), "## What did not run", _missing(runs)]
    return "\n\n".join([*parts, "## Environment", _environment(metrics)]) + "\n"


def _title(metrics: Mapping[str, Any]) -> str:
    where = next(iter(metrics["environment"].values()))
    return f"Speed of {Path(where['target']).name}, {metrics['date']}"


def _headline(metrics: Mapping[str, Any]) -> str:
    run = first_of(metrics)
    ours = [(name, one) for name, one in working(run).items() if name in metrics["configs"]]
    ours = [(name, one) for name, one in ours if "speedup_over_autoregressive" in one]
    if not ours:
        return "No speed-up was measured: see what did not run."
    name, best = max(ours, key=lambda pair: pair[1]["speedup_over_autoregressive"])
    text = f"**{name}: {best['speedup_over_autoregressive']:.2f}x autoregressive decoding"
    if "speedup_over_generate" in best:
        text += f" and {best['speedup_over_generate']:.2f}x transformers' generate"
    return (
        f"{text}. {best['identical']} of {best['compared']} responses are identical.** "
        f"({setting(run)}, {best['prompts']} prompts, {best['tokens']} tokens)"
    )


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in lines
    )


def _results(run: Mapping[str, Any]) -> str:
    return _grid(COLUMNS, [cells(name, one) for name, one in run["results"].items()])


def _differences(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        for name, one in working(run).items():
            scores = [f"{one[key]:.1f}" if key in one else "-" for key in ("bleu", "rouge_l")]
            rows += [
                [name, run["suite"], setting(run), where["prompt"], str(where["position"]),
                 f"{where['margin']:.2g}", *scores]
                for where in one["first_differences"]
            ]  # fmt: skip
    if not rows:
        return "None: every compared response equals the autoregressive one, token for token."
    text = "The first position where a response differs from the autoregressive one, and the "
    text += "distance of the two best logits there: at a margin near 0, rounding decides.\n\n"
    header = ("", "suite", "setting", "prompt", "position", "margin", "BLEU of the run", "ROUGE-L")
    return text + _grid(header, rows)


def _slow(metrics: Mapping[str, Any]) -> str:
    """The batches with the lowest speed-up over autoregressive decoding."""
    rows = []
    for run in metrics["runs"]:
        for batch in run["batches"]:
            measured = batch["measured"]
            for name in metrics["configs"]:
                if name in measured and AUTOREGRESSIVE in measured:
                    tokens, seconds, passes = measured[name]
                    baseline_tokens, baseline_seconds, _ = measured[AUTOREGRESSIVE]
                    ratio = tokens / seconds / (baseline_tokens / baseline_seconds)
                    shown = [name, run["suite"], setting(run), ", ".join(batch["prompts"])]
                    shown += [f"{ratio:.2f}", f"{tokens / max(passes, 1):.2f}", str(tokens)]
                    rows.append((ratio, shown))
    header = ("", "suite", "setting", "prompts", "x autoregressive", "tokens/pass", "tokens")
    return _grid(header, [shown for _, shown in sorted(rows)[:SLOWEST]])


def _missing(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        place = f"{run['suite']}, {setting(run)}"
        lines += [f"- {name} ({place}): {why}" for name, why in run["skipped"].items()]
        failed = {name: one for name, one in run["results"].items() if "error" in one}
        lines += [f"- {name} ({place}) failed: {one['error']}" for name, one in failed.items()]
        if run["num_too_long"]:
            lines.append(f"- {run['num_too_long']} prompts of {place} exceed the model's context.")
    return "\n".join(" ".join(line.split()) for line in lines) or "Everything ran."


def _environment(metrics: Mapping[str, Any]) -> str:
    where = metrics["environment"]
    keys = list(next(iter(where.values())))
    rows = [[key.replace("_", " "), *[str(one[key]) for one in where.values()]] for key in keys]
    share = [
        f"Autoregressive decoding reaches {one['share_of_bandwidth']:.0%} of the memory bandwidth "
        f"({setting(run)})."
        for run in metrics["totals"]
        for one in [run["results"].get(AUTOREGRESSIVE, {})]
        if "share_of_bandwidth" in one
    ]
    note = (
        "Speeds are total tokens by total seconds, prefill included. Every batch is decoded by all "
        "configurations in turn. Acceptance lengths of transformers' runs count the prefill."
    )
    return "\n\n".join([_grid(["", *where], rows), *share, note, f"`{metrics['command']}`"])
