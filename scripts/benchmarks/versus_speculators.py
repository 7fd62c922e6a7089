"""How fast an EAGLE-3 head trains here, and with speculators, from the same stored features.

    python -m headstart.scripts.benchmarks.versus_speculators RECIPE data.path=answers.jsonl \
        data.features=features --speculators-python OTHER/bin/python

On a CPU. Both start from the same weights and pass once over the same conversations, those of the
first `steps` batches; each tool batches them in its own way under the same budget of tokens. KL,
AdamW, the same precision and threads; embedding and LM head frozen. Every run is a process of its
own. Each way to run speculators is tried once, and its fastest takes turns with ours. Tokens are
those of the conversations, without padding. The last line is JSON.

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

from headstart.scripts.commands.evaluate import conditions
from headstart.scripts.commands.train import find_recipe, fresh_head, open_target
from headstart.scripts.console import friendly, show

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
WAYS = "sdpa,eager,simple_flex_attention,sdpa+compile,eager+compile,simple_flex_attention+compile"
SPEED = "tokens_per_second"
SAME = ("loss.kind=kl", "train.optimizer=adamw", "train.save_every=0", "eval.prompts=null")
ASK = """
import json, platform, speculators
from importlib.metadata import version
names = ("speculators", "torch", "transformers")
print(json.dumps({"python": platform.python_version(), **{name: version(name) for name in names}}))
"""
# Of every step seconds, seconds of the CPU and conversations (rows); and first_losses.
Run = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What is compared: facts for the report; of each conversation its tokens and how many of them
    are to be predicted; which conversations our batches hold."""

    facts: dict[str, Any]
    counts: list[tuple[int, int]]
    batches: list[list[int]]


def against_speculators(
    recipe: Annotated[str, typer.Argument(help="Of an eagle3 head.")],
    speculators_python: Annotated[Path, typer.Option(help="Where speculators is installed.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change; data.features is needed.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Of a run.")] = 15,
    warm_up: Annotated[int, typer.Option(min=1, help="First steps, which do not count.")] = 3,
    runs: Annotated[int, typer.Option(min=1, help="Of each, in turns.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="torch's own choice if none.")] = None,
    ways: Annotated[str, typer.Option(help="To run speculators: ATTENTION[+compile],...")] = WAYS,
) -> None:
    """Measure tokens per second of both."""
    import torch

    from headstart.training.config.schema import load_recipe

    if steps <= warm_up:
        raise ValueError(f"Of {steps} steps {warm_up} warm up: none is left. Raise --steps.")
    theirs_is = versions(speculators_python)
    torch.set_num_threads(threads or torch.get_num_threads())
    # For the processes that are started.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory() as name:
        forced = [*SAME, f"train.steps={steps}", f"train.output={name}/ours"]
        resolved = load_recipe(find_recipe(recipe), [*(overrides or []), *forced])
        folder = Path(name, "theirs")
        prepared = prepare(resolved, folder)
        tried = {way: try_way(speculators_python, folder, way) for way in ways.split(",")}
        speeds = {
            way: speed(run, prepared, warm_up)[SPEED]
            for way, run in tried.items()
            if not isinstance(run, str)
        }
        show(f"speculators by way to run it: {speeds}")
        if not speeds:
            raise ValueError(f"speculators trained in none of these ways: {tried}.")
        way = max(speeds, key=lambda one: speeds[one])
        turns = []
        for turn in range(runs):
            ours = run_ours(resolved, prepared, turn)
            turns.append((ours, run_theirs(speculators_python, folder, way)))
            pair = [round(speed(run, prepared, warm_up)[SPEED]) for run in turns[-1]]
            show(f"turn {turn + 1}: Headstart {pair[0]}, speculators {pair[1]} tokens/s")
    failed = {way: run for way, run in tried.items() if isinstance(run, str)}
    theirs = {"beside": theirs_is, "ways": speeds | failed, "way": way}
    measured = summary(turns, prepared, warm_up)
    print(json.dumps({**prepared.facts, **theirs, "measured": measured}))


def versions(python: Path) -> dict[str, str]:
    """Of speculators and what it stands on. ValueError where it is not installed."""
    try:
        command = [str(python), "-c", ASK]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=_alone())
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise ValueError(
            f"speculators cannot be imported in {python} ({lines[-1]}). Make an environment for it "
            "(`python -m venv OTHER`, `OTHER/bin/pip install speculators==0.9.0`) and give "
            "--speculators-python OTHER/bin/python."
        ) from error
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def _alone() -> dict[str, str]:
    """The environment, without the paths of our own modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def prepare(recipe: Recipe, folder: Path) -> Prepared:
    """Write what the worker reads into the folder. ValueError for what cannot be compared."""
    from headstart.training.data.batching import Batches
    from headstart.training.data.conversations import read_conversations
    from headstart.training.data.hidden_states import open_features
    from headstart.training.optim.precision import resolve_precision

    if recipe.data.features is None or recipe.head.kind != "eagle3":
        raise ValueError(
            "Training from stored features of an eagle3 head is compared: make them with "
            "`headstart features` and name their folder with data.features."
        )
    target = open_target(recipe)
    data = read_conversations(recipe.data, target, recipe.train.seed)
    head = starting_head(recipe, target, data.train)
    features = open_features(recipe, data, target, head)
    assert features is not None
    plan = Batches(data.train.lengths, recipe.data.global_batch_tokens, recipe.train.seed)
    steps = recipe.train.steps or 0
    if plan.count(1) < steps:
        raise ValueError(f"The data hold {plan.count(1)} batches, not {steps}. Lower --steps.")
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
    facts = {**conditions(target), **settings, "conversations": len(conversations), "steps": steps}
    write_head(folder, head)
    write_conversations(folder / "data", conversations, features, target, head.taps)
    target.model.save_pretrained(folder / "verifier")
    own = {"threads": facts["threads"], "first_batch": batches[0]}
    (folder / "settings.json").write_text(json.dumps(settings | own), encoding="utf-8")
    return Prepared(facts, [counted(one) for one in conversations], batches)


def starting_head(recipe: Recipe, target: Target, corpus: Corpus) -> eagle3.Head:
    """The head that every run of ours starts from. ValueError where speculators has no such one."""
    from headstart.model.checkpoint.engine_config import unservable
    from headstart.model.heads import eagle3
    from headstart.training.build import choose_draft_vocab

    head = fresh_head(recipe, target)
    choose_draft_vocab(head, corpus)
    trouble = unservable(head)
    if trouble:
        raise ValueError(f"speculators has no such head, like other tools: {trouble}.")
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
    """The weights to start from, and the draft vocabulary, under the names of speculators."""
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
    """A data set of tokens and masks, and beside it one file of features per conversation."""
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
        seen = target_output(features.read(batch, target.dtype), features.index.layers)
        values_LTD = torch.cat(
            [*(seen.hidden_states[tap] for tap in taps), seen.lm_head_input_BTD]
        )[:, :length]
        tensors = {"hidden_states": their_layout(values_LTD, scale_D), "token_ids": tokens_T}
        save_file(tensors, folder / "hidden_states" / f"hs_{number}.safetensors")
        lists = {"input_ids": tokens_T.tolist(), "loss_mask": their_mask(mask_T).tolist()}
        rows.append({**lists, "seq_len": length})
    Dataset.from_list(rows).with_format("torch").save_to_disk(folder)


def their_layout(values_LTD: Tensor, scale_D: Tensor) -> Tensor:
    """T x L x D, with the target's final norm taken back: speculators applies it itself.

    What is left has the root mean square 1, so norming it again gives the same, up to rounding.
    scale_D: what that norm multiplies with.
    """
    import torch

    if not bool(scale_D.all()):
        raise ValueError("The target's final norm multiplies with zeros: it cannot be taken back.")
    plain_TD = (values_LTD[-1].float() / scale_D).to(values_LTD.dtype)
    return torch.cat([values_LTD[:-1], plain_TD[None]]).transpose(0, 1).contiguous()


def their_mask(mask_T: Tensor) -> Tensor:
    """Ours marks tokens that are to be predicted, theirs the places that they are predicted at."""
    return mask_T.roll(-1).index_fill(0, mask_T.new_tensor([-1]).long(), False)


def counted(batch: Batch) -> tuple[int, int]:
    """Tokens of a batch, and how many of them are to be predicted."""
    from headstart.training.objective.losses import valid_steps

    return int(batch.lengths_B.sum()), int(valid_steps(batch, 1).sum())


def try_way(python: Path, folder: Path, way: str) -> Run | str:
    """A first run of speculators, or why it does not run so."""
    try:
        return run_theirs(python, folder, way)
    except ChildProcessError as error:
        return str(error)


def run_theirs(python: Path, folder: Path, way: str) -> Run:
    """ChildProcessError with the last line that the process wrote, where it fails."""
    command = [str(python), str(WORKER), str(folder), *way.split("+")]
    done = subprocess.run(command, capture_output=True, text=True, env=_alone())
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1][:300])
    run: Run = json.loads(done.stdout.splitlines()[-1])
    return run


def run_ours(recipe: Recipe, prepared: Prepared, turn: int) -> Run:
    config = recipe.train.model_copy(update={"output": f"{recipe.train.output}_{turn}"})
    recipe = recipe.model_copy(update={"train": config})
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        run = process.submit(_ours, recipe, prepared.facts["threads"]).result()
    return {**run, "rows": prepared.batches}


def _ours(recipe: Recipe, threads: int) -> Run:
    """In a process of its own."""
    import torch

    from headstart.training.trainer import train

    torch.set_num_threads(threads)
    target = open_target(recipe)
    head = fresh_head(recipe, target)
    times: list[tuple[float, float]] = []
    figures: list[dict[str, float]] = []

    def log(at: Progress) -> None:
        if at.kind == "note" and not figures:
            times[:] = [(time.perf_counter(), time.process_time())]
        if at.kind == "train":
            times.append((time.perf_counter(), time.process_time()))
            figures.append(dict(at.metrics))

    train(recipe, target=target, head=head, log=log)
    walls, cpus = (torch.tensor(kind, dtype=torch.float64) for kind in zip(*times, strict=True))
    losses = [figures[0][f"loss_{step + 1}"] for step in range(recipe.loss.steps)]
    passed = {"seconds": walls.diff().tolist(), "cpu_seconds": cpus.diff().tolist()}
    return {**passed, "first_losses": losses}


def speed(run: Run, prepared: Prepared, warm_up: int) -> dict[str, float]:
    """Behind the first steps: tokens per second, those to be predicted, tokens per CPU second."""
    rows = [row for step in run["rows"][warm_up:] for row in step]
    tokens, predicted = (sum(prepared.counts[row][kind] for row in rows) for kind in (0, 1))
    seconds, cpu = sum(run["seconds"][warm_up:]), sum(run["cpu_seconds"][warm_up:])
    return {
        "tokens_per_second": tokens / seconds,
        "predicted_per_second": predicted / seconds,
        "tokens_per_cpu_second": tokens / cpu,
    }


def summary(turns: list[tuple[Run, Run]], prepared: Prepared, warm_up: int) -> dict[str, Any]:
    """Figures of all turns, their medians, and ours over theirs."""
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
    typer.run(friendly(against_speculators))
