"""A tiny target, EAGLE-3 heads of it and fused checkpoints, for the tests of `headstart export`.

Legend: V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.target import Target

V, VD = 97, 20
META = HeadMeta(target="tiny", steps=4)
CASES: dict[str, dict[str, Any]] = {
    "pruned": {"draft_vocab": VD},
    "whole": {"draft_vocab": None},
    "3.1": {"draft_vocab": VD, "fc_norm": True, "norm_output": True},
}


def write_plain(folder: Path) -> Path:
    """A target whose weights are exact in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().float().save_pretrained(folder)
    return folder


def random_head(target: Target, kind: str = "eagle3", **settings: Any) -> DraftHead:
    """Random weights that are exact in bfloat16."""
    torch.manual_seed(1)
    taps = {"taps": (1, 2, 4)} if kind == "eagle3" else {}
    head = make_head(target, kind, taps | settings)
    with torch.no_grad():
        for name, weight in head.named_parameters():
            drawn = torch.randn_like(weight) * 0.2 + (weight.dim() == 1)
            weight.copy_(drawn.bfloat16())
            assert weight.std() > 0, name
    if head.d2t is not None:
        head.set_draft_vocab(torch.randperm(V)[:VD])
    return head


def fused(plain: Path, head: DraftHead, folder: Path, meta: HeadMeta = META) -> Path:
    save_head(head, folder / "head", meta)
    fuse(plain, folder / "head", folder / "fused")
    return folder / "fused"
