"""`headstart demo`: the whole main job on a real model, on a laptop.

The target answers prompts, a head is trained on the answers, both are fused, and held-out prompts
are decoded plainly, with the fresh head and with the shipped one. Every stage keeps what it made,
so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .ui import console, legend, say

if TYPE_CHECKING:
    from headstart.inference.measure import Contestant
    from headstart.model.target import Target

RECIPE = "demo"
DRAFT_VOCAB = 4096  # of the recipe
ANSWER_TOKENS = 128
SHOWN_PROMPT = "Explain why the sky is blue, and give an example that a child would understand."


def demo(
    target: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; SmolLM2-135M if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("outputs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Training prompts to answer.")] = 440,
    heldout: Annotated[int, typer.Option(min=1, help="Held-out prompts to compare on.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens per compared answer.")] = 96,
) -> None:
    """Train, fuse and decode on a real model, in at most a quarter of an hour on two cores."""
    from headstart.model.fused import fuse as write
    from headstart.model.fused import is_fused
    from headstart.model.target import Target

    from .shipped import shipped_checkpoint

    source = target or str(shipped_checkpoint())  # its root is the plain target
    opened = Target.load(source)
    say(f"[bold]target[/] {source}: {_size(opened)}, {opened.dtype}, {opened.device}")
    say("\n[bold]1. The target answers prompts[/] (what a head has to learn)")
    answers = _answers(opened, out, prompts)
    say("\n[bold]2. A head learns from the answers[/] (the target stays frozen)")
    head = _train(opened, source, answers, out)
    say("\n[bold]3. Target and head become one checkpoint[/]")
    fused = out / "fused"
    if not is_fused(fused):
        write(source, head, fused)
    say(f"{fused} opens as the plain model everywhere; the head is in {fused / 'draft_heads'}")
    say("\n[bold]4. Held-out prompts, decoded in turn[/]")
    contestants = _contestants(opened, fused, shipped=target is None)
    _compare(opened, contestants, out, heldout, max_new_tokens)
    say("\n[bold]5. One answer, with the tokens accepted per step[/]")
    _show(opened, list(contestants.values())[-1])
    say(
        "\nTrain longer, from the same answers:\n"
        f"  headstart train {RECIPE} target.name={source} data.path={answers} "
        f"train.output={out / 'longer'} train.epochs=20\n"
        "Answer your own prompts with the shipped head:\n"
        '  headstart generate "Write a haiku about speed."'
    )


def _size(target: Target) -> str:
    return f"{sum(one.numel() for one in target.model.parameters()) / 1e6:,.0f}M parameters"


def _answers(target: Target, out: Path, count: int) -> Path:
    from headstart.inference.answer import AnswerSettings

    from .data import write_answers
    from .prompts import read_prompts, shipped_prompts

    found, _ = read_prompts([str(shipped_prompts("train"))])
    path = out / "answers.jsonl"
    settings = AnswerSettings(max_new_tokens=ANSWER_TOKENS)
    records = write_answers(target, found[:count], settings, path, batch_size=32)
    say(f"{records} answers in {path}")
    return path


def _train(target: Target, source: str, answers: Path, out: Path) -> Path:
    from headstart.training.recipe import load_recipe

    from .prompts import shipped_prompts
    from .train import find_recipe, run_recipe

    output = out / "head"
    done = output / "finished"
    if done.exists():
        say(f"already trained: {output / 'best'}")
        return output / "best"
    overrides = [
        f"target.name={json.dumps(source)}",
        f"data.path={json.dumps(str(answers))}",
        f"train.output={json.dumps(str(output))}",
        f"eval.prompts={json.dumps(str(shipped_prompts('heldout')))}",
    ]
    if target.vocab_size <= DRAFT_VOCAB:  # nothing to leave out
        overrides.append("head.draft_vocab=null")
    if (output / "state").exists():
        overrides.append("train.resume=true")
    best = run_recipe(load_recipe(find_recipe(RECIPE), overrides), target)
    done.touch()
    return best


def _contestants(target: Target, fused: Path, *, shipped: bool) -> dict[str, Contestant]:
    from headstart.inference.measure import Contestant
    from headstart.model.fused import load_head

    from .shipped import shipped_head

    heads = {"fresh head": fused} | ({"shipped head": shipped_head()} if shipped else {})
    return {name: Contestant(load_head(folder, target)) for name, folder in heads.items()}


def _compare(
    target: Target,
    contestants: dict[str, Contestant],
    out: Path,
    heldout: int,
    max_new_tokens: int,
) -> None:
    from .evaluate import compare, report

    results = compare(target, contestants, None, heldout, max_new_tokens)
    figures = report(target, contestants, results)
    path = out / "results.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    say(f"[dim]{figures['conditions']['device']}; all figures in {path}[/]")


def _show(target: Target, contestant: Contestant) -> None:
    from headstart.inference.answer import prompt_ids
    from headstart.inference.generate import SpeculativeModel

    from .generate import stream

    console.print(legend())
    say(f"[bold]> {SHOWN_PROMPT}[/]")
    ids = prompt_ids(target, [{"role": "user", "content": SHOWN_PROMPT}])
    model = SpeculativeModel(target, contestant.head)
    stream(model, ids, max_new_tokens=160, tree=contestant.shape)
