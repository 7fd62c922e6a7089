"""The model card of a fused checkpoint or of a head alone, from `card.md.jinja`.

A card ends with a seal, the hash of what is before it: one that was edited by hand is known by it,
and never written over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from headstart.model.checkpoint.custom_generate.write import FILES
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import is_joint

from .download import HEADS, WEIGHTS
from .engine_config import ENGINES, LM_HEAD, launch_line, undraftable
from .metadata import HeadMeta

CARD, TEMPLATE = "README.md", "card.md.jinja"
FOLDER = "FOLDER"  # how commands name a checkpoint whose place is not known
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TARGET_CARD = "README.target.md"  # the target's own card, kept beside ours
SEAL = re.compile(
    r"\n<!-- written by headstart ([0-9a-f]{16}); a card that was edited is kept -->\n$"
)
HEADER = re.compile(r"\A\s*---\n.*?\n---\s*", re.DOTALL)
LICENCE = ("license", "license_name", "license_link")  # the Hub's keys


def model_card(
    head: DraftHead,
    meta: HeadMeta,
    folder: Path,
    *,
    place: str = FOLDER,
    alone: bool = False,
    licence: Mapping[str, str] | None = None,
) -> str:
    """Markdown with the Hub's header, sealed. The head need not be bound.

    folder: what the card is about; a fused one holds the target's card, and in it its licence.
    place: how it is named in commands, the folder or a Hub id. alone: a head without its target.
    licence: the target's, where its card is not in the folder (keys of the Hub's header).
    """
    name = meta.target.split("/")[-1]
    noted = {} if meta.license is None else {"license": meta.license}
    terms: dict[str, Any] = licence_of(folder / TARGET_CARD) or dict(licence or {}) or noted
    data = ModelCardData(
        base_model=meta.target if HUB_ID.fullmatch(meta.target) else None,
        base_model_relation="adapter" if alone else "finetune",
        library_name="headstart",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "multi-token-prediction", "headstart", head.kind],
        model_name=f"{name} with a draft head" if meta.measured else None,
        eval_results=_results(meta) or None,
        **terms,
    )
    fused = "fused" if alone else place
    unsupported = undraftable(head)
    card = ModelCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        name=name,
        head=head,
        meta=meta,
        millions=sum(parameter.numel() for parameter in head.parameters()) / 1e6,
        alone=alone,
        place=place,
        fused=fused,
        whole=meta.target if alone and not is_joint(folder) else fused,  # the target's weights
        custom_generate=(folder / FILES[0]).is_file(),
        unsupported=unsupported,
        serving=[] if unsupported else _serving(head, meta, folder, place, alone),
        recipe=yaml.safe_dump(meta.recipe, sort_keys=False) if meta.recipe else "",
    )
    return _sealed(f"{card}\n")


def is_edited(text: str) -> bool:
    """Whether somebody wrote or changed this card by hand. One without a text, as the Hub makes
    for a new repository, has nothing to lose."""
    found = SEAL.search(text)
    if found is None:
        return bool(HEADER.sub("", text).strip())
    return _hash(text[: found.start()]) != found[1]


def _sealed(text: str) -> str:
    return f"{text}\n<!-- written by headstart {_hash(text)}; a card that was edited is kept -->\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _results(meta: HeadMeta) -> list[EvalResult]:
    """The Hub's model-index: what was measured, with the conditions as its configuration."""
    found = []
    for one in meta.measured:
        figures = {"acceptance_length": one.acceptance_length}
        if one.speedup is not None:
            figures["speedup"] = one.speedup
        if one.answers:
            figures["identical_to_plain"] = one.identical / one.answers
        found += [
            EvalResult(
                task_type="text-generation",
                dataset_type=one.prompts.split(",")[0],
                dataset_name=one.prompts,
                dataset_config=one.conditions,
                metric_type=metric,
                metric_name=metric.replace("_", " "),
                metric_value=value,
            )
            for metric, value in figures.items()
        ]
    return found


def _serving(head: DraftHead, meta: HeadMeta, folder: Path, place: str, alone: bool) -> list[str]:
    """Shell commands that make vLLM and SGLang serve the target with the head."""
    target, draft, before = "fused", f"fused/{HEADS}", []
    if alone and _holds_lm_head(head, folder) and not is_joint(folder):
        target, draft = meta.target, place
    elif alone:
        before = [f"headstart fuse {meta.target} {place} fused"]
    elif place == FOLDER:
        target, draft = place, f"{place}/{HEADS}"
    else:  # they find a draft model by a folder or a whole repository, not inside one
        before = [f"hf download {place} --local-dir fused"]
    return [*before, *(launch_line(engine, target, draft, meta.steps) for engine in ENGINES)]


def _holds_lm_head(head: DraftHead, folder: Path) -> bool:
    """Whether a head's file has the LM head rows that engines want of a draft vocabulary."""
    if head.config.draft_vocab is None:
        return True
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return LM_HEAD in file.keys()


def licence_of(card: Path) -> dict[str, str]:
    """What the header of a card says of the licence; empty where there is none."""
    if not card.exists():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in LICENCE if isinstance(data.get(key), str)}
