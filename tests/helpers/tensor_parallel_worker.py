"""Opens model folders as one of several processes that share every layer (test_tensor_parallel.py).

For each: the error, or how far it is from the target that one process holds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from headstart.model.target.load import load_sharded_target, load_target
from headstart.model.target.weights_hash import target_hash
from headstart.training.distributed.process_group import WorkerGroup


def found(folder: Path) -> dict[str, object]:
    try:
        target = load_sharded_target(folder, device=torch.device("cpu"), tensor_parallel=True)
    except ValueError as error:
        return {"refused": str(error)}
    alone = load_target(folder, device="cpu")
    ids_BT = torch.arange(3 * 20).reshape(3, 20) % 90
    lengths_B, layers = torch.tensor([20, 13, 7]), tuple(range(alone.num_layers))
    ours, theirs = (
        one.forward(ids_BT, lengths_B=lengths_B, taps=layers) for one in (target, alone)
    )
    errors = [
        float((a[row, :n] - b[row, :n]).norm() / b[row, :n].norm())
        for a, b in (
            (ours.logits_BTV, theirs.logits_BTV),
            (ours.lm_head_input_BTD, theirs.lm_head_input_BTD),
            *((ours.hidden_states[layer], theirs.hidden_states[layer]) for layer in layers),
        )
        for row, n in enumerate(lengths_B.tolist())
    ]
    ends = (target.model.get_input_embeddings(), target.model.get_output_embeddings())
    weights = list(target.model.parameters())
    return {
        "error": max(errors),
        "same_hash": target_hash(target) == target_hash(alone),
        "ends_whole": not any(isinstance(one.weight, DTensor) for one in ends),
        "share": sum(
            (one.to_local() if isinstance(one, DTensor) else one).numel() for one in weights
        )
        / sum(one.numel() for one in weights),
    }


def main(out: Path, folders: list[Path]) -> None:
    torch.set_num_threads(1)
    group = WorkerGroup(torch.device("cpu"))
    facts = {folder.name: found(folder) for folder in folders}
    (out / f"facts_{group.rank}.json").write_text(json.dumps([group.world_size, facts]))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(one) for one in sys.argv[2:]])
