"""`headstart train`: train a draft head as a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .ui import progress, say, show

if TYPE_CHECKING:
    from headstart.model.head import DraftHead
    from headstart.model.target import Target
    from headstart.training.recipe import EvalConfig, Recipe
    from headstart.training.report import Progress


def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change: key.sub=value.")
    ] = None,
    explain: Annotated[bool, typer.Option(help="Print the resolved recipe and stop.")] = False,
) -> None:
    """Train a head; Ctrl-C saves, and train.resume=true goes on."""
    from headstart.training import recipe as recipes

    resolved = recipes.load_recipe(find_recipe(recipe), overrides or [])
    if explain:
        show(recipes.explain(resolved))
        return
    run_recipe(resolved)


def find_recipe(name: str) -> Path:
    """A recipe file: as given, or one that is shipped."""
    folder = Path(str(resources.files("headstart.configs")))
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"There is no recipe {name!r}. Give a YAML file, or one of: {shipped}.")


def run_recipe(recipe: Recipe, target: Target | None = None) -> Path:
    """Train as the recipe says, showing progress; the folder of the best head."""
    from headstart.training.checks import check_early
    from headstart.training.loop import train as run

    check_early(recipe)
    target = target or open_target(recipe)
    head = fresh_head(recipe, target)
    with _bar() as log:
        result = run(
            recipe, target=target, head=head, evaluate=evaluator(recipe.eval, target), log=log
        )
    length = "" if result.score is None else f", accepted length {result.score:.2f}"
    show(f"best head: {result.best} (step {result.best_step}{length})")
    return result.best


def fresh_head(recipe: Recipe, target: Target) -> DraftHead:
    """The head to start from."""
    import torch

    torch.manual_seed(recipe.train.seed)  # decides the weights that do not come from the target
    head = head_of(recipe, target)
    head.init_from_target()
    return head


def head_of(recipe: Recipe, target: Target) -> DraftHead:
    """A head of the recipe's kind and settings."""
    from headstart.model.head import head_class, make_head
    from headstart.training.keys import merged

    kind = recipe.head.kind
    settings = merged(head_class(kind)[0].defaults(target), recipe.head.settings)
    return make_head(target, kind, settings)


def open_target(recipe: Recipe) -> Target:
    from headstart.model.pretrained import random_model
    from headstart.model.target import Target
    from headstart.training.parallel import Team, local_device

    config = recipe.target
    spread = recipe.parallel.target != "replicated"
    if config.random is not None:
        if spread:
            raise ValueError("A random target is not spread: leave parallel.target out.")
        return Target.wrap(random_model(config.random, recipe.train.seed))
    assert config.name is not None
    device = local_device()
    if spread:
        Team(device)  # so that the processes know one another
        return Target.load_spread(
            config.name,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            tensor_parallel=recipe.parallel.target == "tensor_parallel",
        )
    return Target.load(
        config.name,
        dtype=config.dtype,
        device=device,
        revision=config.revision,
        weight_only=config.quantize,
    )


def evaluator(
    config: EvalConfig, target: Target
) -> Callable[[DraftHead], Mapping[str, float]] | None:
    """Real decoding of prompts, or None without prompts or a chat template to write them in."""
    if config.prompts is None:
        return None
    if target.spread:
        show("The target is in parts: held-out conversations (data.holdout) choose the best head.")
        return None
    if not target.has_tokenizer or target.tokenizer.chat_template is None:
        show(
            f"{target.name} has no chat template: the best head is chosen by the held-out loss "
            "(data.holdout), not by decoding prompts."
        )
        return None
    from headstart.inference.measure import accepted_length
    from headstart.model.tree import TreeShape

    from .prompts import decodable

    ids = decodable(config.prompts, config.count, target)
    shape = TreeShape.dynamic(config.nodes, config.depth, config.width)

    def evaluate(head: DraftHead) -> Mapping[str, float]:
        stats = accepted_length(
            target,
            head,
            ids,
            max_new_tokens=config.max_new_tokens,
            shape=shape,
            temperature=config.temperature,
        )
        depths = {f"accepted_{d}": rate for d, rate in enumerate(stats.acceptance, start=1)}
        return {"accepted_length": stats.tau, **depths}

    return evaluate


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    best = "-"
    with progress("training", None) as update:

        def log(at: Progress) -> None:
            nonlocal best
            if at.kind == "note":
                show(at.message)
                return
            if at.kind == "eval" and "accepted_length" in at.metrics:
                best = f"{at.metrics['accepted_length']:.3f}"
                say(f"step {at.step}: accepted length {best} on held-out prompts")
            loss = at.metrics.get("loss")
            note = f"accepted length {best}"
            update(at.step, note if loss is None else f"loss {loss:.3f}  {note}", at.total)

        yield log
