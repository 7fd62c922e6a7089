"""A training run as one of several processes, for test_strategies.py and test_killed.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tiny_run import tiny_head, tiny_recipe, tiny_target
from torch import Tensor
from torch.distributed.tensor import DTensor

from headstart.model.heads.common.base import DraftHead
from headstart.training import build
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.distributed import process_group
from headstart.training.distributed.process_group import local_device
from headstart.training.distributed.strategies import ParallelStrategy
from headstart.training.reporting.metrics_log import Progress
from headstart.training.run.signals import Interrupted
from headstart.training.trainer import train

STEPS = 6
SLOW = 0.2  # seconds that a slow process adds to each batch


def recipe_for(folder: Path, data: Path, settings: dict) -> Recipe:
    """settings: engine, loss, recompute, and of train all in `free`."""
    given = {
        "steps": STEPS,
        "accumulate": 3,
        "log_every": 1,
        "lr": 1e-3,
        "save_every": 0,
    }
    free = ("optimizer", "resume", "precision")
    given |= {key: settings[key] for key in free if key in settings}
    values = tiny_recipe(folder, data, **given).model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "global_batch_tokens": 64}
    loss = {"kind": settings.get("loss", "lk"), "recompute": settings.get("recompute", False)}
    values |= {"loss": loss | {"steps": 2}, "eval": {"every": 2}}
    return make_recipe(values | {"parallel": {"engine": settings.get("engine", "ddp")}})


def decoded(head: DraftHead, seconds: float = 0.0) -> dict[str, float]:
    """In place of decoding: a metric that follows from the weights."""
    time.sleep(seconds)
    return {"acceptance_length": 1 + float(next(head.parameters()).abs().mean())}


def held(value: Tensor) -> int:
    """Return how many numbers of a tensor this process holds between two steps."""
    if isinstance(value, DTensor):
        return value.to_local().numel()
    partition = getattr(value, "ds_tensor", value)  # stage 3 of DeepSpeed
    return partition.numel()


def slow_down(head: DraftHead) -> None:
    at_once = head.unroll
    head.unroll = lambda *given: (time.sleep(SLOW), at_once(*given))[1]


def dies_later(head: DraftHead, folder: Path, settings: dict) -> None:
    unroll, calls = head.unroll, iter(range(1000))
    head.unroll = lambda *given: unroll(*given) if next(calls) < 4 else die(folder, settings)


def die(folder: Path, settings: dict) -> None:
    (folder / "died").write_text(str(time.monotonic()))
    if settings["dies"] in ("killed", "stopped"):
        os.kill(os.getpid(), signal.SIGKILL if settings["dies"] == "killed" else signal.SIGSTOP)
    raise RuntimeError("the disk of process 1 is gone")


def main(folder: Path, data: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    if "timeout" in settings:
        process_group.COLLECTIVE_TIMEOUT = timedelta(seconds=settings["timeout"])
    target = tiny_target(device=local_device() if settings.get("gpus") else "cpu")
    head = tiny_head(target, draft_vocab=20)
    rank = int(os.environ["RANK"])
    data = Path(str(data).replace("{rank}", str(rank)))
    if rank == 1 and "dies" in settings:
        dies_later(head, folder, settings)
    if rank == settings.get("slow"):
        slow_down(head)
    made: list[ParallelStrategy] = []
    all_reduces, allreduce_hook = 0, process_group.allreduce_hook
    build_strategy = build.build_strategy

    def counted(group, bucket):
        nonlocal all_reduces
        all_reduces += bucket.is_last()
        return allreduce_hook(group, bucket)

    def keep(*given) -> ParallelStrategy:
        made.append(build_strategy(*given))
        return made[0]

    def stop(at: Progress) -> None:
        if at.kind == "train" and at.step == settings.get("stop"):
            os.kill(os.getpid(), signal.SIGINT)

    build.build_strategy, process_group.allreduce_hook = keep, counted
    try:
        train(
            recipe_for(folder, data, settings),
            target=target,
            head=head,
            evaluate=partial(decoded, seconds=settings.get("decodes", 0.0)),
            log=stop,
        )
    except Interrupted:
        assert "stop" in settings
    strategy = made[0]
    optimizers = getattr(strategy, "optimizers", None) or [strategy.optimizer]
    moments = [
        value for one in optimizers for state in one.state.values() for value in state.items()
    ]
    state = AcceleratorState()
    metadata = {
        "processes": state.num_processes,
        "type": str(state.distributed_type),
        "strategy": type(strategy).__name__,
        "all_reduces": all_reduces,
        "weights": sum(held(weight) for weight in head.parameters()),
        "moments": sum(held(value) for key, value in moments if key != "step"),
        "target_gradients": sum(one.grad is not None for one in target.model.parameters()),
    }
    if "engine" in vars(strategy):
        metadata["stage"] = strategy.engine.zero_optimization_stage()
    (folder / f"rank_{state.process_index}.json").write_text(json.dumps(metadata))
    state.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
