"""`headstart train` as one of several processes that hold a target in parts (test_sharded.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from headstart.scripts.options.recipe import open_target, run_recipe
from headstart.training.config.schema import load_recipe


def main(recipe_file: str, facts: Path) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe(recipe_file)
    target = open_target(recipe)
    weights = list(target.model.parameters())
    found = {
        "here": sum(
            (one.to_local() if isinstance(one, DTensor) else one).numel() for one in weights
        ),
        "processes": torch.distributed.get_world_size(),
        "reads_together": target.is_tensor_parallel,
        "whole": sum(one.numel() for one in weights),
        "in_parts": sum(one.numel() for one in weights if isinstance(one, DTensor)),
    }
    run_recipe(recipe, target)
    found["gradients"] = sum(one.grad is not None for one in weights)
    rank = torch.distributed.get_rank()
    (facts / f"facts_{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
