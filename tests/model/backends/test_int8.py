"""Quantised targets: the integer product is what it says, and trees stay exact to the last bit."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from bit_equality import check_bits
from families import FAMILIES, build, padded, prompts
from oracle import Oracle
from run_command import pickled
from torch import Tensor, nn

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.backends.cpu_ops import MAX_NEW
from headstart.model.backends.int8 import (
    Int8,
    QuantizedLinear,
    available,
    full_precision,
)
from headstart.model.backends.kernels.cpu.build import FINE
from headstart.model.backends.torch_ops import exact_attention
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.quantize import quantization_report
from headstart.model.target.weights_hash import target_hash
from headstart.model.tree.shape import TreeShape

pytestmark = pytest.mark.skipif(
    not available(), reason="this processor or build of torch has no integer products"
)
# Grouped heads, a bias, norms in several places, windows, partial rotary angles, scaled logits.
EXACT = (
    "llama",
    "llama_tied",
    "mistral",
    "qwen2",
    "qwen2_windows",
    "qwen3",
    "gemma",
    "gemma3_text",
    "phi",
    "olmo2",
    "cohere2",
    "granite",
    "gpt_neox",
    "opt",
)
SHAPES = {
    "chain": TreeShape.chain(4),
    "static": TreeShape.static([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 1, 0]]),
    "dynamic": TreeShape.dynamic(nodes=10, depth=4, width=3),
}


def whole_numbers(rows: int, columns: int, width: int) -> tuple[Tensor, Tensor]:
    """Activations in 64ths up to 63 and weights up to 127, both with their largest in each row, so
    that neither is rounded."""
    hidden_RK = torch.randint(-63 * FINE, 63 * FINE + 1, (rows, width)) / FINE
    weight_VK = torch.randint(-127, 128, (columns, width)).float()
    hidden_RK[:, 0], weight_VK[:, 0] = 63, -127
    return hidden_RK, weight_VK


@pytest.mark.parametrize("width", [1, 31, 64, 576, 1536])
def test_products_of_whole_numbers_are_exact(width):
    hidden_RK, weight_VK = whole_numbers(9, 70, width)
    exact_RV = (hidden_RK * FINE).long() @ weight_VK.long().T
    assert torch.equal(Int8(weight_VK, None)(hidden_RK), (exact_RV.double() / FINE).float())


@pytest.mark.parametrize("hidden_sign", [1, -1])
@pytest.mark.parametrize("weight_sign", [1, -1])
def test_the_largest_numbers_do_not_overflow(hidden_sign, weight_sign):
    """Pairs of products are added in 16 bits on processors without VNNI."""
    hidden_RK = torch.full((5, 1536), 63.0 * hidden_sign)
    weight_VK = torch.full((40, 1536), 127.0 * weight_sign)
    expected = 63.0 * 127 * 1536 * hidden_sign * weight_sign
    assert torch.equal(Int8(weight_VK, None)(hidden_RK), torch.full((5, 40), expected))


def test_both_sides_are_rounded_to_the_nearest_level():
    hidden_RK = torch.randn(20, 300) * torch.logspace(-6, 6, 20)[:, None]
    weight_VK = torch.randn(50, 300) * torch.logspace(-3, 3, 50)[:, None]
    scale_V1 = weight_VK.abs().amax(1, keepdim=True).double() / 127
    levels_VK = (weight_VK.double() / scale_V1).round()
    step_R1 = hidden_RK.abs().amax(1, keepdim=True).double() / (63 * FINE)
    errors_RV = Int8(weight_VK, None)(hidden_RK) - hidden_RK.double() @ (levels_VK * scale_V1).T
    largest_RV = step_R1 / 2 * (levels_VK.abs() * scale_V1).sum(1)
    assert bool((errors_RV.abs() < 1.01 * largest_RV).all())
    assert float(errors_RV.abs().max()) > 0  # or nothing was rounded


def test_zeros_and_a_bias():
    weight_VK, bias_V = torch.randn(6, 20), torch.randn(6)
    weight_VK[2] = 0
    result_RV = Int8(weight_VK, bias_V)(torch.cat([torch.zeros(1, 20), torch.ones(1, 20)]))
    assert torch.equal(result_RV[0], bias_V)
    assert result_RV[1, 2] == bias_V[2] and result_RV[1, 3] != bias_V[3]
    assert Int8(weight_VK, None)(torch.zeros(2, 0, 20)).shape == (2, 0, 6)


@pytest.mark.parametrize("width", [30, 64, 576, 1536])
def test_a_row_is_the_same_alone_and_among_others(width):
    product = Int8(torch.randn(100, width), torch.randn(100))
    hidden_RK = torch.randn(3, 23, width) * torch.logspace(-3, 3, 23)[:, None]
    together = product(hidden_RK)
    for batch in range(3):
        for row in range(23):
            alone = product(hidden_RK[batch, row])
            assert torch.equal(alone, together[batch, row])


def test_attention_is_the_same_for_a_node_and_for_a_token():
    """A node's columns lie between those of other branches."""
    old, nodes = 150, 12
    queries = torch.randn(1, 6, nodes, 16)
    keys, values = torch.randn(1, 2, old + nodes, 16), torch.randn(1, 2, old + nodes, 16)
    mask = torch.full((1, 1, nodes, old + nodes), torch.finfo(torch.float32).min)
    paths = [[*range(old), *range(old + node % 3, old + node + 1, 3)] for node in range(nodes)]
    for node, path in enumerate(paths):
        mask[0, 0, node, path] = 0
    together = exact_attention(queries, keys, values, mask)
    for node, path in enumerate(paths):
        alone = exact_attention(
            queries[:, :, node : node + 1], keys[:, :, path], values[:, :, path], None
        )
        assert torch.equal(alone, together[:, :, node : node + 1])


@pytest.mark.parametrize("masked", ["no mask", "boolean", "additive"])
@pytest.mark.parametrize("new", [1, 7, 100])
def test_attention_of_a_text_is_the_usual_one(new, masked):
    queries, keys, values = (torch.randn(2, heads, new, 8) for heads in (4, 2, 2))
    seen = torch.ones(2, 1, new, new, dtype=torch.bool).tril()
    mask = {"no mask": None, "boolean": seen, "additive": (~seen) * -1e30}[masked]
    expected = nn.functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(exact_attention(queries, keys, values, mask, 0.3), expected)


def told(steps) -> list[list[int]]:
    """The answers of a batch."""
    return [list(chain.from_iterable(parts)) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize("family", EXACT)
def test_trees_write_what_plain_decoding_writes(family):
    target = wrap_target(FAMILIES[family](), quantize="int8")
    side = accepted = 0
    for seed, lengths in enumerate([[13], [11, 4, 17], [70]]):
        ids_BT, lengths_B = padded(prompts(lengths, seed))
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        expected = told(decode(target, ids_BT, mask_BT, sampling=SamplingParams(20)))
        for shape in SHAPES.values():
            oracle = Oracle(target, expected)
            steps = decode(
                target,
                ids_BT,
                mask_BT,
                sampling=SamplingParams(20),
                speculative=SpeculativeConfig(oracle, shape),
            )
            passes = list(steps)
            assert told(passes) == expected
            accepted += 20 - len(passes)
            side += oracle.side_branches
    assert accepted > 20 and side > 2


@pytest.mark.parametrize("more", [0, 1 + MAX_NEW])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "olmo2"])
def test_a_tree_gives_the_bits_of_single_tokens(family, more):
    check_bits(wrap_target(FAMILIES[family](), quantize="int8"), 25, more)


def test_what_is_saved_and_hashed_stays():
    model = build("llama", {"tie_word_embeddings": True})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = target_hash(wrap_target(copy.deepcopy(model)))
    target = wrap_target(model, quantize="int8")
    target.forward(prompts([9])[0][None])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert target_hash(target) == expected
    linears = [one for one in model.modules() if isinstance(one, nn.Linear)]
    assert len(linears) == 15 and {type(one) for one in linears} == {QuantizedLinear}


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_makes_its_own_integers(copied):
    model = wrap_target(build("llama", {}), quantize="int8").model
    ids_1T = prompts([9])[0][None]
    before = model(ids_1T).logits
    other = copied(model)
    assert torch.equal(other(ids_1T).logits, before)
    for one in copied(model), model:
        one.lm_head.weight.data.zero_()
    assert torch.equal(model(ids_1T).logits, before)  # as documented: made once
    assert not copied(model)(ids_1T).logits.any()


def test_the_report_compares_with_the_float32_weights():
    model = build("llama", {})
    texts = prompts([40, 25])
    full = [model.requires_grad_(False)(text_T[None]).logits[0].log_softmax(-1) for text_T in texts]
    target = wrap_target(model, quantize="int8")
    ours = [model(text_T[None]).logits[0].log_softmax(-1) for text_T in texts]
    report = quantization_report(model, texts)
    full_TV, ours_TV = torch.cat(full), torch.cat(ours)
    divergence = nn.functional.kl_div(ours_TV, full_TV, log_target=True, reduction="sum") / 65
    assert report.tokens == 65
    assert report.divergence == pytest.approx(float(divergence), rel=1e-3) and divergence > 1e-5
    agreement = (full_TV.argmax(-1) == ours_TV.argmax(-1)).float().mean()
    assert report.agreement == pytest.approx(float(agreement))
    with full_precision(target.model):
        torch.testing.assert_close(model(texts[0][None]).logits[0].log_softmax(-1), full[0])
    assert torch.equal(model(texts[0][None]).logits[0].log_softmax(-1), ours[0])


def test_gradients_are_refused():
    target = wrap_target(build("llama", {}), quantize="int8")
    hidden_BD = torch.randn(1, target.hidden_size, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients"):
        target.unembed(hidden_BD)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("gpt2", "outside plain linear layers"),
        ("mixtral", "outside plain linear layers"),
        ("gemma2", "softcap"),
    ],
)
def test_other_families_are_refused(family, why):
    with pytest.raises(ValueError, match=why):
        wrap_target(FAMILIES[family](), quantize="int8")


def test_an_attention_of_its_own_is_refused(monkeypatch):
    model = build("llama", {})
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ValueError, match="attention in its own way"):
        wrap_target(model, quantize="int8")


def test_other_types_and_kinds_are_refused():
    with pytest.raises(ValueError, match="bfloat16 weights on cpu"):
        wrap_target(build("llama", {}).bfloat16(), quantize="int8")
    with pytest.raises(ValueError, match=r"int4.*There is: int8"):
        wrap_target(build("llama", {}), quantize="int4")


def test_without_a_compiler_it_is_refused_and_heads_draft_in_floats(monkeypatch):
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.functions.load_kernels", lambda: None)
    with pytest.raises(ValueError, match="Install gcc or clang"):
        wrap_target(build("llama", {}), quantize="int8")
    assert not wrap_target(build("llama", {})).drafts_in_int8


@pytest.mark.slow
def test_a_real_model_stays_itself_and_exact(smollm2):
    from benchmarking import benchmark

    from headstart.model.checkpoint.head import load_head
    from headstart.scripts.options.default_checkpoint import shipped_head
    from headstart.scripts.options.prompts import decodable, first_turns

    target = load_target(smollm2, dtype="float32", quantize="int8")
    head = load_head(shipped_head(), target)
    ids = first_turns(target, decodable("heldout", 3, target))
    report = quantization_report(target.model, [torch.tensor(one) for one in ids])
    assert report.agreement > 0.93 and report.divergence < 0.02
    results = benchmark(target, {"mtp": SpeculativeConfig(head)}, ids, max_new_tokens=16)
    assert results["mtp"].identical == 3, results["mtp"].differences
    assert results["mtp"].stats.acceptance_length > 1.3
