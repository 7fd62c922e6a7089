"""The first losses of a tiny run of each head kind, as they were when this file was last written.

A change that should not change what is learned leaves them as they are. Everything is in float64,
so that other processors and libraries agree. To write them anew, after a change that should:

    python tests/training/test_golden_loss.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "helpers"))  # where this file is run by itself

from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows  # noqa: E402

from headstart.model.heads.common.base import kinds  # noqa: E402
from headstart.training.trainer import train  # noqa: E402

STEPS = 20
GOLDEN = Path(__file__).with_suffix(".json")


def losses(kind: str, folder: Path) -> list[float]:
    """The loss of each step: two batches a step, several epochs."""
    data = write_rows(folder / "data.jsonl", mixed_rows(24))
    target = tiny_target()
    target.model.double()
    head = tiny_head(target, kind, **({"num_heads": 2} if kind == "medusa" else {})).double()
    found: list[float] = []
    train(
        tiny_recipe(folder / "run", data, steps=STEPS, accumulate=2),
        target=target,
        head=head,
        log=lambda at: found.append(at.metrics["loss"]) if at.kind == "train" else None,
    )
    return found


@pytest.mark.parametrize("kind", kinds())
def test_losses_are_the_golden_ones(kind, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    assert set(golden) == set(kinds()), "a new kind: write the file anew"
    found = losses(kind, tmp_path)
    assert found == pytest.approx(golden[kind], rel=1e-6)
    assert sum(found[-5:]) < sum(found[:5])


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for kind in kinds():
            (Path(folder) / kind).mkdir()
            found[kind] = losses(kind, Path(folder) / kind)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
