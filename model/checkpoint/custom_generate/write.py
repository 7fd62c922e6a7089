"""The fused folder's own decoding code, for transformers without Headstart (model/remote/).

transformers runs `custom_generate/generate.py` of a folder or repository where it is asked to, with
`trust_remote_code=True`. The folder gets the files as they are here.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from headstart.model.heads import mtp
from headstart.model.heads.common.base import DraftHead
from headstart.model.heads.common.layers import ZeroCentredNorm
from headstart.model.heads.common.target_layer import FamilyLayer
from headstart.model.target.sparse_attention import indexers

from .drafting import KINDS

FOLDER = "custom_generate"  # transformers' names
REQUIREMENTS = "requirements.txt"
SOURCES = ("generate.py", "drafting.py")
FILES = tuple(f"{FOLDER}/{name}" for name in (*SOURCES, REQUIREMENTS))


def undraftable_alone(head: DraftHead) -> str | None:
    """Why that code cannot draft with this head, or None where it can."""
    if head.kind not in KINDS:
        return f"it does not know heads of kind {head.kind}"
    if isinstance(head, mtp.Head) and isinstance(head.layer, FamilyLayer):
        return "the head has a layer of its target's family"
    if isinstance(head, mtp.Head) and isinstance(head.norm, ZeroCentredNorm):
        return "the weights of the head's norms are added to 1"
    if head.target.recurrent:
        return "the target has recurrent layers"
    if indexers(head.target.layers):
        return "the target has sparse attention"
    return None


def write_custom_generate(folder: Path) -> None:
    """Put the code into a fused folder that is being written."""
    out = folder / FOLDER
    out.mkdir()
    for name in SOURCES:
        shutil.copyfile(Path(__file__).with_name(name), out / name)
    (out / REQUIREMENTS).write_text("transformers>=5.17\n", encoding="utf-8")
