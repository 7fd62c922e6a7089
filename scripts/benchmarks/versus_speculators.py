"""Training speed of an EAGLE-3 head in Headstart and in speculators, on the same hidden states.

    python -m headstart.scripts.benchmarks.versus_speculators RECIPE data.path=responses.jsonl \
        data.features=features --speculators-python OTHER/bin/python

Runs on a CPU. Both start from the same weights and train one epoch on the conversations of the
first `steps` batches; each tool batches them itself, with the same number of tokens per batch. Both
use KL, AdamW, the same precision and threads; embedding and LM head are frozen. Every run is a
process of its own. Each mode of speculators is tried once, and the fastest one alternates with
Headstart. Tokens are those of the conversations, without padding. The last line printed is JSON.

Legend: B batch rows, T positions, L stored layers (the LM head's input last), D hidden size.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.scripts.console import friendly, show
from headstart.scripts.options.environment import environment
from headstart.scripts.options.recipe import find_recipe, fresh_head, open_target

if TYPE_CHECKING:
    from torch import Tensor

    from headstart.model.heads import eagle3
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target
    from headstart.training.config.schema import Recipe
    from headstart.training.data.batching import Batch, Corpus
    from headstart.training.data.hidden_states import Features
    from headstart.training.reporting.metrics_log import Progress

WORKER = Path(__file__).with_name("speculators_worker.py")
MODES = "sdpa,eager,simple_flex_attention,sdpa+compile,eager+compile,simple_flex_attention+compile"
SPEED = "tokens_per_second"
SAME = ("loss.kind=kl", "train.optimizer=adamw", "train.save_every=0", "eval.prompts=null")
PRINT_VERSIONS = """
import json, platform, speculators
from importlib.metadata import version
names = ("speculators", "torch", "transformers")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""
# Per step: seconds, CPU seconds and conversations (rows); and the losses of the first batch.
Run = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """The inputs of both tools.

    metadata: for the report.
    counts: per conversation, its tokens and how many of them the loss covers.
    batches: the conversations of each of Headstart's batches.
    """

    metadata: dict[str, Any]
    counts: list[tuple[int, int]]
    batches: list[list[int]]


def versus_speculators(
    recipe: Annotated[
        str, typer.Argument(help="Recipe of an eagle3 head: YAML file or name of a shipped one.")
    ],
    speculators_python: Annotated[
        Path, typer.Option(help="Python of the environment that has speculators.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to override: section.key=value; data.features is required."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps per run.")] = 15,
    warm_up: Annotated[
        int, typer.Option(min=1, help="First steps of a run, which are not timed.")
    ] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each tool, alternating.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads (default: torch's).")
    ] = None,
    modes: Annotated[
        str, typer.Option(help="Modes of speculators to try: ATTENTION[+compile],...")
    ] = MODES,
) -> None:
    """Measure training tokens per second of both tools."""
    import torch

    from headstart.training.config.schema import load_recipe

    if steps <= warm_up:
        raise ValueError(f"All {steps} steps are warm-up (--warm-up {warm_up}). Raise --steps.")
    their_versions = versions(speculators_python)
    torch.set_num_threads(threads or torch.get_num_threads())
    # For the child processes.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as name:
        forced = [*SAME, f"train.steps={steps}", f"train.output={name}/ours"]
        resolved = load_recipe(find_recipe(recipe), [*(overrides or []), *forced])
        folder = Path(name, "theirs")
        prepared = prepare(resolved, folder)
        tried = {mode: try_mode(speculators_python, folder, mode) for mode in modes.split(",")}
        speeds = {
            mode: speed(run, prepared, warm_up)[SPEED]
            for mode, run in tried.items()
            if not isinstance(run, str)
        }
        show(f"speculators, tokens/s by mode: {speeds}")
        if not speeds:
            raise ValueError(f"speculators failed in every mode: {tried}.")
        mode = max(speeds, key=lambda one: speeds[one])
        turns = []
        for turn in range(runs):
            ours = run_ours(resolved, prepared, turn)
            turns.append((ours, run_theirs(speculators_python, folder, mode)))
            pair = [round(speed(run, prepared, warm_up)[SPEED]) for run in turns[-1]]
            show(f"turn {turn + 1}: Headstart {pair[0]}, speculators {pair[1]} tokens/s")
    failed = {mode: run for mode, run in tried.items() if isinstance(run, str)}
    theirs = {"speculators": their_versions, "modes": speeds | failed, "mode": mode}
    measured = summary(turns, prepared, warm_up)
    print(json.dumps({**prepared.metadata, **theirs, "measured": measured}))


def versions(python: Path) -> dict[str, str]:
    """Versions of speculators and its dependencies. Raises ValueError if it is not installed."""
    try:
        command = [str(python), "-c", PRINT_VERSIONS]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_clean_env())
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ValueError(
            f"speculators cannot be imported in {python} ({lines[-1]}). Create an environment for "
            "it (`python -m venv OTHER`, `OTHER/bin/pip install speculators==0.9.0`) and give "
            "--speculators-python OTHER/bin/python."
        ) from error
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _clean_env() -> dict[str, str]:
    """The environment variables without the path to this project."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def prepare(recipe: Recipe, folder: Path) -> Prepared:
    """Write the worker's inputs to the folder. Raises ValueError for other kinds of recipes."""
    from headstart.training.data.batching import Batches
    from headstart.training.data.conversations import read_conversations
    from headstart.training.data.hidden_states import open_features
    from headstart.training.optim.precision import resolve_precision

    if recipe.data.features is None or recipe.head.kind != "eagle3":
        raise ValueError(
            "The comparison needs an eagle3 head and cached hidden states: create them with "
            "`headstart features` and set data.features to their folder."
        )
    target = open_target(recipe)
    data = read_conversations(recipe.data, target, recipe.train.seed)
    head = starting_head(recipe, target, data.train)
    features = open_features(recipe, data, target, head)
    assert features is not None
    plan = Batches(data.train.lengths, recipe.data.global_batch_tokens, recipe.train.seed)
    steps = recipe.train.steps or 0
    if plan.count(1) < steps:
        raise ValueError(f"The data has {plan.count(1)} batches, not {steps}. Lower --steps.")
    wanted = [plan.at(place) for place in range(steps)]
    conversations = [data.train.batch([row]) for batch in wanted for row in batch]
    numbers = iter(range(len(conversations)))
    batches = [[next(numbers) for _ in batch] for batch in wanted]
    settings = head_settings(head) | {
        "ttt_steps": recipe.loss.steps,
        "step_decay": recipe.loss.step_decay,
        "lr": recipe.train.lr,
        "weight_decay": recipe.train.weight_decay,
        "batch_tokens": recipe.data.global_batch_tokens,
        "precision": resolve_precision(recipe, target).train.precision,
    }
    metadata = {
        **environment(target),
        **settings,
        "conversations": len(conversations),
        "steps": steps,
    }
    write_head(folder, head)
    write_conversations(folder / "data", conversations, features, target, head.taps)
    target.model.save_pretrained(folder / "verifier")
    own = {"threads": metadata["threads"], "first_batch": batches[0]}
    (folder / "settings.json").write_text(json.dumps(settings | own), encoding="utf-8")
    return Prepared(metadata, [counted(one) for one in conversations], batches)


def starting_head(recipe: Recipe, target: Target, corpus: Corpus) -> eagle3.Head:
    """The initial head of every run. Raises ValueError if speculators does not support it."""
    from headstart.model.checkpoint.engine_support import support
    from headstart.model.heads import eagle3
    from headstart.training.build import choose_draft_vocab

    head = fresh_head(recipe, target)
    choose_draft_vocab(head, corpus)
    reason = support(head, "vllm")
    if reason:
        raise ValueError(f"speculators does not support this head: {reason}.")
    assert isinstance(head, eagle3.Head)
    return head


def head_settings(head: eagle3.Head) -> dict[str, Any]:
    layer = head.config.layer.model_dump(exclude={"qk_norm"})  # type: ignore[attr-defined]
    return {
        "layer": layer | {"vocab_size": head.config.vocab_size, "hidden_act": "silu"},
        "taps": list(head.taps),
        "draft_vocab": head.config.draft_vocab or head.config.vocab_size,
        "fc_norm": len(head.fc_norm) > 0,
        "norm_output": head.norm_output,
    }


def write_head(folder: Path, head: DraftHead) -> None:
    """Write the initial weights and the draft vocabulary under the names of speculators."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {
        name.replace("midlayer.", "layers.0."): value.contiguous()
        for name, value in head.state_dict().items()
    }
    if head.draft_ids is not None:
        tensors["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        tensors["t2d"][head.draft_ids] = True
    save_file(tensors, folder / "head.safetensors")


def write_conversations(
    folder: Path,
    conversations: list[Batch],
    features: Features,
    target: Target,
    taps: tuple[int, ...],
) -> None:
    """Write a data set of tokens and loss masks, and one file of hidden states per conversation."""
    import torch
    from datasets import Dataset
    from safetensors.torch import save_file

    from headstart.model.heads.common.borrow import copy_final_norm
    from headstart.training.data.hidden_states import target_output

    scale_D = torch.ones(target.hidden_size)
    copy_final_norm(target, scale_D)
    (folder / "hidden_states").mkdir(parents=True)
    rows = []
    for number, batch in enumerate(conversations):
        length = int(batch.lengths_B)
        tokens_T, mask_T = batch.tokens_BT[0, :length], batch.loss_mask_BT[0, :length]
        output = target_output(features.read(batch, target.dtype), features.index.layers)
        values_LTD = torch.cat(
            [*(output.hidden_states[tap] for tap in taps), output.lm_head_input_BTD]
        )[:, :length]
        tensors = {"hidden_states": their_layout(values_LTD, scale_D), "token_ids": tokens_T}
        save_file(tensors, folder / "hidden_states" / f"hs_{number}.safetensors")
        lists = {"input_ids": tokens_T.tolist(), "loss_mask": their_mask(mask_T).tolist()}
        rows.append({**lists, "seq_len": length})
    Dataset.from_list(rows).with_format("torch").save_to_disk(folder)


def their_layout(values_LTD: Tensor, scale_D: Tensor) -> Tensor:
    """Convert hidden states to speculators' layout.

    speculators applies the target's final norm itself, so its scale is divided out here. The
    quotient has root mean square 1, so a second norm changes nothing but rounding.

    scale_D: the weight of the final norm.
    Returns T x L x D.
    """
    import torch

    if not bool(scale_D.all()):
        raise ValueError(
            "The target's final norm has zeros in its weight, so it cannot be inverted."
        )
    unscaled_TD = (values_LTD[-1].float() / scale_D).to(values_LTD.dtype)
    return torch.cat([values_LTD[:-1], unscaled_TD[None]]).transpose(0, 1).contiguous()


def their_mask(mask_T: Tensor) -> Tensor:
    """Shift a loss mask: Headstart's marks predicted tokens, speculators' the positions before."""
    return mask_T.roll(-1).index_fill(0, mask_T.new_tensor([-1]).long(), False)


def counted(batch: Batch) -> tuple[int, int]:
    """Tokens of a batch, and how many of them the loss covers."""
    from headstart.training.objective.losses import valid_steps

    return int(batch.lengths_B.sum()), int(valid_steps(batch, 1).sum())


def try_mode(python: Path, folder: Path, mode: str) -> Run | str:
    """A first run of speculators in a mode, or why it failed."""
    try:
        return run_theirs(python, folder, mode)
    except ChildProcessError as error:
        return str(error)


def run_theirs(python: Path, folder: Path, mode: str) -> Run:
    """Run speculators. Raises ChildProcessError with the last line of its output if it fails."""
    command = [str(python), str(WORKER), str(folder), *mode.split("+")]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean_env())
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1][:300])
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def run_ours(recipe: Recipe, prepared: Prepared, turn: int) -> Run:
    """Run Headstart in a process of its own."""
    config = recipe.train.model_copy(update={"output": f"{recipe.train.output}_{turn}"})
    recipe = recipe.model_copy(update={"train": config})
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        run = process.submit(_ours, recipe, prepared.metadata["threads"]).result()
    return {**run, "rows": prepared.batches}


def _ours(recipe: Recipe, threads: int) -> Run:
    import torch

    from headstart.training.trainer import train

    torch.set_num_threads(threads)
    target = open_target(recipe)
    head = fresh_head(recipe, target)
    times: list[tuple[float, float]] = []
    metrics: list[dict[str, float]] = []

    def log(at: Progress) -> None:
        if at.kind == "note" and not metrics:
            times[:] = [(time.perf_counter(), time.process_time())]
        if at.kind == "train":
            times.append((time.perf_counter(), time.process_time()))
            metrics.append(dict(at.metrics))

    train(recipe, target=target, head=head, log=log)
    walls, cpus = (torch.tensor(kind, dtype=torch.float64) for kind in zip(*times, strict=True))
    losses = [metrics[0][f"loss_{step + 1}"] for step in range(recipe.loss.steps)]
    passed = {"seconds": walls.diff().tolist(), "cpu_seconds": cpus.diff().tolist()}
    return {**passed, "first_losses": losses}


def speed(run: Run, prepared: Prepared, warm_up: int) -> dict[str, float]:
    """Tokens, predicted tokens and tokens per CPU second, after the warm-up."""
    rows = [row for step in run["rows"][warm_up:] for row in step]
    tokens, predicted = (sum(prepared.counts[row][kind] for row in rows) for kind in (0, 1))
    seconds, cpu = sum(run["seconds"][warm_up:]), sum(run["cpu_seconds"][warm_up:])
    return {
        "tokens_per_second": tokens / seconds,
        "predicted_per_second": predicted / seconds,
        "tokens_per_cpu_second": tokens / cpu,
    }


def summary(turns: list[tuple[Run, Run]], prepared: Prepared, warm_up: int) -> dict[str, Any]:
    """Metrics of all runs, their medians, and Headstart's over speculators'."""
    report: dict[str, Any] = {"timed_steps": {}, "first_losses": {}}
    medians: list[dict[str, float]] = []
    for name, runs in zip(("headstart", "speculators"), zip(*turns, strict=True), strict=True):
        speeds = [speed(run, prepared, warm_up) for run in runs]
        medians.append({kind: median(one[kind] for one in speeds) for kind in speeds[0]})
        report[name] = {"runs": speeds, "median": medians[-1]}
        report["timed_steps"][name] = len(runs[0]["seconds"]) - warm_up
        report["first_losses"][name] = runs[0]["first_losses"]
    ours, theirs = medians
    return report | {"ratio": {kind: ours[kind] / theirs[kind] for kind in ours}}


if __name__ == "__main__":
    typer.run(friendly(versus_speculators))
