"""A tiny target in several files and heads with random weights, for tests of folders of heads."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint.metadata import HeadMeta, Measurement
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.target import Target

VOCAB, DRAFT_VOCAB, HIDDEN = 97, 31, 48
META = HeadMeta(
    target="someone/tiny-llama",
    steps=3,
    tokens=123456,
    temperatures=(1.0, 1.25),
    measured=(
        Measurement(
            prompts="held-out chat",
            tokens=2048,
            acceptance_length=2.354,
            acceptance_rates=(0.71, 0.42),
            speedup=1.62,
            responses=8,
            identical=8,
            conditions="16 nodes, greedy, float32",
        ),
    ),
)


def write_sharded_target(folder: Path) -> Path:
    """A tiny random target with a card, saved as transformers saves it, in several files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The tiny target\n")
    return folder


def random_head(target: Target, kind: str, **settings: object) -> DraftHead:
    """A head with random weights and a draft vocabulary that is not the first few tokens."""
    torch.manual_seed(1)
    taps = {"taps": (1, 2, 4)} if kind == "eagle3" else {}
    head = make_head(target, kind, {"draft_vocab": DRAFT_VOCAB, **taps, **settings})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.set_draft_vocab(torch.randperm(VOCAB)[:DRAFT_VOCAB])
    return head


def files(folder: Path) -> dict[str, bytes]:
    """The content of each file by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
