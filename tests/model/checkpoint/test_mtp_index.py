"""The indexed form of a fused checkpoint: transformers drafts with an mtp head by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash

SIZE, VOCAB = 48, 97
META = HeadMeta(target="someone/tiny-llama")


@pytest.fixture
def target(tmp_path: Path) -> Target:
    """A target whose next token depends on the last one only, saved in tmp_path / "plain"."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SIZE,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "plain")
    return load_target(tmp_path / "plain")


def copying_head(target: Target, **layer: float) -> DraftHead:
    """An mtp head that is always right: it passes the embedding on, as the target does."""
    sizes = make_head(target, "mtp", {}).config.layer.model_dump() | layer
    head = make_head(target, "mtp", {"layer": sizes})
    head.init_from_target()
    with torch.no_grad():
        head.eh_proj.weight.copy_(torch.eye(SIZE, 2 * SIZE))
    return head


def test_transformers_drafts_with_the_head(target: Target, tmp_path: Path) -> None:
    """`use_mtp` gives the output of greedy decoding in half the forward passes."""
    save_head(copying_head(target), tmp_path / "head", META)
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "fused", index=True)
    assert target_hash(load_target(tmp_path / "fused")) == target_hash(target)
    prompt = torch.arange(3, 12)[None]
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = target.model.generate(prompt, **settings)
    assert len(expected[0, 9:].unique()) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", trust_remote_code=True)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    model.model.layers[0].register_forward_hook(count)
    assert torch.equal(model.generate(prompt, use_mtp=True, **settings), expected)
    assert forwards <= 13


def test_a_head_that_transformers_computes_differently_is_an_error(
    target: Target, tmp_path: Path
) -> None:
    head = copying_head(target, rope_theta=50.0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_head(head, tmp_path / "head", META)
    with pytest.raises(ValueError, match="computes this head differently"):
        fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "fused", index=True)
    save_head(make_head(target, "eagle3", {}), tmp_path / "other", META)
    with pytest.raises(ValueError, match="Only heads of kind mtp"):
        fuse(tmp_path / "plain", tmp_path / "other", tmp_path / "fused", index=True)
    assert not (tmp_path / "fused").exists()
