"""A training run as one of several processes: started by test_two_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.training.loop import train
from headstart.training.recipe import Recipe, make_recipe


def two_process_recipe(folder: Path, data: Path, kind: str) -> Recipe:
    plain = tiny_recipe(folder, data, steps=6, accumulate=3, log_every=1, lr=1e-3)
    values = plain.model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "batch_tokens": 64}
    return make_recipe(values | {"loss": {"kind": kind, "steps": 2}})


def main(folder: Path, data: Path, kind: str) -> None:
    torch.set_num_threads(1)
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    train(two_process_recipe(folder, data, kind), target=target, head=head)
    state = AcceleratorState()
    weights = {name: value.contiguous() for name, value in head.state_dict().items()}
    facts = {"processes": str(state.num_processes), "type": str(state.distributed_type)}
    save_file(weights, folder / f"weights_{state.process_index}.safetensors", facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
