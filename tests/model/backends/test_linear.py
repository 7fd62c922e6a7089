"""Packed weights give what the default kernel gives, and only where they are meant to."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build
from run_command import pickled
from torch import nn

from headstart.model.backends import linear
from headstart.model.backends.linear import ROWS, PackedLinear, pack_linears, packed
from headstart.model.target.load import wrap_target

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every packed product."""
    seen: list[int] = []
    product = linear._product
    monkeypatch.setattr(
        linear,
        "_product",
        lambda hidden, *rest: seen.append(hidden[..., 0].numel()) or product(hidden, *rest),
    )
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(130, 128), (128, 192), (1031, 64), (1030, 1024)])
@pytest.mark.parametrize("rows", [(1,), (3,), (4,), (2, 5), (64,), (65,), (3, 70)])
def test_packed_equals_default(calls, shape, bias, rows):
    layer = nn.Linear(*shape[::-1], bias=bias).requires_grad_(False)
    hidden = torch.randn(*rows, shape[1])
    expected = nn.functional.linear(hidden.double(), layer.weight.double())
    expected = expected + layer.bias.double() if bias else expected
    layer = packed(layer)
    with torch.no_grad():
        got = layer(hidden)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    count = hidden[..., 0].numel()
    assert calls == ([count] if count in ROWS else [])


def test_weights_stay_as_they_are(calls):
    layer = nn.Linear(128, 256)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer = packed(layer)
    with torch.no_grad():
        layer(torch.randn(8, 128))
    assert calls == [8]
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_weights_that_change_are_packed_again(calls):
    layer = nn.Linear(128, 256).requires_grad_(False)
    layer = packed(layer)
    hidden = torch.randn(8, 128)
    with torch.no_grad():
        before = layer(hidden)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        torch.testing.assert_close(layer(hidden), 2 * before)
        layer.load_state_dict({name: value / 2 for name, value in layer.state_dict().items()})
        torch.testing.assert_close(layer(hidden), before)
    assert calls == [8, 8, 8]


def test_gradients_take_the_default_kernel(calls):
    layer = nn.Linear(128, 256).requires_grad_(False)
    layer = packed(layer)
    hidden = torch.randn(8, 128, requires_grad=True)
    layer(hidden).sum().backward()
    assert calls == [] and hidden.grad is not None


@pytest.mark.parametrize("layer", [nn.Linear(8, 8), nn.Linear(128, 256).double()])
def test_small_and_double_precision_layers_are_left_alone(layer):
    assert packed(layer) is layer
    pack_linears(holder := nn.Sequential(layer))
    assert holder[0] is layer


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_with_its_own_weights(calls, copied):
    layer = nn.Linear(128, 256).requires_grad_(False)
    layer = packed(layer)
    hidden = torch.randn(8, 128)
    with torch.no_grad():
        before = layer(hidden)
        other = copied(layer)
        assert isinstance(other, PackedLinear) and other._packed is None
        other.weight.mul_(2)
        other.bias.mul_(2)
        torch.testing.assert_close(other(hidden), 2 * before)
        assert torch.equal(layer(hidden), before)
    assert calls


def test_a_copy_of_a_target_is_a_model_of_its_own():
    model = build("llama", {"hidden_size": 128, "intermediate_size": 256})
    wrap_target(model)
    ids_1T = torch.arange(6)[None] + 3
    with torch.no_grad():
        before = model(ids_1T).logits
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(ids_1T).logits.any()
        assert torch.equal(model(ids_1T).logits, before)
        assert torch.equal(pickled(model)(ids_1T).logits, before)


def test_layers_inside_a_module_are_replaced_and_keep_their_parameters():
    layer = nn.Linear(128, 256)
    module = nn.Sequential(layer, nn.Sequential(layer, nn.Linear(256, 128)), nn.Linear(8, 8))
    before = module.state_dict()
    pack_linears(module)
    assert type(module[0]) is type(module[1][1]) is PackedLinear and module[0] is module[1][0]
    assert type(module[2]) is nn.Linear and module[0].weight is layer.weight
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].data_ptr() == value.data_ptr() for name, value in before.items())
