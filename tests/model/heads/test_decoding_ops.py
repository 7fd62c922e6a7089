"""The modules of heads with the kernels that draft on a CPU, against the reference that trains."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, prompts
from run_command import pickled
from torch import Tensor, nn

from headstart.model.backends.cpu_ops import CpuOps, cpu_ops
from headstart.model.backends.torch_ops import TORCH_OPS, TorchOps, grouped_attention
from headstart.model.cache.kv_cache import KVCache
from headstart.model.heads.common.base import DraftHead, kinds, make_head
from headstart.model.heads.common.cached_attention import DraftVisibility
from headstart.model.heads.common.layers import (
    MLP,
    Attention,
    LayerConfig,
    OpsModule,
    RMSNorm,
    use_ops,
)
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape
from headstart.model.tree.tree import Tree

CONFIG = LayerConfig(
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=500.0,
)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return grouped_attention(queries, keys, values, None, causal=True)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("copied", [lambda layer: layer, copy.deepcopy, pickled])
def test_attention_and_mlp(qk_norm: bool, bias: bool, copied) -> None:
    config = CONFIG.model_copy(update={"qk_norm": qk_norm, "attention_bias": bias})
    attention, mlp = Attention(config, 64), MLP(config)
    for weight in attention.parameters():
        nn.init.normal_(weight, 0, 0.3)
    fused = copy.deepcopy(nn.ModuleList([attention, mlp]))
    use_ops(fused, cpu_ops())
    for shape in ((1, 1), (3, 5), (2, 70)):
        hidden_BTD = torch.randn(*shape, 64)
        for start in (0, 100, 7):  # the tables grow, and are used again
            positions_BT = start + torch.arange(shape[1])[None] + torch.arange(shape[0])[:, None]
            quick, quick_mlp = copied(fused)
            assert isinstance(quick.ops, CpuOps) and quick.ops is quick_mlp.ops
            assert quick.qkv.linears[0] is quick.q_proj
            ours = quick(hidden_BTD, positions_BT, attend)
            torch.testing.assert_close(ours, attention(hidden_BTD, positions_BT, attend))
            torch.testing.assert_close(quick_mlp(ours), mlp(ours))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32)])
def test_norm(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(32, 1e-5)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(*shape)
    expected, before = norm(hidden), hidden.clone()
    use_ops(norm, cpu_ops())
    torch.testing.assert_close(norm(hidden), expected)
    assert torch.equal(hidden, before)
    torch.testing.assert_close(
        norm(hidden.mT.contiguous().mT) if len(shape) > 1 else norm(hidden), expected
    )


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("new", [1, 9, 65])
def test_attention_over_a_cache(new: int, window: int | None) -> None:
    cache = KVCache(3, 1, torch.device("cpu"))
    cache.reserve(70)
    cache.update(torch.randn(3, 2, 70, 16), torch.randn(3, 2, 70, 16), 0)
    cache.commit(None, torch.tensor([70, 31, 1]))
    cache.reserve(new)
    keys, values = cache.update(torch.randn(3, 2, new, 16), torch.randn(3, 2, new, 16), 0)
    pending_BNM = (torch.rand(3, new, new) < 0.7) | torch.eye(new, dtype=torch.bool)
    first_BN = None if window is None else cache.lengths_B[:, None] - window
    visibility = DraftVisibility(cache, pending_BNM, first_BN)
    queries = torch.randn(3, new, 4, 16).transpose(1, 2)
    ours = cpu_ops().cached_attention(queries, keys, values, visibility)
    theirs = TORCH_OPS.cached_attention(queries, keys, values, visibility)
    torch.testing.assert_close(ours, theirs)


def drafted(target: Target, kind: str, ops: TorchOps | None = None) -> tuple[DraftHead, list[Tree]]:
    """Trees of a ragged batch, before and after one more step. ops: instead of the device's."""
    torch.manual_seed(0)
    head = make_head(target, kind, {})
    head.init_from_target()
    head = head.for_decoding(target)
    if ops is not None:
        head.use_ops(ops)
    ids_BT, counts_B = torch.stack(prompts([9, 9])), torch.tensor([9, 4])
    trees, state = [], head.start(2)
    for _ in range(2):
        seen = target.forward(ids_BT, taps=head.taps)
        state = head.advance(state, seen, ids_BT.roll(-1, 1), counts_B)
        trees.append(head.draft(state, TreeShape.dynamic(12, min(3, head.max_depth or 3), 3)))
        counts_B = torch.tensor([2, 9])
    return head, trees


@pytest.mark.parametrize("kind", kinds())
def test_heads_draft_the_same(kind: str) -> None:
    target = wrap_target(FAMILIES["qwen3"]())
    head, ours = drafted(target, kind)
    modules = [one for one in head.modules() if isinstance(one, OpsModule)]
    assert bool(modules) == (kind != "medusa")
    assert all(isinstance(one.ops, CpuOps) for one in (head, *modules))
    theirs = drafted(target, kind, TORCH_OPS)[1]
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.tokens_BN, other.tokens_BN)
        assert torch.equal(one.parents_BN, other.parents_BN)
        torch.testing.assert_close(one.scores_BN, other.scores_BN, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", kinds())
def test_a_head_for_a_bfloat16_target_drafts_in_integers_too(kind: str) -> None:
    model = FAMILIES["llama"]().bfloat16()
    wide = drafted(wrap_target(copy.deepcopy(model).float()), kind)[1]
    target = wrap_target(model)
    head, trees = drafted(target, kind)
    assert target.drafts_in_int8 and all(one.dtype != torch.bfloat16 for one in head.parameters())
    for one, other in zip(trees, wide, strict=True):
        # How likely the first guess is; which one it is can be a near tie.
        torch.testing.assert_close(one.scores_BN[:, 1], other.scores_BN[:, 1], rtol=0.1, atol=0.1)


def test_a_head_opened_for_drafting_does_nothing_else() -> None:
    target = wrap_target(FAMILIES["llama"]())
    head = make_head(target, "eagle3", {}).for_decoding(target)
    with pytest.raises(ValueError, match="no gradients"):
        head.lm_head_input(torch.ones(1, 1, target.hidden_size, requires_grad=True))
    with pytest.raises(ValueError, match="float64 on cpu"):
        head.lm_head_input(torch.ones(1, 1, target.hidden_size, dtype=torch.float64))
