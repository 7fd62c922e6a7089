"""`TritonOps` and its kernels. Without a GPU, Triton's interpreter runs them on a CPU, and its
compiler shows that they would run on one. test_ops.py compares each operation with the reference.

Legend: B batch rows, N new rows, M pending columns, S columns, H query heads, G key/value heads,
C head channels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from decoder_reads import LIKE_LLAMA, OTHERS, reads
from decoding import SHAPES, answers
from families import FAMILIES, prompts
from processes import HELPERS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.backends import cuda_ops, select
from headstart.model.backends.cuda_ops import TritonOps
from headstart.model.backends.linear import FusedLinear
from headstart.model.backends.torch_ops import TORCH_OPS
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.heads.common.cached_attention import DraftVisibility
from headstart.model.heads.common.layers import MLP, Attention, LayerConfig, use_ops
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target

pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for GPUs")
from headstart.model.backends.kernels import triton as kernels
from headstart.model.backends.kernels.triton import attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


OPS = TritonOps(kernels)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are given these operations wherever they are."""
    monkeypatch.setattr(select, "select_ops", lambda device: OPS)


def has_triton(target: Target) -> bool:
    return target.backend is not None and target.backend.ops is OPS


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    error = float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())
    assert error < tolerance, error


# batch, new rows, heads, groups, channels, columns, pending
SIZES = [
    (1, 1, 4, 2, 8, 70, 1),
    (1, 5, 6, 2, 64, 300, 5),  # several parts
    (3, 8, 4, 4, 16, 200, 11),
    (2, 1, 9, 3, 80, 600, 1),  # channels are no power of two
    (2, 3, 4, 2, 32, 40, 0),  # only what is committed
    (1, 48, 4, 2, 16, 130, 48),  # more rows than a program takes
]


def dense(pending_BNM: Tensor, lengths_B: Tensor, columns: int) -> Tensor:
    """B x N x S, written down column by column."""
    batch, new, pending = pending_BNM.shape
    mask_BNS = torch.zeros(batch, new, columns, dtype=torch.bool, device=pending_BNM.device)
    for row, length in enumerate(lengths_B.tolist()):
        mask_BNS[row, :, :length] = True
        mask_BNS[row, :, length : length + pending] = pending_BNM[row]
    return mask_BNS


@pytest.mark.parametrize("sizes", SIZES)
def test_attention(sizes: tuple[int, ...]) -> None:
    batch, new, heads, groups, channels, columns, pending = sizes
    queries_BNHC = torch.randn(batch, new, heads, channels, device=DEVICE)
    keys, values = torch.randn(2, batch, groups, columns, channels, device=DEVICE)
    lengths_B = torch.randint(1, columns - pending, (batch,), device=DEVICE)
    lengths_B[0] = columns - pending  # up to the last column
    keys[-1, :, lengths_B[-1] + pending :] = torch.nan  # never read
    pending_BNM = torch.rand(batch, new, pending, device=DEVICE) < 0.5
    ours = kernels.attend(queries_BNHC, (keys, values), lengths_B, pending_BNM, 0.2, columns)
    theirs = F.scaled_dot_product_attention(
        queries_BNHC.transpose(1, 2),
        keys.nan_to_num().repeat_interleave(heads // groups, 1),
        values.repeat_interleave(heads // groups, 1),
        attn_mask=dense(pending_BNM, lengths_B, columns)[:, None],
        scale=0.2,
    )
    close(ours, theirs.transpose(1, 2))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_heads(normed: bool, bias: bool) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LayerConfig(**sizes, **heads, attention_bias=bias, qk_norm=normed)
    attention, mlp = Attention(config, 48).to(DEVICE), MLP(config).to(DEVICE)
    if normed:
        nn.init.uniform_(attention.q_norm.weight), nn.init.uniform_(attention.k_norm.weight)
    given: list[Tensor] = []

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        given.extend((queries, keys, values))
        return queries * 2

    hidden_BND, positions_BN = torch.randn(3, 5, 48, device=DEVICE), torch.arange(15).view(3, 5) * 9
    positions_BN = positions_BN.to(DEVICE)
    with torch.no_grad():
        theirs = [attention(hidden_BND, positions_BN, attend), mlp(hidden_BND[..., :24]), *given]
        given.clear()
        use_ops(nn.ModuleList([attention, mlp]), OPS)
        ours = [attention(hidden_BND, positions_BN, attend), mlp(hidden_BND[..., :24]), *given]
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)
    with pytest.raises(ValueError, match="has no gradients"):
        mlp(hidden_BND[..., :24].requires_grad_())


def test_attention_of_a_head_asks_for_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(2, 1, torch.device(DEVICE))
    for new in (40, 6):
        cache.reserve(new)
        rows = torch.randn(2, 2, new, 16, device=DEVICE), torch.randn(2, 2, new, 16, device=DEVICE)
        keys, values = cache.update(*rows, 0)
        if new == 40:
            cache.commit(None, torch.tensor([40, 33], device=DEVICE))
    pending_BNM = torch.ones(2, 6, 6, dtype=torch.bool, device=DEVICE).tril()
    queries = torch.randn(2, 4, 6, 16, device=DEVICE)
    visibility = DraftVisibility(cache, pending_BNM)
    theirs = TORCH_OPS.cached_attention(queries, keys, values, visibility)
    monkeypatch.setattr(KVCache, "visible", None)
    with torch.no_grad():
        close(OPS.cached_attention(queries, keys, values, visibility), theirs)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", LIKE_LLAMA)
def test_targets_read_as_their_modules_do(family: str, batch: int) -> None:
    target = wrap_target(FAMILIES[family]().to(DEVICE))
    windows = family in ("mistral", "ministral")
    assert windows or has_triton(target)
    ours = reads(target, batch)
    target.backend = None
    for one, other in zip(ours, reads(target, batch), strict=True):
        close(one, other)


@pytest.mark.parametrize("family", [*OTHERS, "mistral"])
def test_what_computes_otherwise_keeps_its_modules(family: str) -> None:
    assert wrap_target(FAMILIES[family]().to(DEVICE)).backend is None


def test_layers_are_joined_and_nothing_is_held_twice() -> None:
    layers = [nn.Linear(6, size, device=DEVICE) for size in (4, 2, 3)]
    before = [one.weight.detach().clone() for one in layers]
    fused, hidden = FusedLinear(*layers), torch.randn(5, 6, device=DEVICE)
    expected = torch.cat([one(hidden) for one in layers], -1)
    with torch.no_grad():
        close(OPS.linear(hidden, fused), expected)
        assert layers[0].weight.data_ptr() != fused.joined[0].data_ptr()  # not while it computes
        OPS.prepare(fused)
        close(OPS.linear(hidden, fused), expected)
    for one, weight in zip(layers, before, strict=True):
        assert torch.equal(one.weight, weight)
        assert one.weight.untyped_storage().data_ptr() == fused.joined[0].data_ptr()
    with torch.no_grad():
        layers[1].weight += 1  # written to: it is the same memory
        close(OPS.linear(hidden, fused), torch.cat([one(hidden) for one in layers], -1))
        layers[2].weight.data = own = torch.ones(3, 6, device=DEVICE)  # replaced
        close(OPS.linear(hidden, fused), torch.cat([one(hidden) for one in layers], -1))
        assert layers[2].weight.data_ptr() == own.data_ptr()


@pytest.mark.parametrize(("family", "shape"), [("llama", "chain"), ("qwen3", "dynamic")])
@pytest.mark.parametrize("kind", kinds())
def test_a_whole_decode(family: str, kind: str, shape: str) -> None:
    target = wrap_target(FAMILIES[family]().to(DEVICE))
    assert has_triton(target)
    ids_BT, mask_BT = torch.stack(prompts([11, 11])), torch.ones(2, 11, dtype=torch.int64)
    mask_BT[1, :4] = 0
    sampling = SamplingParams(9)
    expected = answers(decode(target, ids_BT, mask_BT, sampling=sampling), 2)
    head = make_head(target, kind, {})
    head.init_from_target()
    head = head.for_decoding(target)
    head.use_ops(OPS)
    config = SpeculativeConfig(head, SHAPES[shape])
    steps = decode(target, ids_BT, mask_BT, sampling=sampling, speculative=config)
    assert answers(steps, 2) == expected
    target.backend = None  # and what its modules say
    assert answers(decode(target, ids_BT, mask_BT, sampling=sampling), 2) == expected


def test_kernels_are_told_apart_by_their_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ops, "load_kernels", lambda device: kernels)
    now = select.kernel_hash(torch.device("cuda"))
    assert now is not None and now != select.kernel_hash(torch.device("cpu"))
    monkeypatch.setattr(cuda_ops, "version", lambda name: "another")
    assert select.kernel_hash(torch.device("cuda")) != now
    monkeypatch.setattr(cuda_ops, "load_kernels", lambda device: None)
    assert select.kernel_hash(torch.device("cuda")) is None


def test_they_compile_for_a_gpu(tmp_path: Path) -> None:
    script = HELPERS / "compile_triton.py"
    fresh = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=os.environ | fresh, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 33


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("words", "width"), [(50, 50), (9000, 5), (4096, 1), (20000, 16)])
def test_the_best_words(words: int, width: int, dtype: torch.dtype) -> None:
    logits_RV = (4 * torch.randn(3, words, device=DEVICE)).to(dtype)  # equals among the halves
    logits_RV[:, 7] = logits_RV.amax(1)
    ours = kernels.topk_logprobs(logits_RV, width, 1.7)
    logp_RV = (logits_RV.float() / 1.7).log_softmax(-1)
    order = logp_RV.sort(dim=-1, descending=True, stable=True)
    close(ours[0], order.values[:, :width])
    assert torch.equal(ours[1], order.indices[:, :width])


def test_words_where_numbers_are_none() -> None:
    """Guesses may be wrong, never impossible."""
    logits_RV = torch.full((2, 9000), torch.nan, device=DEVICE)
    logits_RV[1, :5000] = -torch.inf  # a whole chunk
    logits_RV[1, 5000:] = torch.linspace(0, 1, 4000, device=DEVICE)
    logp_RW, ids_RW = kernels.topk_logprobs(logits_RV, 3, 1.0)
    assert 0 <= int(ids_RW.min()) and int(ids_RW.max()) < 9000
    assert ids_RW[1].tolist() == [8999, 8998, 8997]
    close(logp_RW[1], logits_RV[1].log_softmax(-1)[8997:].flip(0))


def test_rows_of_a_long_prompt_take_no_memory_per_part() -> None:
    """The sums of all parts would take 64 times the queries."""
    made: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.append(out.nbytes if isinstance(out, Tensor) else 0)
            return out

    queries = torch.randn(1, 2000, 64, 8, device=DEVICE)
    keys = torch.randn(1, 1, 9000, 8, device=DEVICE)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(attention, "_attend_part", _Nothing())
    monkey.setattr(attention, "_merge", _Nothing())
    seen = torch.ones(1, 2000, 1, dtype=torch.bool, device=DEVICE)
    lengths_B = torch.tensor([8000], device=DEVICE)
    with Watched():
        kernels.attend(queries, (keys, keys), lengths_B, seen, 1.0, 9000)
    monkey.undo()
    assert max(made) <= 2 * queries.nbytes


class _Nothing:
    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("inputs", [40, 5000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", ["", "norm", "gate"])
def test_a_product_of_one_row(first: str, bias: bool, inputs: int) -> None:
    layer = nn.Linear(inputs, 11, bias=bias, device=DEVICE).requires_grad_(False)
    row_1K = torch.randn(1, inputs * (2 if first == "gate" else 1), device=DEVICE)
    norm = torch.rand(inputs, device=DEVICE), 1e-5
    into = torch.randn(1, 11, device=DEVICE)
    options = {"norm": {"norm": norm}, "gate": {"gated": True}, "": {}}[first]
    values = row_1K
    if first == "norm":
        values = F.rms_norm(row_1K, (inputs,), *norm)
    elif first == "gate":
        values = F.silu(row_1K[:, :inputs]) * row_1K[:, inputs:]
    close(kernels.row_product(row_1K, (layer.weight, layer.bias), **options), layer(values))
    expected = into + layer(values)
    told = kernels.row_product(row_1K, (layer.weight, layer.bias), into=into, **options)
    close(told, expected)
    assert told is into
