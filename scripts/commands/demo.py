"""`headstart demo`: the whole main job on a real model, on a laptop.

The target answers prompts, a head is trained on the answers, both are fused, and held-out prompts
are decoded plainly, with the fresh head and with the shipped one. Every stage keeps what it made,
so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from headstart.model.target.load import load_target
from headstart.scripts.console import console, legend, say, show
from headstart.scripts.options.tree_budget import contestant

if TYPE_CHECKING:
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.target.target import Target

RECIPE = "demo"
DRAFT_VOCAB = 4096  # of the recipe
ANSWER_TOKENS = 80
ANSWER_SECONDS = 150  # no new batch of answers after that
SHOWN_PROMPT = "How does a bicycle stay upright? Give an example that a child would understand."


def demo(
    target: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; SmolLM2-135M if left out.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("outputs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Training prompts to answer.")] = 400,
    heldout: Annotated[int, typer.Option(min=1, help="Held-out prompts to compare on.")] = 12,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Tokens per compared answer.")] = 64,
) -> None:
    """Train, fuse and decode on a real model, in at most a quarter of an hour on two cores."""
    from headstart.model.checkpoint.fuse import fuse as write
    from headstart.model.checkpoint.head import is_fused
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    source = target or str(shipped_checkpoint())  # its root is the plain target
    opened = load_target(source)
    done = _Done.of(out, {"target": target_hash(opened), "prompts": prompts})
    say(f"[bold]target[/] {escape(source)}: {_size(opened)}, {opened.dtype}, {opened.device}")
    say("\n[bold]1. The target answers prompts[/] (what a head has to learn)")
    answers = _answers(opened, out, prompts, done)
    say("\n[bold]2. A head learns from the answers[/] (the target stays frozen)")
    head = _train(opened, target, answers, out, done)
    say("\n[bold]3. Target and head become one checkpoint[/]")
    fused = out / "fused"
    if not is_fused(fused):
        write(source, head, fused)
    show(f"{fused} opens as the plain model everywhere; the head is in {fused / 'draft_heads'}")
    say("\n[bold]4. Held-out prompts, decoded in turn[/]")
    contestants = _contestants(opened, fused, shipped=target is None)
    _compare(opened, contestants, out, heldout, max_new_tokens)
    say("\n[bold]5. One answer, with the tokens accepted per step[/]")
    _show(opened, list(contestants.values())[-1])
    longer = _overrides(opened, source, answers, out / "longer")
    say("\nTrain longer, from the same answers:")
    show("  " + shlex.join(["headstart", "train", RECIPE, *longer, "train.minutes=120"]))
    say("Answer your own prompts with the shipped head:")
    show('  headstart generate "Write a haiku about speed."')


class _Done:
    """Which stages of a demo are complete, in `demo.json`. A folder belongs to one demo."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self.facts = path, facts

    @staticmethod
    def of(out: Path, settings: dict[str, Any]) -> _Done:
        """ValueError when the folder holds a demo with other settings."""
        done = _Done(out / "demo.json", {**settings, "stages": []})
        if done.path.exists():
            before = json.loads(done.path.read_text(encoding="utf-8"))
            changed = [
                f"{key} was {before.get(key)}, is {value}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"{out} holds a demo with other settings ({'; '.join(changed)}). Choose "
                    "another --out, or remove the folder."
                )
            done.facts = before
        return done

    def __contains__(self, stage: str) -> bool:
        return stage in self.facts["stages"]

    def add(self, stage: str) -> None:
        self.facts["stages"].append(stage)
        self.save()

    def save(self) -> None:
        from headstart.model.checkpoint.atomic import replace_text

        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.facts, indent=2) + "\n")


def _size(target: Target) -> str:
    return f"{sum(one.numel() for one in target.model.parameters()) / 1e6:,.0f}M parameters"


def _answers(target: Target, out: Path, count: int, done: _Done) -> Path:
    from headstart.inference.config import SamplingParams
    from headstart.scripts.options.prompts import read_prompts, shipped_prompts

    from .generate_data import write_responses

    path = out / "answers.jsonl"
    if "answers" in done:
        show(f"already answered: {path}")
        return path
    done.save()
    found, _ = read_prompts([str(shipped_prompts("train"))])
    sampling = SamplingParams(ANSWER_TOKENS)
    records = write_responses(
        target, found[:count], sampling, path, batch_size=48, seconds=ANSWER_SECONDS
    )
    done.add("answers")
    show(f"{records} answers in {path}")
    return path


def _train(target: Target, name: str | None, answers: Path, out: Path, done: _Done) -> Path:
    from headstart.training.config.schema import load_recipe

    from .train import find_recipe, run_recipe

    output = out / "head"
    if "head" in done:
        show(f"already trained: {output / 'best'}")
        return output / "best"
    overrides = _overrides(target, name, answers, output)
    if (output / "state").exists():
        overrides.append("train.resume=true")
    try:
        best = run_recipe(load_recipe(find_recipe(RECIPE), overrides), target)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt from stop  # it says how `train` goes on; a demo is run again
    done.add("head")
    return best


def _overrides(target: Target, name: str | None, answers: Path, output: Path) -> list[str]:
    """What the recipe leaves open. name: None for the target that it names itself."""
    return [
        *([] if name is None else [f"target.name={json.dumps(name)}"]),
        f"data.path={json.dumps(str(answers))}",
        f"train.output={json.dumps(str(output))}",
        # A small vocabulary leaves nothing to leave out.
        *(["head.draft_vocab=null"] if target.vocab_size <= DRAFT_VOCAB else []),
    ]


def _contestants(target: Target, fused: Path, *, shipped: bool) -> dict[str, SpeculativeConfig]:
    from headstart.model.checkpoint.head import load_head
    from headstart.scripts.options.default_checkpoint import shipped_head

    heads = {"fresh head": fused} | ({"shipped head": shipped_head()} if shipped else {})
    return {name: contestant(target, load_head(folder, target)) for name, folder in heads.items()}


def _compare(
    target: Target,
    contestants: dict[str, SpeculativeConfig],
    out: Path,
    heldout: int,
    max_new_tokens: int,
) -> None:
    from .evaluate import compare, report

    results = compare(target, contestants, None, heldout, max_new_tokens)
    figures = report(target, contestants, results)
    path = out / "results.json"
    path.write_text(json.dumps(figures, indent=2) + "\n")
    show(f"{figures['conditions']['device']}; all figures in {path}")


def _show(target: Target, speculative: SpeculativeConfig) -> None:
    from headstart.inference.config import SamplingParams
    from headstart.inference.generate import SpeculativeModel
    from headstart.inference.rollout import prompt_ids

    from .generate import stream

    console.print(legend())
    say(f"[bold]> {SHOWN_PROMPT}[/]")
    ids = prompt_ids(target, [{"role": "user", "content": SHOWN_PROMPT}])
    assert speculative.head is not None
    model = SpeculativeModel(target, speculative.head)
    stream(model, ids, SamplingParams(160), speculative)
