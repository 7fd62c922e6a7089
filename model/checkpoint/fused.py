"""The fused checkpoint: one folder with an untouched target and a draft head.

The folder opens as the plain target everywhere; `layout.py` lists its files, `fuse.py` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.load import load_target
from headstart.model.target.target import Target

from .atomic import recover, replace_text
from .download import fetch_fused, hub_name
from .head import folder_of_head, load_head, read_head_file
from .layout import CARD, CONFIG, HEADS, OURS
from .metadata import HeadMeta, Measurement
from .model_card import is_edited, model_card


def load_fused(
    folder: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> tuple[Target, DraftHead]:
    """Load the target and the head of a fused checkpoint.

    folder: a folder, or `owner/name` on the Hub.
    Other arguments as in `load_target`. ValueError if it is not a fused checkpoint.
    """
    from_hub = hub_name(folder) is not None
    name, folder = str(folder), fetch_fused(folder, revision)
    if not is_fused(folder):
        raise ValueError(
            f"{folder} is not a fused checkpoint: it has no {HEADS} folder. "
            "Make one with `headstart fuse`."
        )
    target = load_target(folder, dtype=dtype, device=device, quantize=quantize)
    if from_hub:
        target.name = name  # instead of the name of a folder in the Hub's cache
    return target, load_head(folder, target)


def is_fused(folder: str | Path) -> bool:
    recover(Path(folder))
    return (Path(folder) / HEADS / CONFIG).is_file()


def record(folder: str | Path, head: DraftHead, measured: Measurement) -> bool:
    """Add a measurement to the metadata of a head's folder, or of a fused one and its card.

    It replaces an earlier one of the same prompts under the same conditions. Returns the same as
    `rewrite_meta`.
    """
    meta = read_head_file(folder).meta
    same = (measured.prompts, measured.conditions)
    others = [one for one in meta.measured if (one.prompts, one.conditions) != same]
    return rewrite_meta(folder, head, meta.model_copy(update={"measured": (*others, measured)}))


def rewrite_meta(folder: str | Path, head: DraftHead, meta: HeadMeta) -> bool:
    """Replace the metadata in a head's folder, or in a fused one and its card.

    The weights are not touched, and config.json is replaced atomically. Returns False if the card
    was edited by hand and is therefore left unchanged.
    """
    inner = folder_of_head(folder)
    config = json.loads((inner / CONFIG).read_text(encoding="utf-8"))
    config[OURS]["meta"] = meta.model_dump(mode="json")
    replace_text(inner / CONFIG, json.dumps(config, indent=2) + "\n")
    if not is_fused(folder):
        return True
    if has_edited_card(folder):
        return False
    replace_text(Path(folder) / CARD, model_card(head, meta, Path(folder)))
    return True


def has_edited_card(folder: str | Path) -> bool:
    """Whether the model card of a folder was written or edited by hand."""
    card = Path(folder) / CARD
    return card.is_file() and is_edited(card.read_text(encoding="utf-8"))
