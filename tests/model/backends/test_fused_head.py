"""A head's blocks for drafting on a CPU, against those that it is trained with."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, prompts
from run_command import pickled
from torch import Tensor, nn

from headstart.model.backends.attention import grouped_attention
from headstart.model.backends.fused_head import SWIFT, _under_a_mask, speed_up_blocks
from headstart.model.heads.common.base import DraftHead, kinds, make_head
from headstart.model.heads.common.layers import MLP, Attention, LayerConfig, RMSNorm
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
    swift_blocks = copy.deepcopy(nn.ModuleList([attention, mlp]))
    speed_up_blocks(swift_blocks)
    for shape in ((1, 1), (3, 5), (2, 70)):
        hidden_BTD = torch.randn(*shape, 64)
        for start in (0, 100, 7):  # the tables grow, and are used again
            positions_BT = start + torch.arange(shape[1])[None] + torch.arange(shape[0])[:, None]
            quick, quick_mlp = copied(swift_blocks)
            assert type(quick) is SWIFT[Attention]
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
    speed_up_blocks(nn.ModuleList([norm]))
    torch.testing.assert_close(norm(hidden), expected)
    assert torch.equal(hidden, before)
    torch.testing.assert_close(
        norm(hidden.mT.contiguous().mT) if len(shape) > 1 else norm(hidden), expected
    )


@torch.no_grad()
@pytest.mark.parametrize("new", [1, 9, 65])
def test_attention_over_a_cache(new: int) -> None:
    columns = torch.randn(2, 3, 2, 100, 16)
    keys, values = columns[:, :, :, :80]
    queries = torch.randn(3, new, 4, 16).transpose(1, 2)
    mask_BNS = torch.rand(3, new, 80) < 0.7
    mask_BNS[..., 0] = True
    ours = _under_a_mask(queries, keys, values, mask_BNS)
    torch.testing.assert_close(ours, grouped_attention(queries, keys, values, mask_BNS[:, None]))


def drafted(target: Target, kind: str) -> tuple[DraftHead, list[Tree]]:
    """Trees of a ragged batch, before and after it has gone on."""
    torch.manual_seed(0)
    head = make_head(target, kind, {})
    head.init_from_target()
    head = head.for_decoding(target)
    ids_BT, counts_B = torch.stack(prompts([9, 9])), torch.tensor([9, 4])
    trees, state = [], head.start(2)
    for _ in range(2):
        seen = target.forward(ids_BT, taps=head.taps)
        state = head.advance(state, seen, ids_BT.roll(-1, 1), counts_B)
        trees.append(head.draft(state, TreeShape.dynamic(12, min(3, head.max_depth or 3), 3)))
        counts_B = torch.tensor([2, 9])
    return head, trees


@pytest.mark.parametrize("kind", kinds())
def test_heads_guess_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = wrap_target(FAMILIES["qwen3"]())
    head, ours = drafted(target, kind)
    used = any(type(one) in SWIFT.values() for one in head.modules())
    assert used == (kind != "medusa")
    monkeypatch.setattr("headstart.model.heads.common.base.speed_up_blocks", lambda head: None)
    slow, theirs = drafted(target, kind)
    assert not any(type(one) in SWIFT.values() for one in slow.modules())
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
