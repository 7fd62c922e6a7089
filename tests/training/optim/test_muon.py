"""Muon in float32 is torch's Muon, but for the rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Muon

from headstart.training.config.schema import TrainConfig
from headstart.training.optim import optimizers as optim
from headstart.training.optim.muon import Float32Muon, orthogonalised

SHAPES = [(24, 16), (16, 24), (16, 16)]
SETTINGS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_as_torch_does(shape):
    start = torch.randn(shape)
    theirs, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference = Muon([theirs], adjust_lr_fn="match_rms_adamw", **SETTINGS)
    optimizer = Float32Muon([ours], **SETTINGS)
    for _ in range(5):
        theirs.grad = torch.randn(shape)
        ours.grad = theirs.grad.clone()
        reference.step()
        optimizer.step()
    moved, expected = (ours - start).flatten(), (theirs - start).flatten()
    assert (moved @ expected / (moved.norm() * expected.norm())).item() > 0.999
    torch.testing.assert_close(moved.norm(), expected.norm(), rtol=0.02, atol=0)
    state, other = optimizer.state_dict()["state"][0], reference.state_dict()["state"][0]
    assert state.keys() == other.keys()
    torch.testing.assert_close(state["momentum_buffer"], other["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape):
    values = torch.linalg.svdvals(
        orthogonalised(torch.randn(shape), (3.4445, -4.775, 2.0315), 5, 1e-7)
    )
    assert 0.3 < float(values.min()) and float(values.max()) < 1.3


@pytest.mark.parametrize(("native", "kind"), [(True, Muon), (False, Float32Muon)])
def test_the_machine_decides(monkeypatch, native, kind):
    monkeypatch.setattr(optim, "native_bfloat16", lambda: native)
    config = TrainConfig(output="unused", optimizer="muon")
    optimizers = optim.make_optimizers(nn.Linear(4, 4), config)
    assert type(optimizers[0]) is kind
