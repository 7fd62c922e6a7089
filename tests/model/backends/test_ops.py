"""Each implementation of `Ops` against the reference in torch: C on a CPU, and Triton, which its
interpreter runs on a CPU where there is no GPU.

Legend: as in ops.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headstart.model.backends.cpu_ops import MAX_NEW, cpu_ops
from headstart.model.backends.fused_decoder import Norm
from headstart.model.backends.linear import FusedLinear
from headstart.model.backends.ops import AttentionSpec
from headstart.model.backends.rotary import Rotary
from headstart.model.backends.torch_ops import TORCH_OPS, TorchOps
from headstart.model.backends.visibility import AttentionWindows, Visibility
from headstart.model.cache.kv_cache import KVCache
from headstart.model.tree.grow import Frontier, grow
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

NAMES = ("cpu", "triton")
FULL = AttentionWindows(("full_attention",))
SHAPES = [(1, 1), (1, 7), (3, 5)]  # batch, new positions: one row has kernels of its own on a GPU


@pytest.fixture(params=NAMES)
def ops(request: pytest.FixtureRequest) -> TorchOps:
    if request.param == "cpu":
        return cpu_ops()
    pytest.importorskip("triton", reason="Triton is not installed: it comes with PyTorch for GPUs")
    from headstart.model.backends.cuda_ops import TritonOps
    from headstart.model.backends.kernels import triton

    return TritonOps(triton)


@pytest.fixture
def device(ops: TorchOps) -> torch.device:
    on_a_gpu = torch.cuda.is_available() and ops is not cpu_ops()
    return torch.device("cuda" if on_a_gpu else "cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def linears(device: torch.device, inputs: int, *outputs: int, bias: bool = False) -> FusedLinear:
    return FusedLinear(*(nn.Linear(inputs, one, bias=bias, device=device) for one in outputs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_of_the_residual_stream(
    ops: TorchOps, device: torch.device, shape: tuple[int, int], bias: bool
) -> None:
    """Norm, product, gate, product: twice, so that what is added is normed."""
    norm = Norm(torch.rand(24, device=device), 1e-5)
    gate_up, down = linears(device, 24, 40, 40, bias=bias), linears(device, 40, 24)
    plain = linears(device, 24, 24)

    def block(one: TorchOps, hidden: Tensor) -> list[Tensor]:
        hidden, outputs, added = one.residual_stream(hidden.clone()), [], None
        for _ in range(2):
            hidden, both = one.norm_linear(hidden, added, norm, gate_up)
            added = one.gated_linear_add(both, F.silu, down, hidden)
            hidden, single = one.norm_linear(hidden, added, norm, plain)
            added = one.linear_add(single, plain, hidden)
            outputs += [both, single]
        return [*outputs, *one.add_norm(hidden, added, norm)]

    hidden_BND = torch.randn(*shape, 24, device=device)
    for ours, theirs in zip(block(ops, hidden_BND), block(TORCH_OPS, hidden_BND), strict=True):
        close(ours, theirs)


def spec_of(normed: bool, device: torch.device) -> AttentionSpec:
    norms = [Norm(torch.rand(16, device=device), 1e-5) if normed else None for _ in range(2)]
    return AttentionSpec(4, 2, 16, 0.3, *norms)


@pytest.mark.parametrize(("nodes", "normed"), [(1, False), (9, True), (70, False)])
def test_attention_of_a_tree_behind_a_ragged_batch(
    ops: TorchOps, device: torch.device, nodes: int, normed: bool
) -> None:
    if nodes > MAX_NEW and ops is not cpu_ops():
        pytest.skip("only a CPU computes many new positions in another way")
    spec, rotary = spec_of(normed, device), Rotary(16, 500.0)
    prompt_BNE = torch.randn(3, 9, 8 * 16, device=device)
    tree_BNE = torch.randn(3, nodes, 8 * 16, device=device)
    parents_N = torch.tensor([-1, *(node // 3 for node in range(nodes - 1))], device=device)
    parents_BN = parents_N.expand(3, -1)
    tree = Tree(parents_BN, parents_BN, parents_BN.float())
    results = []
    for one in (ops, TORCH_OPS):
        cache = KVCache(3, 1, device)
        outputs = []
        for qkv, drafted in ((prompt_BNE, None), (tree_BNE, tree)):
            new = qkv.shape[1]
            cache.reserve(new)
            depths_BN = torch.arange(new, device=device).expand(3, -1)
            depths_BN = depths_BN if drafted is None else drafted.depths_BN
            visibility = Visibility(depths_BN, drafted, cache, FULL)
            cos_sin = rotary.cos_sin(depths_BN + cache.lengths_B[:, None], qkv.dtype)
            context = one.begin(visibility, cos_sin, (3, new), qkv.dtype)
            outputs.append(one.attend(qkv, spec, context, cache.kv_layers[0]))
            cache.commit(None, torch.tensor([9, 6, 2], device=device).clamp(max=new))
        results.append(outputs)
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotated_queries_keys_and_values(
    ops: TorchOps, device: torch.device, shape: tuple[int, int], normed: bool
) -> None:
    spec, rotary = spec_of(normed, device), Rotary(16, 500.0)
    qkv_BNE = torch.randn(*shape, 8 * 16, device=device)
    for start in (0, 900, 4):
        positions_BN = torch.arange(shape[1], device=device)[None] + start
        rotated = [
            one.rotate(qkv_BNE, spec, one.rope(rotary, positions_BN, qkv_BNE))
            for one in (ops, TORCH_OPS)
        ]
        for ours, theirs in zip(*rotated, strict=True):
            close(ours, theirs)


def test_norm_linear_and_gate(ops: TorchOps, device: torch.device) -> None:
    norm, linear = Norm(torch.rand(24, device=device), 1e-5), linears(device, 24, 10, 6)
    hidden = torch.randn(2, 3, 24, device=device)
    before = hidden.clone()
    close(ops.rms_norm(hidden, norm), TORCH_OPS.rms_norm(hidden, norm))
    close(ops.linear(hidden, linear), TORCH_OPS.linear(hidden, linear))
    close(ops.gate(hidden, F.silu), TORCH_OPS.gate(hidden, F.silu))
    assert torch.equal(hidden, before)


def test_top_k_and_argmax(ops: TorchOps, device: torch.device) -> None:
    logits = torch.randn(2, 3, 9000, device=device)
    for width in (1, 5, 40):
        ours = ops.topk_logprobs(logits, width, 1.7)
        theirs = TORCH_OPS.topk_logprobs(logits, width, 1.7)
        close(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    for scores in (logits, logits.bfloat16(), torch.zeros(2, 700, device=device)):
        assert torch.equal(ops.argmax(scores), scores.float().argmax(-1))


def test_ancestors(ops: TorchOps, device: torch.device) -> None:
    parents_BN = torch.full((4, 33), -1, device=device)
    for node in range(1, 30):  # three of padding
        parents_BN[:, node] = torch.randint(0, node, (4,), device=device)
    parents_BN[0] = torch.arange(33, device=device) - 1  # a chain
    assert torch.equal(ops.ancestors(parents_BN), TORCH_OPS.ancestors(parents_BN))


@pytest.mark.parametrize("above", [0, 1, 4])
def test_what_drafted_nodes_inherit(ops: TorchOps, device: torch.device, above: int) -> None:
    before = torch.rand(3, above, 7, device=device) < 0.5 if above else None
    parents_BF = torch.randint(0, max(above, 1), (3, 4), device=device)
    assert torch.equal(ops.inherit(before, parents_BF), TORCH_OPS.inherit(before, parents_BF))


@pytest.mark.parametrize("shape", [(20, 5, 3), (9, 4, 1), (64, 3, 8)])
def test_a_tree_grows_alike(
    ops: TorchOps, device: torch.device, shape: tuple[int, int, int]
) -> None:
    wanted = TreeShape.dynamic(*shape)

    def children(of_BF: Tensor) -> tuple[Tensor, Tensor]:
        ranks_W = torch.arange(wanted.width + 1, device=device)
        logp_BFW = -torch.sin(1.0 + of_BF[..., None] * 7.1 + ranks_W * 3.3).abs() - 0.01
        return logp_BFW.sort(dim=-1, descending=True).values, of_BF[..., None] * 5 % 97 + ranks_W

    def grown(one: TorchOps) -> tuple[Tree, list[Frontier]]:
        asked: list[Frontier] = []

        def step(frontier: Frontier) -> tuple[Tensor, Tensor]:
            asked.append(frontier)
            return children(frontier.tokens_BF)

        root_B = torch.tensor([3, 8, 50], device=device)
        return grow(root_B, children(root_B[:, None]), step, wanted, ops=one), asked

    (ours, mine), (theirs, expected) = grown(ops), grown(TORCH_OPS)
    assert len(mine) == len(expected) == wanted.depth - 1
    for one, other in zip(mine, expected, strict=True):
        assert one.depth == other.depth
        assert torch.equal(one.tokens_BF, other.tokens_BF)
        assert torch.equal(one.parents_BF, other.parents_BF)
    assert torch.equal(ours.tokens_BN, theirs.tokens_BN)
    assert torch.equal(ours.parents_BN, theirs.parents_BN)
    assert torch.equal(ours.scores_BN, theirs.scores_BN)


def test_the_reference_has_gradients() -> None:
    with torch.enable_grad():
        norm, linear = nn.RMSNorm(24, eps=1e-5), linears(torch.device("cpu"), 24, 8 * 16)
        norm.wide = norm.weight  # type: ignore[assignment]
        hidden = torch.randn(2, 5, 24, requires_grad=True)
        hidden_BND, qkv = TORCH_OPS.norm_linear(hidden, hidden, norm, linear)
        cos_sin = TORCH_OPS.rope(Rotary(16, 500.0), torch.arange(5)[None], qkv)
        rotated = TORCH_OPS.rotate(qkv, AttentionSpec(4, 2, 16, 0.3), cos_sin)
        (sum(one.square().sum() for one in rotated) + hidden_BND.sum()).backward()
    assert hidden.grad is not None and linear.linears[0].weight.grad is not None
