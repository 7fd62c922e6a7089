"""Resolve the parallel strategy: the recipe's, else what the launcher was configured for."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headstart.training.config.schema import ParallelConfig, Recipe

# Variables by which `accelerate launch` passes its configuration on.
DEEPSPEED, FSDP = LAUNCHED_FOR = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
OWNED_BY_RECIPE = {  # keys of DeepSpeed's file, and the settings that decide them instead
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer",
    "scheduler": "train.lr, train.warmup and train.lr_floor",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
}

STAGE, FILE = "ACCELERATE_DEEPSPEED_ZERO_STAGE", "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def world_size() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_engine(recipe: Recipe) -> Recipe:
    """Return the recipe with a concrete `parallel.engine`. ValueError where it cannot be used."""
    if recipe.parallel.engine == "auto":
        recipe = recipe.model_copy(update={"parallel": _launched(recipe.parallel)})
    kind = recipe.parallel.engine
    if kind != "ddp" and world_size() < 2:
        raise ValueError(
            f"parallel.engine is {kind}, which shards a head over several processes, but this "
            "one is alone. Start them with `torchrun --nproc-per-node N -m headstart.scripts.cli "
            "train ...`, or set parallel.engine=ddp."
        )
    if recipe.parallel.target != "replicated" and world_size() < 2:
        raise ValueError(
            f"parallel.target is {recipe.parallel.target}, but this process is alone. Start "
            "several with `torchrun --nproc-per-node N ...`, or set parallel.target=replicated."
        )
    if kind.startswith("zero"):
        _check_zero(recipe)
    elif recipe.parallel.deepspeed is not None:
        raise ValueError(
            f"parallel.deepspeed is for zero1, zero2 and zero3, and parallel.engine is {kind}. "
            "Set parallel.engine, or leave parallel.deepspeed out."
        )
    return recipe


def _check_zero(recipe: Recipe) -> None:
    kind = recipe.parallel.engine
    if recipe.train.optimizer != "adamw":
        raise ValueError(
            f"train.optimizer is {recipe.train.optimizer}, which needs whole matrices, but "
            f"parallel.engine={kind} cuts them up. Set train.optimizer=adamw, or parallel.engine "
            "to ddp or fsdp2."
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"parallel.engine is {kind}, but DeepSpeed is not installed. Run `pip install "
            "'headstart[cluster]'`, or set parallel.engine=fsdp2."
        )
    deepspeed_settings(recipe)


def _launched(config: ParallelConfig) -> ParallelConfig:
    """Return what `accelerate launch` was configured for; DDP otherwise."""
    if os.environ.get(DEEPSPEED) == "true":
        file = os.environ.get(FILE, "none")
        named = file.lower() != "none"
        for part in ("OPTIMIZER", "PARAM"):
            where = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none")
            if not named and where not in ("none", ""):
                raise ValueError(
                    f"accelerate was configured to offload to {where}. Write that into a file of "
                    "DeepSpeed's and name it as deepspeed_config_file, or as parallel.deepspeed."
                )
        stage = _stage(Path(file)) if named else os.environ.get(STAGE, "2")
        update = {"engine": f"zero{stage}", "deepspeed": file if named else config.deepspeed}
        return ParallelConfig.model_validate(config.model_dump() | update)
    if os.environ.get(FSDP) == "true":
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "accelerate was configured for the first FSDP. Set `fsdp_version: 2` in its file."
            )
        return config.model_copy(update={"engine": "fsdp2"})
    return config.model_copy(update={"engine": "ddp"})


def _stage(file: Path) -> int:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}, which accelerate was configured with, names no zero_optimization.stage "
            f"({error!r}). Write the stage there, or set parallel.engine."
        ) from error


def deepspeed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the file of `parallel.deepspeed` and the recipe's settings.

    ValueError for a file that cannot be read or contradicts the recipe.
    """
    stage = int(recipe.parallel.engine.removeprefix("zero"))
    path = recipe.parallel.deepspeed
    given = {} if path is None else _read(Path(path))
    wrong = [
        f"{key} (the recipe has {where})"
        for key, where in OWNED_BY_RECIPE.items()
        if _set(given, key)
    ]
    zero = given.get("zero_optimization", {})
    if zero.get("stage", stage) not in (stage, "auto"):
        wrong.append(f"zero_optimization.stage (the recipe has parallel.engine=zero{stage})")
    if wrong:
        raise ValueError(f"{path} decides what the recipe decides: {'; '.join(wrong)}. Drop that.")
    if zero.get("compute_grad_norm") is False:
        raise ValueError(f"{path}: the norm of the gradients is needed. Drop compute_grad_norm.")
    kept = {
        key: value for key, value in given.items() if key not in OWNED_BY_RECIPE and value != "auto"
    }
    zero = {key: value for key, value in zero.items() if value != "auto"}
    return kept | {
        "train_micro_batch_size_per_gpu": 1,  # required; batches here vary in size
        "gradient_accumulation_steps": recipe.train.accumulate,
        "gradient_clipping": recipe.train.clip,
        "zero_optimization": zero | {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": given.get("steps_per_print", 1_000_000_000),
    }


def _set(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key)
    if isinstance(value, Mapping) and "enabled" in value:
        value = value["enabled"]
    return value not in (None, False, "auto")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"parallel.deepspeed is {path}, which cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"parallel.deepspeed is {path}, which holds no JSON object.")
    return found
