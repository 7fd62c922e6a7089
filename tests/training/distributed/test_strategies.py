"""However a head is sharded, several processes learn what one process learns.

Every strategy starts runs and resumes runs of others, on two or more processes (gloo).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import ROOT
from safetensors.torch import load_file
from strategies_runs import alone, metrics, together, write_data
from strategies_worker import STEPS
from tiny_run import (
    learned,
    skip_without_deepspeed,
    tiny_head,
    tiny_target,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


STOP = 3  # where the first half ends: between two evaluations

# Strategy and processes of the first half of a run, and of the second.
CHAINS = [
    (("ddp", 2), ("fsdp2", 3)),
    (("fsdp2", 2), ("zero3", 5)),  # five divides no size of the head
    (("zero1", 2), ("zero2", 3)),
    (("zero2", 2), ("ddp", 1)),
    (("zero3", 3), ("zero1", 2)),
]


def check_sharding(engine: str, processes: int, ranks: list[dict], full: int, both: int) -> None:
    """Check what each rank holds. full: numbers in the head; both: in AdamW's moments."""
    for one in ranks:
        assert one["processes"] == processes and one["type"].endswith("MULTI_CPU")
        assert one["target_gradients"] == 0
        assert one.get("stage") == (int(engine[-1]) if engine.startswith("zero") else None)
    assert {one["strategy"] for one in ranks} == {
        {"ddp": "DDPStrategy", "fsdp2": "FSDP2Strategy"}.get(engine, "ZeROStrategy")
    }
    padding = 64 * processes * 20
    for key, total, sharded in (
        ("weights", full, engine in ("fsdp2", "zero3")),
        ("moments", both, engine != "ddp"),
    ):
        if sharded:
            assert total <= sum(one[key] for one in ranks) <= total + padding
            assert max(one[key] for one in ranks) < total
        else:
            assert all(one[key] == total for one in ranks)


def check_equal(one: Path, other: Path, near: float) -> None:
    """Compare weights, optimizer state and metrics of two runs."""
    ours, theirs = (load_file(folder / "state" / "state.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=0, atol=near, msg=lambda m, n=name: n + m
        )
    lines = metrics(one)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [2, 4, 6]
    for ours_line, line in zip(lines, metrics(other), strict=True):
        for name in learned(ours_line).keys() - {"kind"}:
            assert ours_line[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6), name
    best = [
        json.loads((at / "state" / "state.json").read_text())["best_step"] for at in (one, other)
    ]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(map(str, sum(chain, ()))))
def test_strategies_equal_one_process_and_resume_one_another(data, tmp_path, chain):
    skip_without_deepspeed(*(engine for engine, _ in chain))
    reference, folder = tmp_path / "alone", tmp_path / "together"
    alone(reference, data, {})
    head = tiny_head(tiny_target(), draft_vocab=20)
    full = sum(weight.numel() for weight in head.parameters())
    start = {name: value.clone() for name, value in head.state_dict().items()}
    for half, (engine, processes) in enumerate(chain):
        settings = {"engine": engine, "resume": True} if half else {"engine": engine, "stop": STOP}
        if processes == 1:
            alone(folder, data, settings)
            continue
        ranks = together(folder, data, processes, settings)
        check_sharding(engine, processes, ranks, full, 2 * full)
    # Adam turns rounding in a tiny gradient into a part of a step (1e-3), hence not 1e-7.
    check_equal(folder, reference, 3e-5)
    finished = load_file(folder / "state" / "state.safetensors")
    for name, value in start.items():
        if value.is_floating_point():
            assert not torch.allclose(value, finished[f"head.{name}"], rtol=0, atol=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "optimizer", "engine", "recompute"),
    [
        ("e2e_tv", "adamw", "ddp", False),
        ("lk", "muon", "ddp", True),
        ("lk", "muon", "fsdp2", True),
        ("lk", "adamw", "zero3", True),
    ],
)
def test_two_processes_equal_one(data, tmp_path, loss, optimizer, engine, recompute):
    skip_without_deepspeed(engine)
    settings = {"loss": loss, "optimizer": optimizer}
    alone(tmp_path / "alone", data, settings)
    settings |= {"engine": engine, "recompute": recompute}
    ranks = together(tmp_path / "pair", data, 2, settings)
    if engine == "ddp":  # gradients are all-reduced once per step, not once per batch
        assert all(one["all_reduces"] == STEPS for one in ranks)
    measured = {
        "share_all_reduce" in one for one in metrics(tmp_path / "pair") if one["kind"] == "train"
    }
    assert measured == {engine == "ddp"}  # the others overlap it invisibly
    # Muon orthogonalises in bfloat16.
    check_equal(tmp_path / "pair", tmp_path / "alone", 3e-5 if optimizer == "adamw" else 2e-4)


@pytest.mark.slow
def test_waiting_for_others_is_measured(data, tmp_path):
    shares = {}
    for slow in (0, 1):
        together(tmp_path / str(slow), data, 2, {"slow": slow, "stop": 2})
        steps = [line for line in metrics(tmp_path / str(slow)) if line["kind"] == "train"]
        shares[slow] = [line["share_all_reduce"] for line in steps]
        for line in steps:
            parts = [value for name, value in line.items() if name.startswith("share_")]
            assert len(parts) == 6 and sum(parts) == pytest.approx(1) and min(parts) >= 0
    # Metrics are those of rank 0, and each step is 0.6 s longer on the slow one.
    assert min(shares[1]) > 0.5 and max(shares[0]) < 0.25, shares


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2"])
def test_precision_is_the_recipes(data, tmp_path, engine):
    # DeepSpeed disables autocast that is set around it.
    skip_without_deepspeed(engine)
    first: dict[str, float] = {}
    for precision in ("float32", "bfloat16"):
        alone(tmp_path / precision, data, {"precision": precision})
        first[precision] = metrics(tmp_path / precision)[0]["loss"]
    together(tmp_path / "pair", data, 2, {"engine": engine, "precision": "bfloat16", "stop": 1})
    loss = metrics(tmp_path / "pair")[0]["loss"]
    assert abs(loss - first["bfloat16"]) < abs(loss - first["float32"]) / 3


@pytest.mark.slow
@pytest.mark.parametrize(("file", "engine"), [("fsdp2", "fsdp2"), ("zero2", "zero2")])
def test_accelerate_launch_decides_where_the_recipe_does_not(data, tmp_path, file, engine):
    skip_without_deepspeed(engine)
    config = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(config)]
    launcher += ["--main_process_port", "0", "--num_processes"]
    ranks = together(tmp_path / "run", data, 2, {"engine": "auto", "stop": 1}, launcher)
    full = sum(one.numel() for one in tiny_head(tiny_target(), draft_vocab=20).parameters())
    check_sharding(engine, 2, ranks, full, 2 * full)
