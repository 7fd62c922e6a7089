"""`FusedDecoder` with each kind of ops, against the modules of models built like Llama."""

from __future__ import annotations

import copy

import pytest
import torch
from bit_equality import check_bits
from decoder_reads import LIKE_LLAMA, OTHERS, a_tree, reads
from families import FAMILIES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from headstart.model.backends.cpu_ops import MAX_NEW, CpuOps
from headstart.model.backends.fused_decoder import FusedDecoder
from headstart.model.backends.linear import MAX_ROWS
from headstart.model.backends.select import select_backend
from headstart.model.backends.torch_ops import TORCH_OPS
from headstart.model.backends.visibility import AttentionWindows
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target


def outputs_by_ops(target: Target, batch: int) -> list[list[Tensor]]:
    """Outputs with the kernels, with the reference, and of the model's own modules."""
    fused = target.backend
    assert fused is not None and isinstance(fused.ops, CpuOps)
    kernels, outputs = fused.ops, []
    for backend, ops in ((fused, kernels), (fused, TORCH_OPS), (None, kernels)):
        target.backend, fused.ops = backend, ops
        outputs.append(reads(target, batch))
    return outputs


def selected(model: PreTrainedModel) -> FusedDecoder | None:
    windows = AttentionWindows.of(model.config)
    return select_backend(model.model, model.model.layers, model.config, windows)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_outputs_are_those_of_the_modules(family: str, batch: int) -> None:
    target = wrap_target(FAMILIES[family]())
    *fused, modules = outputs_by_ops(target, batch)
    for seen in fused:
        assert len(seen) == len(modules) == 6
        for ours, theirs in zip(seen, modules, strict=True):
            close = {"rtol": 1e-3, "atol": 1e-4 * float(theirs.abs().max())}
            torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_bfloat16_is_nearer_to_float32_than_the_modules_are(family: str, batch: int) -> None:
    model = FAMILIES[family]().bfloat16()
    exact = reads(wrap_target(copy.deepcopy(model).float()), batch)
    errors = []
    for seen in outputs_by_ops(wrap_target(model), batch):
        assert all(part.dtype == torch.bfloat16 for part in seen)
        pairs = zip(seen, exact, strict=True)
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert errors[0] < 1.1 * errors[2] and errors[1] < 1.8 * errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("family", OTHERS)
def test_what_computes_otherwise_keeps_its_modules(family: str) -> None:
    assert wrap_target(FAMILIES[family]()).backend is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_difference_far_out_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some families scale their queries from some position on."""
    model = FAMILIES["llama"]().eval().to(dtype)
    layer = model.model.layers[1].self_attn
    whole = type(layer).forward

    def scaled(self, hidden_states, position_embeddings, **rest):  # type: ignore[no-untyped-def]
        far = rest["position_ids"].max() > 100
        return whole(self, hidden_states * (1.02 if far else 1.0), position_embeddings, **rest)

    monkeypatch.setattr(type(layer), "forward", scaled)
    assert selected(model) is None
    monkeypatch.undo()
    assert selected(model) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changed_weights_are_seen(dtype: torch.dtype) -> None:
    target = wrap_target(
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=96,
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        ).to(dtype)
    )
    assert target.backend is not None
    before = reads(target, 1)
    with torch.no_grad():
        target.model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        target.model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        target.model.model.layers[0].input_layernorm.weight.mul_(3)
    after = reads(target, 1)
    assert not torch.allclose(before[1], after[1])
    target.backend = None
    close = (1e-3, 1e-4) if dtype == torch.float32 else (0.05, 0.05)
    torch.testing.assert_close(after, reads(target, 1), rtol=close[0], atol=close[1])


def test_long_texts_take_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    target = wrap_target(FAMILIES["llama"]())
    assert target.backend is not None
    forward, rows = target.backend.forward, []
    monkeypatch.setattr(
        target.backend,
        "forward",
        lambda ids_BN, *rest: rows.append(ids_BN.numel()) or forward(ids_BN, *rest),
    )
    for shape in ((8, MAX_ROWS // 8), (1, MAX_ROWS + 1), (16, MAX_ROWS // 8), (1, 1)):
        target.forward(torch.ones(shape, dtype=torch.int64), target.new_cache(shape[0]))
    assert rows == [MAX_ROWS, 1]
    cache = target.new_cache(16)
    target.forward(torch.ones(16, 1, dtype=torch.int64), cache)
    cache.commit(None, torch.ones(16, dtype=torch.int64))
    # Behind a text all reads go one way, so that rounding does not depend on the tree.
    target.forward(a_tree(torch.ones(16, dtype=torch.int64)), cache)
    target.forward(torch.ones(16, MAX_ROWS, dtype=torch.int64), cache)
    assert rows[2:] == [16, 112, 16 * MAX_ROWS]
    with torch.autocast("cpu", torch.bfloat16):  # the functions in C would not notice
        target.forward(torch.ones(1, 1, dtype=torch.int64), target.new_cache(1))
    assert len(rows) == 5


def test_an_activation_unknown_to_the_kernels_keeps_pytorchs_operations() -> None:
    model = FAMILIES["llama"]()
    model.config.hidden_act = "gelu"
    target = wrap_target(type(model)(model.config))
    assert target.backend is not None and target.backend.ops is TORCH_OPS


@pytest.mark.parametrize("more", [0, 1 + MAX_NEW])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_bfloat16_trees_give_the_bits_of_single_tokens(family: str, more: int) -> None:
    check_bits(wrap_target(FAMILIES[family]().bfloat16()), 11, more)


def test_layers_that_cannot_be_widened_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]().eval().bfloat16()
    calls, whole = [], torch.Tensor.float

    def narrow(weight: Tensor) -> Tensor:
        calls.append(weight)
        if len(calls) % 4 == 3:
            raise torch.OutOfMemoryError("for a test")
        return whole(weight)

    monkeypatch.setattr(torch.Tensor, "float", narrow)
    assert selected(model) is None
    monkeypatch.undo()
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
