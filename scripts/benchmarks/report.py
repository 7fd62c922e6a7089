"""The figures of `headstart bench`, and its report: Markdown, one HTML file, plots as PNG.

figures.json holds:

    command, date, max_new_tokens, price    what was asked for; dollars per hour or null
    trees           by contestant: nodes, depth, width, static, budget, lookup; costs, the measured
                    seconds, where the budget is auto
    conditions      by dtype: machine and versions as `headstart eval` has them, and
                    bandwidth_gb_per_second (measured), step_mb (weights that one token's pass
                    reads), models_in_memory (2 beside Hugging Face's runs)
    runs            one per dtype, context, temperature, batch and suite:
        suite, dtype, context, temperature, batch    context null: prompts as they are
        prompts, prompt_tokens, too_long             counts; too_long were left out
        left_out                                     baselines that did not run, and why
        contestants                                  by name, see below
        cases       one per batch: prompts (their ids) and took: by contestant [tokens, seconds,
                    rounds of the target]
    totals          the same over all suites of a setting, without counts and cases

A contestant (one that failed has `error` and `prompts`, how many it had answered):

    prompts, tokens              answered and emitted, end-of-text included
    accepted_length              tokens per pass of the target, up to the end of each answer; of
                                 Hugging Face's runs the prompt's pass counts too
    acceptance_per_depth         how often a guess was right when all before it were
    tokens_per_second, speedup_over_plain, speedup_over_generate     total tokens by total seconds
    decode_tokens_per_second     without the prompts' time and the tokens that they gave
    seconds                      total; of ours also prefill, draft, verify, host
    host_share                   of the total
    share_of_bandwidth           of plain: the time of reading step_mb over that of a step
    peak_memory_mb, working_memory_mb    most in memory, and how much of it came with an answer
    cpu_ms_per_token             of all threads
    calibration_error            of the read nodes' probabilities; null where there were none
    reliability                  behind it: by probability, [nodes, sum of probabilities, accepted]
    compared, identical          answers beside the plain ones
    first_differences            prompt, place, margin: the plain logits' top-2 distance there
    bleu, rouge_l                against the plain texts, 0 to 100; only with a report
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

PLAIN = "plain"
EXTRA = ("matplotlib", "rouge_score", "sacrebleu", "markdown_it")
SLOWEST = 5  # prompts that are listed
COLUMNS = (
    "", "identical", "accepted", "per depth", "tokens/s", "x plain", "x generate",
    "prefill/draft/verify/host", "ms CPU/token", "peak MB", "$/M tokens",
)  # fmt: skip
IN_TERMINAL = ("", "identical", "accepted", "tokens/s", "x plain", "x generate")
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
    """ValueError when a report could not be written in the end."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"A report needs packages that are not installed ({', '.join(missing)}). Run "
            "pip install 'headstart[bench]', or leave --out away: the figures are printed too."
        )


def likeness(texts: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """How alike two lists of texts are, 0 to 100: BLEU of all together, mean ROUGE-L (F1)."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    # Texts without a word are alike too, which BLEU does not know.
    same = list(texts) == list(expected)
    bleu = 100.0 if same else corpus_bleu(list(texts), [list(expected)]).score
    scorer = RougeScorer(["rougeL"])
    rouge = [
        1.0 if text == right else scorer.score(right, text)["rougeL"].fmeasure
        for text, right in zip(texts, expected, strict=True)
    ]
    return {"bleu": round(bleu, 3), "rouge_l": round(100 * sum(rouge) / len(rouge), 3)}


def write_report(figures: Mapping[str, Any], out: Path) -> None:
    """report.md, report.html (which needs no other file) and the plots."""
    from markdown_it import MarkdownIt

    text = markdown(figures, draw_all(figures, out))
    replace_text(out / "report.md", text)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r'src="(\w+\.png)"', lambda name: f'src="{_data(out / name[1])}"', body)
    title = f"<title>{html.escape(_title(figures))}</title>"
    head = f'<!doctype html>\n<meta charset="utf-8">{title}<style>{STYLE}</style>\n'
    replace_text(out / "report.html", head + body)


def _data(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


def cells(name: str, one: Mapping[str, Any]) -> list[str]:
    """A contestant's row under `COLUMNS`."""
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
        " ".join(f"{rate:.2f}" for rate in one["acceptance_per_depth"]) or "-",
        shown("tokens_per_second", "{:.1f}"),
        shown("speedup_over_plain", "{:.2f}"),
        shown("speedup_over_generate", "{:.2f}"),
        " ".join(shares) or "-",
        shown("cpu_ms_per_token", "{:.1f}"),
        shown("peak_memory_mb", "{:.0f}"),
        shown("cost_per_million_tokens", "{:.3f}"),
    ]


def table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs in one setting, for the terminal."""
    narrow = [place for place, column in enumerate(COLUMNS) if column in IN_TERMINAL]
    shown = Table(title=setting(runs[0]), title_justify="left")
    for column in ("suite", *(COLUMNS[place] for place in narrow)):
        shown.add_column(column, justify="left" if column in ("suite", "") else "right")
    for run in runs:
        for place, (name, one) in enumerate(run["contestants"].items()):
            row = cells(name, one)
            shown.add_row("" if place else run["suite"], *(row[column] for column in narrow))
        shown.add_section()
    return shown


def markdown(figures: Mapping[str, Any], pictures: Sequence[str]) -> str:
    """The report as text. pictures: what shows the plots."""
    runs, totals = figures["runs"], figures["totals"]
    parts = [f"# {_title(figures)}", _headline(figures)]
    for run in totals or runs[:1]:
        parts += [f"## {run['suite'].capitalize()}: {setting(run)}", _contestants(run)]
    parts += pictures
    if len(runs) > len(totals):
        parts += ["## Suite by suite"]
        for run in runs:
            sizes = f"{run['prompts']} prompts, {run['prompt_tokens']} tokens"
            parts += [f"### {run['suite']}: {setting(run)}, {sizes}", _contestants(run)]
    parts += ["## Answers that differ", _differences(runs)]
    parts += ["## The slow cases", _slow(figures), "## What did not run", _missing(runs)]
    return "\n\n".join([*parts, "## Conditions", _conditions(figures)]) + "\n"


def _title(figures: Mapping[str, Any]) -> str:
    where = next(iter(figures["conditions"].values()))
    return f"Speed of {Path(where['target']).name}, {figures['date']}"


def _headline(figures: Mapping[str, Any]) -> str:
    run = first_of(figures)
    ours = [(name, one) for name, one in working(run).items() if name in figures["trees"]]
    ours = [(name, one) for name, one in ours if "speedup_over_plain" in one]
    if not ours:
        return "There is no speed-up to tell of: see what did not run."
    name, best = max(ours, key=lambda pair: pair[1]["speedup_over_plain"])
    text = f"**{name} is {best['speedup_over_plain']:.2f} times as fast as plain decoding"
    if "speedup_over_generate" in best:
        text += f" and {best['speedup_over_generate']:.2f} times as fast as Hugging Face's generate"
    return (
        f"{text}. {best['identical']} of {best['compared']} answers are identical.** "
        f"({setting(run)}, {best['prompts']} prompts, {best['tokens']} tokens)"
    )


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in line) + " |" for line in lines
    )


def _contestants(run: Mapping[str, Any]) -> str:
    return _grid(COLUMNS, [cells(name, one) for name, one in run["contestants"].items()])


def _differences(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for run in runs:
        for name, one in working(run).items():
            likeness = [f"{one[key]:.1f}" if key in one else "-" for key in ("bleu", "rouge_l")]
            rows += [
                [name, run["suite"], setting(run), where["prompt"], str(where["place"]),
                 f"{where['margin']:.2g}", *likeness]
                for where in one["first_differences"]
            ]  # fmt: skip
    if not rows:
        return "None: every answer that was compared is the plain one, token for token."
    text = "Where an answer first leaves the plain one, and how far the two likeliest tokens lay "
    text += "apart there: at a margin near 0, rounding decides.\n\n"
    header = ("", "suite", "setting", "prompt", "token", "margin", "BLEU of the run", "ROUGE-L")
    return text + _grid(header, rows)


def _slow(figures: Mapping[str, Any]) -> str:
    """The batches with the lowest speed-up over plain decoding."""
    rows = []
    for run in figures["runs"]:
        for case in run["cases"]:
            took = case["took"]
            for name in figures["trees"]:
                if name in took and PLAIN in took:
                    tokens, seconds, rounds = took[name]
                    ratio = tokens / seconds / (took[PLAIN][0] / took[PLAIN][1])
                    shown = [name, run["suite"], setting(run), ", ".join(case["prompts"])]
                    shown += [f"{ratio:.2f}", f"{tokens / max(rounds, 1):.2f}", str(tokens)]
                    rows.append((ratio, shown))
    header = ("", "suite", "setting", "prompts", "x plain", "tokens/round", "tokens")
    return _grid(header, [shown for _, shown in sorted(rows)[:SLOWEST]])


def _missing(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in runs:
        place = f"{run['suite']}, {setting(run)}"
        lines += [f"- {name} ({place}): {why}" for name, why in run["left_out"].items()]
        failed = {name: one for name, one in run["contestants"].items() if "error" in one}
        lines += [f"- {name} ({place}) failed: {one['error']}" for name, one in failed.items()]
        if run["too_long"]:
            lines.append(f"- {run['too_long']} prompts of {place} are too long for the model.")
    return "\n".join(" ".join(line.split()) for line in lines) or "Everything ran."


def _conditions(figures: Mapping[str, Any]) -> str:
    where = figures["conditions"]
    keys = list(next(iter(where.values())))
    rows = [[key.replace("_", " "), *[str(one[key]) for one in where.values()]] for key in keys]
    share = [
        f"Plain decoding reaches {one['share_of_bandwidth']:.0%} of what the memory allows "
        f"({setting(run)})."
        for run in figures["totals"]
        for one in [run["contestants"].get(PLAIN, {})]
        if "share_of_bandwidth" in one
    ]
    note = (
        "Speeds are total tokens by total seconds, prompts included. Every batch is answered by "
        "all contestants in turn. What Hugging Face's runs guess is counted with the prompt's pass."
    )
    return "\n\n".join([_grid(["", *where], rows), *share, note, f"`{figures['command']}`"])
