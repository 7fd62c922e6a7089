"""Folders of a tiny chat target, its heads and the fused checkpoints, for tests that only read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from chat_model import save

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import kinds, make_head
from headstart.model.target.load import load_target

META = HeadMeta(target="someone/tiny", steps=3)


@dataclass(frozen=True)
class TinyCheckpoint:
    """target: folder of the chat model. heads, fused: folders by the kind of head, with random
    weights and `META`. A test that changes a folder copies it first."""

    target: Path
    heads: dict[str, Path]
    fused: dict[str, Path]


def write_tiny_checkpoint(folder: Path) -> TinyCheckpoint:
    made = TinyCheckpoint(
        save(folder / "target"),
        {kind: folder / "heads" / kind for kind in kinds()},
        {kind: folder / "fused" / kind for kind in kinds()},
    )
    target = load_target(made.target)
    for kind in kinds():
        torch.manual_seed(1)
        save_head(make_head(target, kind, {}), made.heads[kind], META)
        fuse(made.target, made.heads[kind], made.fused[kind])
    return made
