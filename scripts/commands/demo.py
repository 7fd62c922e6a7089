"""`headstart demo`: the whole workflow on a real model, on a laptop.

The target generates responses to prompts, a head is trained on them, both are fused, and held-out
prompts are decoded autoregressively, with the new head and with the shipped one. Every stage keeps
its result, so an interrupted demo resumes where it stopped.
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

if TYPE_CHECKING:
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.target.target import Target

RECIPE = "demo"
DRAFT_VOCAB = 4096  # of the recipe
RESPONSE_TOKENS = 80
RESPONSE_SECONDS = 150  # no new batch of responses after that
SHOWN_PROMPT = "How does a bicycle stay upright? Give an example that a child would understand."


def demo(
    target: Annotated[
        str | None,
        typer.Option(help="Target: Hub id, folder or .gguf file (default: SmolLM2-135M)."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for all results.")] = Path("outputs/demo"),
    prompts: Annotated[int, typer.Option(min=8, help="Number of training prompts.")] = 400,
    heldout: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = 12,
    max_new_tokens: Annotated[
        int, typer.Option(min=8, help="Maximum new tokens per held-out prompt.")
    ] = 64,
) -> None:
    """Train, fuse and decode on a real model, in at most a quarter of an hour on two cores."""
    from headstart.model.checkpoint.fuse import fuse as write
    from headstart.model.checkpoint.fused import is_fused
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.default_checkpoint import shipped_checkpoint

    source = target or str(shipped_checkpoint())  # its root is the plain target
    opened = load_target(source)
    stages = _Stages.open(out, {"target": target_hash(opened), "prompts": prompts})
    say(f"[bold]target[/] {escape(source)}: {_size(opened)}, {opened.dtype}, {opened.device}")
    say("\n[bold]1. Generate the target's responses to prompts[/] (on-policy training data)")
    responses = _generate_responses(opened, out, prompts, stages)
    say("\n[bold]2. Train a head on the responses[/] (the target stays frozen)")
    head = _train(opened, target, responses, out, stages)
    say("\n[bold]3. Fuse target and head into one checkpoint[/]")
    fused = out / "fused"
    if not is_fused(fused):
        write(source, head, fused)
    show(f"{fused} opens as the plain model everywhere; the head is in {fused / 'draft_heads'}")
    say("\n[bold]4. Decode held-out prompts, in turn[/]")
    configs = _configs(opened, fused, shipped=target is None)
    _compare(opened, configs, out, heldout, max_new_tokens)
    say("\n[bold]5. One response, coloured by tokens per decode step[/]")
    _show_response(opened, list(configs.values())[-1])
    longer = _overrides(opened, source, responses, out / "longer")
    say("\nTrain longer, on the same responses:")
    show("  " + shlex.join(["headstart", "train", RECIPE, *longer, "train.minutes=120"]))
    say("Try your own prompts with the shipped head:")
    show('  headstart generate "Write a haiku about speed."')


class _Stages:
    """The completed stages of a demo, in `demo.json`. A folder belongs to one demo."""

    def __init__(self, path: Path, state: dict[str, Any]):
        self.path, self.state = path, state

    @staticmethod
    def open(out: Path, settings: dict[str, Any]) -> _Stages:
        """Raises ValueError if the folder has a demo with other settings."""
        stages = _Stages(out / "demo.json", {**settings, "stages": []})
        if stages.path.exists():
            before = json.loads(stages.path.read_text(encoding="utf-8"))
            changed = [
                f"{key} was {before.get(key)}, is {value}"
                for key, value in settings.items()
                if before.get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"{out} has a demo with other settings ({'; '.join(changed)}). Choose another "
                    "--out, or remove the folder."
                )
            stages.state = before
        return stages

    def __contains__(self, stage: str) -> bool:
        return stage in self.state["stages"]

    def add(self, stage: str) -> None:
        self.state["stages"].append(stage)
        self.save()

    def save(self) -> None:
        from headstart.model.checkpoint.atomic import replace_text

        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(self.state, indent=2) + "\n")


def _size(target: Target) -> str:
    return f"{sum(one.numel() for one in target.model.parameters()) / 1e6:,.0f}M parameters"


def _generate_responses(target: Target, out: Path, count: int, stages: _Stages) -> Path:
    from headstart.inference.config import SamplingParams
    from headstart.scripts.commands.generate_data import write_responses
    from headstart.scripts.options.prompts import read_prompts, shipped_prompts

    path = out / "responses.jsonl"
    if "responses" in stages:
        show(f"already generated: {path}")
        return path
    stages.save()
    prompts, _ = read_prompts([str(shipped_prompts("train"))])
    count = write_responses(
        target,
        prompts[:count],
        SamplingParams(RESPONSE_TOKENS),
        path,
        batch_size=48,
        seconds=RESPONSE_SECONDS,
    )
    stages.add("responses")
    show(f"{count} responses in {path}")
    return path


def _train(target: Target, name: str | None, responses: Path, out: Path, stages: _Stages) -> Path:
    from headstart.scripts.options.recipe import find_recipe, run_recipe
    from headstart.training.config.schema import load_recipe

    output = out / "head"
    if "head" in stages:
        show(f"already trained: {output / 'best'}")
        return output / "best"
    overrides = _overrides(target, name, responses, output)
    if (output / "state").exists():
        overrides.append("train.resume=true")
    try:
        best = run_recipe(load_recipe(find_recipe(RECIPE), overrides), target)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt from stop  # it says how `train` resumes; a demo is run again
    stages.add("head")
    return best


def _overrides(target: Target, name: str | None, responses: Path, output: Path) -> list[str]:
    """The settings that the recipe leaves open. name: None for the recipe's own target."""
    return [
        *([] if name is None else [f"target.name={json.dumps(name)}"]),
        f"data.path={json.dumps(str(responses))}",
        f"train.output={json.dumps(str(output))}",
        # A small vocabulary needs no draft vocabulary.
        *(["head.draft_vocab=null"] if target.vocab_size <= DRAFT_VOCAB else []),
    ]


def _configs(target: Target, fused: Path, *, shipped: bool) -> dict[str, SpeculativeConfig]:
    from headstart.model.checkpoint.head import load_head
    from headstart.scripts.options.default_checkpoint import shipped_head
    from headstart.scripts.options.tree_budget import speculative_config

    heads = {"new head": fused} | ({"shipped head": shipped_head()} if shipped else {})
    return {
        name: speculative_config(target, load_head(folder, target))
        for name, folder in heads.items()
    }


def _compare(
    target: Target,
    configs: dict[str, SpeculativeConfig],
    out: Path,
    heldout: int,
    max_new_tokens: int,
) -> None:
    from headstart.scripts.options.comparison import compare, first_turn_cases, show_comparison
    from headstart.scripts.options.prompts import decodable

    cases = first_turn_cases(target, decodable("heldout", heldout, target))
    report = compare(target, configs, cases, max_new_tokens)
    show_comparison(report)
    path = out / "results.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    show(f"{report['environment']['device']}; all metrics in {path}")


def _show_response(target: Target, speculative: SpeculativeConfig) -> None:
    from headstart.inference.config import SamplingParams
    from headstart.inference.generate import SpeculativeModel
    from headstart.inference.rollout import prompt_ids
    from headstart.scripts.commands.generate import stream

    console.print(legend())
    say(f"[bold]> {SHOWN_PROMPT}[/]")
    ids = prompt_ids(target, [{"role": "user", "content": SHOWN_PROMPT}])
    assert speculative.head is not None
    model = SpeculativeModel(target, speculative.head)
    stream(model, ids, SamplingParams(160), speculative)
