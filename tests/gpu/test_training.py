"""What only GPUs can show of training: the same head as on a CPU, the clock, and real exchanges."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from chat_model import save
from safetensors.torch import load_file
from strategies_runs import alone, metrics, together
from strategies_worker import STEPS, decoded, recipe_for
from tiny_run import VOCAB, mixed_rows, tiny_head, tiny_target, write_rows

from headstart.model.target.load import load_target
from headstart.training.config.schema import make_recipe
from headstart.training.trainer import train

PAIRS = [("ddp", "fsdp2"), ("fsdp2", "zero2"), ("zero1", "zero3"), ("zero3", "ddp")]
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def data(tmp_path) -> Path:
    long_rows = [torch.randint(0, VOCAB, (32,)).tolist() for _ in range(3)]
    return write_rows(tmp_path / "data.jsonl", mixed_rows(20) + long_rows)


@pytest.fixture(autouse=True)
def _no_device_is_chosen() -> Iterator[None]:
    choose_anew()
    yield
    choose_anew()


def choose_anew() -> None:
    """accelerate keeps the device that a process trains on first."""
    AcceleratorState._reset_state(reset_partial_state=True)


def check_near(one: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "state" / "state.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-3, msg=name)
    for line, expected in zip(metrics(one), metrics(other), strict=True):
        if "loss" in expected:
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_gpu_trains_the_head_that_a_cpu_trains(data, tmp_path):
    alone(tmp_path / "cpu", data, {})
    choose_anew()
    target = tiny_target(device="cuda")
    head = tiny_head(target, draft_vocab=20)
    train(recipe_for(tmp_path / "gpu", data, {}), target=target, head=head, evaluate=decoded)
    check_near(tmp_path / "gpu", tmp_path / "cpu")
    last = [line for line in metrics(tmp_path / "gpu") if line["kind"] == "train"][-1]
    shares = [value for name, value in last.items() if name.startswith("share_")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert last["memory_gb"] > 0


def test_joint_training_of_the_target(data, tmp_path):
    for device in ("cpu", "cuda"):
        values = recipe_for(tmp_path / device, data, {}).model_dump(exclude_none=True)
        values["joint"] = {"rank": 4, "start": 0}
        target = tiny_target(device=device)
        choose_anew()
        train(make_recipe(values), target=target, head=tiny_head(target, draft_vocab=20))
    check_near(tmp_path / "cuda", tmp_path / "cpu")


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_quantised_layers_say_on_a_gpu_what_they_say_on_a_cpu(kind, tmp_path):
    pytest.importorskip("torchao")
    folder = save(tmp_path / "target")
    text_1T = torch.randint(0, 40, (1, 24))
    seen = [
        load_target(folder, dtype=torch.bfloat16, device=device, weight_only=kind)
        .forward(text_1T.to(device))
        .lm_head_input_BTD.float()
        .cpu()
        for device in ("cpu", "cuda")
    ]
    assert (seen[0] - seen[1]).norm() < 0.03 * seen[0].norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_strategies_over_nccl(data, tmp_path, first, second):
    alone(tmp_path / "alone", data, {})
    for settings in ({"engine": first, "stop": 3}, {"engine": second, "resume": True}):
        ranks = together(tmp_path / "run", data, 2, settings | {"gpus": True})
        assert all(one["processes"] == 2 for one in ranks)
    check_near(tmp_path / "run", tmp_path / "alone")
    state = json.loads((tmp_path / "run" / "state" / "state.json").read_text())
    assert state["step"] == STEPS
