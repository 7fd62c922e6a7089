"""A training run as one of several processes: started by test_two_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.model.head import DraftHead
from headstart.training.loop import train
from headstart.training.recipe import Recipe, make_recipe


def two_process_recipe(folder: Path, data: Path, kind: str, optimizer: str) -> Recipe:
    settings = {"steps": 6, "accumulate": 3, "log_every": 1, "lr": 1e-3, "optimizer": optimizer}
    plain = tiny_recipe(folder, data, **settings)
    values = plain.model_dump(exclude_none=True)
    values["data"] |= {"holdout": 5, "batch_tokens": 64}
    return make_recipe(values | {"loss": {"kind": kind, "steps": 2}, "eval": {"every": 2}})


def decoded(head: DraftHead) -> dict[str, float]:
    """In place of decoding: a figure that follows from the weights."""
    return {"accepted_length": 1 + float(next(head.parameters()).abs().mean())}


def main(folder: Path, data: Path, kind: str, optimizer: str) -> None:
    torch.set_num_threads(1)
    target = tiny_target()
    head = tiny_head(target, draft_vocab=20)
    recipe = two_process_recipe(folder, data, kind, optimizer)
    train(recipe, target=target, head=head, evaluate=decoded)
    state = AcceleratorState()
    weights = {name: value.contiguous() for name, value in head.state_dict().items()}
    facts = {"processes": str(state.num_processes), "type": str(state.distributed_type)}
    save_file(weights, folder / f"weights_{state.process_index}.safetensors", facts)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
