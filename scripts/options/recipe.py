"""Train a draft head by a recipe: what commands and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from headstart.model.target.load import load_sharded_target, load_target, wrap_target
from headstart.scripts.console import coloured, console, legend, progress, say, show

if TYPE_CHECKING:
    from headstart.inference.rollout import Prompt
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target
    from headstart.training.config.schema import EvalConfig, Recipe
    from headstart.training.evaluation.evaluate import Evaluate
    from headstart.training.reporting.metrics_log import Progress
    from headstart.training.reporting.samples import Sample

PROMPT_CHARS, RESPONSE_CHARS = 100, 500  # of a sample, to show

CHANGES = (
    "The joint section trains the target jointly with the head: it CHANGES, and `headstart fuse` "
    "writes a model of its own. Held-out conversations (data.holdout) choose the best head."
)


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a file, or the name of a shipped one."""
    folder = Path(str(resources.files("headstart.configs")))
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"There is no recipe {name!r}. Give a YAML file, or one of: {shipped}.")


def run_recipe(recipe: Recipe, target: Target | None = None) -> Path:
    """Train by a recipe, show progress, and return the folder of the best head."""
    from headstart.training.preflight import check_early
    from headstart.training.trainer import train as run

    recipe = check_early(recipe)
    target = target or open_target(recipe)
    head = fresh_head(recipe, target)
    evaluate = None
    if recipe.joint is None:
        evaluate = evaluator(recipe.eval, target)
    else:
        show(CHANGES)
    with _bar() as log:
        result = run(recipe, target=target, head=head, evaluate=evaluate, log=log)
    length = "" if result.score is None else f", acceptance length {result.score:.2f}"
    show(f"best head: {result.best} (step {result.best_step}{length})")
    return result.best


def fresh_head(recipe: Recipe, target: Target) -> DraftHead:
    """Return the head to start from."""
    import torch

    from headstart.model.checkpoint.head import start_from

    torch.manual_seed(recipe.train.seed)  # for weights that do not come from the target
    head = head_of(recipe, target)
    head.init_from_target()
    if recipe.train.start_from is not None:
        start_from(head, recipe.train.start_from)
    return head


def head_of(recipe: Recipe, target: Target) -> DraftHead:
    """Return a head of the recipe's kind and settings."""
    from headstart.model.checkpoint.head import read_head_file
    from headstart.model.heads.common.base import head_class, make_head
    from headstart.training.config.errors import merged

    kind, start = recipe.head.kind, recipe.train.start_from
    settings = head_class(kind)[0].defaults(target)
    if start is not None:
        settings = read_head_file(start).head
        if settings["kind"] != kind:
            raise ValueError(
                f"train.start_from ({start}) is a head of kind {settings['kind']}, but head.kind "
                f"is {kind}. Name another folder, or set head.kind={settings['kind']}."
            )
    return make_head(target, kind, merged(settings, recipe.head.settings))


def open_target(recipe: Recipe) -> Target:
    """Load the target as the recipe says, on this process's device."""
    from headstart.model.target.synthetic import random_model
    from headstart.training.distributed.process_group import WorkerGroup, local_device

    config = recipe.target
    sharded = recipe.parallel.target != "replicated"
    if config.random is not None:
        if sharded:
            raise ValueError("A random target cannot be sharded: leave parallel.target out.")
        return wrap_target(random_model(config.random, recipe.train.seed))
    assert config.name is not None
    device = local_device()
    if sharded:
        WorkerGroup(device)  # initializes the process group
        return load_sharded_target(
            config.name,
            dtype=config.dtype,
            device=device,
            revision=config.revision,
            tensor_parallel=recipe.parallel.target == "tensor_parallel",
        )
    return load_target(
        config.name,
        dtype=config.dtype,
        device=device,
        revision=config.revision,
        weight_only=config.quantize,
    )


def evaluator(config: EvalConfig, target: Target) -> Evaluate | None:
    """Return a function that decodes prompts with a head, or None without prompts or chat template.

    ValueError where prompts or contexts leave no room for a response.
    """
    if config.prompts is None:
        return None
    if target.is_sharded:
        show("The target is sharded: held-out conversations (data.holdout) choose the best head.")
        return None
    if not target.has_tokenizer or target.tokenizer.chat_template is None:
        show(
            f"{target.name} has no chat template: the best head is chosen by the held-out loss "
            "(data.holdout), not by decoding prompts."
        )
        return None
    from headstart.inference.benchmark.acceptance import measure_acceptance
    from headstart.inference.config import SamplingParams, SpeculativeConfig
    from headstart.inference.detokenizer import pieces
    from headstart.inference.tree_policy.defaults import for_target
    from headstart.model.tree.shape import TreeShape
    from headstart.scripts.options.prompts import decodable, first_turns
    from headstart.training.reporting.samples import Sample

    _check_contexts(config, target)
    prompts = decodable(config.prompts, config.count, target)
    ids = first_turns(target, prompts)
    longer = {context: _filled(prompts, context, config, target) for context in config.contexts}
    shape = for_target(target, TreeShape.dynamic(config.nodes, config.depth, config.width))
    sampling = SamplingParams(config.max_new_tokens, config.temperature)

    def evaluate(head: DraftHead) -> dict[str, Any]:
        speculative = SpeculativeConfig(head, shape)
        stats, responses = measure_acceptance(target, speculative, ids, sampling)
        found: dict[str, Any] = {"acceptance_length": stats.acceptance_length}
        found |= {
            f"acceptance_rate_{d}": rate for d, rate in enumerate(stats.acceptance_rates, start=1)
        }
        for context, filled in longer.items():
            stats, _ = measure_acceptance(target, speculative, filled, sampling)
            found[f"acceptance_length_{context}"] = stats.acceptance_length
        found["samples"] = [
            Sample(prompt.turns[0], tuple(pieces(target, steps)))
            for prompt, steps in list(zip(prompts, responses, strict=True))[: config.samples]
        ]
        return found

    return evaluate


def _check_contexts(config: EvalConfig, target: Target) -> None:
    longest, limit = max(config.contexts, default=0), target.context_limit
    if limit is not None and longest and longest + config.max_new_tokens > limit:
        raise ValueError(
            f"eval.contexts asks for prompts of {longest} tokens and eval.max_new_tokens for "
            f"{config.max_new_tokens} after them, but the context of {target.name} is {limit} in "
            "all. Lower one of them."
        )


def _filled(
    prompts: list[Prompt], context: int, config: EvalConfig, target: Target
) -> list[tuple[int, ...]]:
    """Return the prompts, each preceded by other text up to about `context` tokens."""
    from headstart.scripts.options.suites import Suite, make_cases

    suite = Suite("eval.prompts", prompts)
    cases, left_out = make_cases(
        suite, target, context=context, max_new_tokens=config.max_new_tokens
    )
    if left_out:
        show(f"eval.contexts: {left_out} prompts of about {context} tokens leave no room, left out")
    return [case.tokens for case in cases]


def _by_context(at: Progress) -> str:
    """Format the acceptance lengths after longer prompts, if any."""
    name = "acceptance_length_"
    found = [
        f"{value:.3f} at {key.removeprefix(name)} tokens"
        for key, value in at.metrics.items()
        if key.startswith(name)
    ]
    return f" ({', '.join(found)})" if found else ""


def show_sample(sample: Sample) -> None:
    """Show the beginning of a response, coloured by the tokens of each decode step."""
    show(f"> {shorten(sample.prompt, PROMPT_CHARS, placeholder=' ...')}")
    room, text = RESPONSE_CHARS, legend().append("\n")
    for piece, tokens in sample.response:
        text.append(coloured(piece[:room], tokens))
        room -= len(piece)
        if room <= 0:
            text.append(" ...")
            break
    console.print(text)


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    best = "-"
    with progress("training", None) as update:

        def log(at: Progress) -> None:
            nonlocal best
            if at.kind == "note":
                show(at.message)
                return
            if at.kind == "eval" and "acceptance_length" in at.metrics:
                best = f"{at.metrics['acceptance_length']:.3f}"
                say(
                    f"step {at.step}: acceptance length {best} on held-out prompts{_by_context(at)}"
                )
            for sample in at.samples:
                show_sample(sample)
            loss = at.metrics.get("loss")
            note = f"acceptance length {best}"
            update(at.step, note if loss is None else f"loss {loss:.3f}  {note}", at.total)

        yield log
