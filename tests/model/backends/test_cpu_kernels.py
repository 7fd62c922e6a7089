"""The functions in C against PyTorch's operations, and what happens where they cannot be built."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from torch import Tensor

from headstart.model.backends.int8 import Int8
from headstart.model.backends.kernels.cpu.build import COARSE, FINE, kernel_hash
from headstart.model.backends.kernels.cpu.functions import (
    ActivationFormat,
    Activations,
    CpuKernels,
    KeysValues,
    load_kernels,
)
from headstart.model.backends.linear import BF16Linear
from headstart.model.backends.torch_ops import TORCH_OPS, grouped_attention
from headstart.model.target.load import wrap_target

ROWS = [(1, 1), (3, 20), (7, 576), (90, 600)]


def kernels() -> CpuKernels:
    known = load_kernels()
    assert known is not None
    return known


def levels_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse and fine levels R x K, by PyTorch, and the scales."""
    scale_R1 = values.abs().amax(-1, keepdim=True).clamp_min(1e-30).div(COARSE)
    steps = values / scale_R1
    return torch.stack([steps.round(), ((steps - steps.round()) * FINE).round()]), scale_R1


def test_int8_levels_are_those_of_pytorch_to_the_last_bit() -> None:
    for rows, width in ROWS:
        values = torch.randn(rows, width) * torch.logspace(-8, 8, rows)[:, None]
        values[-1, width // 2 :] = 0
        made = Activations(torch.Size([rows]), width, ActivationFormat.INT8)
        kernels().convert(values, made)
        expected, expected_scales = levels_of(values)
        ours = made.values.view(rows, 2, -1).transpose(0, 1).float() - FINE
        assert torch.equal(ours[..., :width], expected) and bool((ours[..., width:] == 0).all())
        assert made.scales_R is not None
        assert torch.equal(made.scales_R[:, None], expected_scales)


@pytest.mark.parametrize("outputs", [1, 50, 64, 130, 576])
@pytest.mark.parametrize("bias", [False, True])
def test_int8_products_are_exact(bias: bool, outputs: int) -> None:
    for rows, width in ROWS:
        weight_VK = torch.randn(outputs, width)
        bias_V = torch.randn(outputs) if bias else None
        product = Int8(weight_VK, bias_V)
        hidden = torch.randn(rows, width)
        (coarse, fine), scales = levels_of(hidden)
        scale_V = weight_VK.double().abs().amax(1) / 127
        levels = (weight_VK / scale_V[:, None]).round()
        sums = (coarse.double() @ levels.T).float() + (fine.double() @ levels.T).float() / FINE
        expected = sums * (scales * scale_V.float())
        expected = expected if bias_V is None else expected + bias_V
        assert torch.equal(product(hidden), expected)
        alone = [product(one[None]) for one in hidden]
        assert torch.equal(torch.cat(alone), expected)


@pytest.mark.parametrize("outputs", [1, 50, 64, 130])
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_half_precision(bias: bool, outputs: int) -> None:
    for rows, width in [(1, 2), (3, 20), (7, 576), (90, 600)]:
        weight_VK = torch.randn(outputs, width).bfloat16()
        bias_V = torch.randn(outputs).bfloat16() if bias else None
        product, hidden = BF16Linear(weight_VK, bias_V), torch.randn(rows, width).bfloat16()
        expected = hidden.double() @ weight_VK.double().T
        expected = expected if bias_V is None else expected + bias_V
        ours = product(hidden)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(torch.cat([product(one[None]) for one in hidden]), ours)


def test_half_precision_is_rounded_as_pytorch_rounds() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])])
    values = torch.cat([values, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3e38, 1e-40])])
    made = Activations(torch.Size([1]), len(values), ActivationFormat.BFLOAT16)
    kernels().convert(values[None], made)
    half = made.values[0]
    assert torch.equal(half, values.bfloat16()) or torch.allclose(
        half.float(), values.bfloat16().float(), rtol=0, atol=0, equal_nan=True
    )


def attend(
    exact: bool, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, seen: int
) -> Tensor:
    """B x N x H x C, of queries B x N x H x C."""
    scale = queries.shape[-1] ** -0.5
    cache, out = KeysValues(keys, values), torch.empty_like(queries)
    return kernels().attend(queries, cache, seen, mask, scale, out, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("channels", [4, 33, 64, 80, 128])
def test_attention(channels: int, exact: bool, dtype: torch.dtype) -> None:
    for batch, new, heads, groups, seen in [(1, 1, 9, 3, 1), (1, 5, 4, 4, 31), (3, 9, 6, 2, 300)]:
        queries = 3 * torch.randn(batch, new, heads, channels)
        keys, values = torch.randn(2, batch, groups, seen + 40, channels).to(dtype)
        mask = torch.zeros(batch, new, seen).masked_fill_(
            torch.rand(batch, new, seen) < 0.4, -torch.inf
        )
        mask[:, :, 0] = 0
        mask[0, 0, 0] = -1.5  # an additive mask can say more than whether
        for given in (mask, None):
            ours = attend(exact, queries, keys, values, given, seen)
            theirs = grouped_attention(
                queries.transpose(1, 2).double(),
                keys[:, :, :seen].double(),
                values[:, :, :seen].double(),
                None if given is None else given[:, None].double(),
            ).transpose(1, 2)
            tolerance = 1e-7 if exact else 1e-5
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("exact", [True, False])
def test_what_a_row_does_not_see_is_as_if_it_were_not_there(exact: bool) -> None:
    keys, values = torch.randn(2, 1, 1, 64, 16)
    queries = torch.randn(1, 1, 1, 16)
    mask = torch.zeros(1, 1, 50)
    mask[..., 20:] = -torch.inf
    values[..., 20:, :] = 1e30
    hidden = attend(exact, queries, keys, values, mask, 50)
    assert torch.equal(hidden, attend(exact, queries, keys, values, None, 20))


@pytest.fixture
def rebuilt() -> Iterator[None]:
    for known in (load_kernels, kernel_hash):
        known.cache_clear()
    yield
    for known in (load_kernels, kernel_hash):
        known.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "why"),
    [("/nowhere/cc", "No such file"), ("false", "false failed"), ("", "no C compiler")],
)
def test_without_a_compiler_it_says_so_and_goes_on(
    compiler: str, why: str, rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=f"(?s)cannot be built.*{why}.*Install a C compiler"):
        target = wrap_target(FAMILIES["llama"]())
    assert target.backend is not None and target.backend.ops is TORCH_OPS


def test_code_that_does_not_compile_is_told_with_the_compilers_words(
    rebuilt: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.FLAGS", "-no-such-flag")
    with pytest.warns(UserWarning, match="no-such-flag"):
        assert load_kernels() is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one way only")
@pytest.mark.parametrize("flags", ["-mavx2 -mfma", ""])
def test_older_processors_compute_the_same(
    flags: str, rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = torch.randn(9, 100), torch.randn(70, 100), torch.randn(70)
    expected = Int8(weight, bias)(hidden)
    load_kernels.cache_clear()
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.ATTEMPTS", (flags,))
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    assert torch.equal(Int8(weight, bias)(hidden), expected)
    in_bf16 = BF16Linear(weight.bfloat16(), None)(hidden.bfloat16()).double()
    product = hidden.bfloat16().double() @ weight.bfloat16().double().T
    torch.testing.assert_close(in_bf16, product, rtol=1e-5, atol=1e-4)
    model = FAMILIES["llama"]()
    ids_1T = torch.arange(9)[None]
    seen = wrap_target(model).forward(ids_1T, wrap_target(model).new_cache(1))
    torch.testing.assert_close(seen.logits_BTV, model(ids_1T).logits, rtol=1e-3, atol=1e-3)


def test_what_is_no_number_stays_none() -> None:
    hidden = torch.randn(3, 40)
    hidden[0, 7], hidden[1] = torch.nan, torch.inf
    result = Int8(torch.randn(5, 40), None)(hidden)
    assert bool(result[:2].isnan().all()) and bool(result[2].isfinite().all())


def test_a_compiler_may_have_arguments(
    rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    monkeypatch.setenv("CC", "gcc -pipe")
    assert load_kernels() is not None


def test_a_damaged_file_is_built_again_and_a_good_one_needs_no_compiler(
    rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    damaged = tmp_path / "kernels" / f"{kernel_hash()}.so"
    damaged.parent.mkdir()
    damaged.write_text("half of")
    assert load_kernels() is not None
    load_kernels.cache_clear()
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert load_kernels() is not None


def test_a_cache_that_cannot_be_written_to_is_done_without(
    rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").write_text("a file where the folder should be")
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    assert load_kernels() is not None


def test_a_compiler_that_knows_less_is_told(
    rebuilt: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    monkeypatch.setattr(
        "headstart.model.backends.kernels.cpu.build.ATTEMPTS", ("-no-such-flag", "-fopenmp")
    )
    with pytest.warns(UserWarning, match="does not know -no-such-flag.*use -fopenmp"):
        assert load_kernels() is not None


def test_it_is_built_once(rebuilt: None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headstart.model.backends.kernels.cpu.build.cache_folder", lambda: tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_kernels() is not None
        (kept,) = (tmp_path / "kernels").iterdir()
        made = kept.stat().st_mtime_ns
        load_kernels.cache_clear()
        assert load_kernels() is not None
    assert [file.stat().st_mtime_ns for file in (tmp_path / "kernels").iterdir()] == [made]


def test_what_a_kernel_cannot_read_is_refused() -> None:
    hidden, weight = torch.randn(3, 8), torch.ones(8)
    out = Activations(torch.Size([3]), 8, ActivationFormat.FLOAT32)
    kernels().residual_norm(hidden, None, weight, 1e-5, out)
    wrong = [
        (hidden.double(), None, weight, out),
        (torch.randn(8, 3).T, None, weight, out),
        (hidden, torch.randn(3, 9), weight, out),
        (hidden, torch.randn(3, 8).half(), weight, out),
        (hidden, None, torch.ones(7), out),
        (hidden, None, weight, Activations(torch.Size([3]), 9, ActivationFormat.FLOAT32)),
    ]
    for given, added, scale, room in wrong:
        with pytest.raises(ValueError, match=r"kernel was given|does not fit"):
            kernels().residual_norm(given, added, scale, 1e-5, room)
    keys, queries = torch.randn(1, 2, 10, 8), torch.randn(1, 3, 4, 8)
    for pair, visible in (
        ((keys, keys.bfloat16()), 10),
        ((keys.mT.contiguous().mT, keys.mT.contiguous().mT), 10),
        ((keys, keys), 11),
        ((keys[..., :4], keys[..., :4]), 10),
    ):
        with pytest.raises(ValueError, match="do not take such"):
            kernels().attend(queries, KeysValues(*pair), visible, None, 1.0, queries.clone())
