"""Checks before a run starts: what does not fit is refused before long work."""

from __future__ import annotations

from pathlib import Path

import torch

from headstart.model.checkpoint.head import read_head_file
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import check_peft
from headstart.model.target.target import Target
from headstart.model.target.weight_only import check_weight_only
from headstart.training.config.schema import Recipe
from headstart.training.data.conversations import Conversations
from headstart.training.distributed.launcher import resolve_engine
from headstart.training.reporting.trackers import check_trackers

from .resume import check_folder
from .run.checkpoint import FOLDER, load_metadata


def check_early(recipe: Recipe) -> Recipe:
    """Check what needs no target, and return the recipe with `parallel.engine` resolved."""
    recipe = resolve_engine(recipe)
    check_joint(recipe)
    if recipe.train.start_from is not None:
        read_head_file(recipe.train.start_from)
    check_trackers(recipe)
    check_weight_only(recipe.target.quantize)
    folder = Path(recipe.train.output)
    check_folder(recipe, folder, load_metadata(folder / FOLDER))
    return recipe


def check_fit(recipe: Recipe, target: Target, head: DraftHead, decodes: bool) -> None:
    """Check what needs no data. decodes: whether evaluations decode."""
    if decodes and target.is_sharded:
        raise ValueError(
            "A sharded target does not decode, so heads cannot be evaluated with it by decoding: "
            "leave `evaluate` out."
        )
    if decodes and recipe.joint is not None:
        raise ValueError(
            "A target that is trained jointly does not decode until its adapters are merged, so "
            "heads cannot be evaluated by decoding: leave `evaluate` out."
        )
    steps = recipe.loss.steps
    if head.max_depth is not None and head.max_depth != steps:
        raise ValueError(
            f"The {head.kind} head drafts {head.max_depth} tokens, but loss.steps is {steps}: "
            f"parts of it would stay untrained. Set loss.steps={head.max_depth}, or make the head "
            f"for {steps} tokens."
        )
    if recipe.train.precision == "float32" and target.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"train.precision is float32, but the target is in {target.dtype}. Set "
            "target.dtype=float32 or train.precision=bfloat16."
        )


def check_joint(recipe: Recipe) -> None:
    """Refuse settings that joint training of the target excludes."""
    if recipe.joint is None:
        return
    check_peft()
    for name, value, needed in (
        ("data.features", recipe.data.features, None),
        ("target.quantize", recipe.target.quantize, None),
        ("parallel.target", recipe.parallel.target, "replicated"),
        ("parallel.engine", recipe.parallel.engine, "ddp"),
    ):
        if value != needed:
            raise ValueError(
                f"{name} is {value}, but the joint section trains the target too, which "
                f"needs {name}={'null' if needed is None else needed}. Change one of them."
            )


def check_lengths(data: Conversations, target: Target) -> None:
    """Refuse conversations that are longer than the target's context."""
    limit = target.context_limit
    longest = max(data.train.longest, data.holdout.longest)
    if limit is not None and longest > limit:
        raise ValueError(
            f"A conversation has {longest} tokens, but the context of {target.name} is "
            f"{limit}. Set data.max_length={limit}, which cuts longer ones."
        )
