"""A run that is killed again and again (test_killed.py): each life is a child of this process.

Forked, so that a life does not begin with seconds of imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.model.heads.common.base import DraftHead
from headstart.training.config.schema import make_recipe
from headstart.training.trainer import train

STEPS = 30


def decoded(head: DraftHead) -> dict[str, float]:
    return {"acceptance_length": 1 + float(next(head.parameters()).abs().mean())}


def live(folder: Path, data: Path) -> None:
    settings = {"steps": STEPS, "log_every": 1, "save_every": 1, "keep": 3, "resume": "auto"}
    values = tiny_recipe(folder, data, **settings).model_dump(exclude_none=True)
    values |= {"eval": {"every": 7}, "data": values["data"] | {"holdout": 4}}
    target = tiny_target()
    train(
        make_recipe(values),
        target=target,
        head=tiny_head(target, draft_vocab=20),
        evaluate=decoded,
    )


def born(folder: Path, data: Path) -> int:
    """Starts a life; its process number."""
    child = os.fork()
    if child:
        return child
    try:
        # Behind a fork torch makes its pool of threads anew, which two threads must not do at once.
        torch.set_num_threads(1)
        live(folder, data)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def died(child: int, after: float) -> bool:
    """Kills a life; False where it came to its end before. A failure ends everything."""
    until = time.monotonic() + after
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "a life failed"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status != 0


def main(folder: Path, data: Path, kills: int, seed: int) -> None:
    """Runs until so many lives were killed; the last run is brought to its end."""
    torch.set_num_threads(1)
    began = time.monotonic()
    assert not died(born(folder / "undisturbed", data), 300)
    whole = time.monotonic() - began
    moments = random.Random(seed)
    runs, killed = 1, 0
    while True:
        here = folder / f"run{runs}"
        after = whole * moments.uniform(0, 0.3) if killed < kills else 300
        if died(born(here, data), after):
            killed += 1
        elif killed < kills:
            runs += 1
        else:
            break
    (folder / "told.json").write_text(json.dumps({"runs": runs, "killed": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
