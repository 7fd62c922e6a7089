"""The model card of a fused checkpoint or of a head alone, from `card.md.jinja`.

A card ends with a seal, the hash of the text before it. A card without a matching seal was edited
by hand and is never overwritten.
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
from jinja2 import Environment, StrictUndefined, Template
from safetensors import safe_open

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import is_joint

from .custom_generate.write import FILES
from .engine_support import ENGINES, support
from .launch import launch_line
from .layout import HEADS, LM_HEAD, TARGET_CARD, WEIGHTS
from .metadata import HeadMeta

TEMPLATE = "card.md.jinja"
FOLDER = "FOLDER"  # stands for the checkpoint in commands if its location is not known
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SEAL = re.compile(
    r"\n<!-- written by headstart ([0-9a-f]{16}); a card that was edited is kept -->\n$"
)
HEADER = re.compile(r"\A\s*---\n.*?\n---\s*", re.DOTALL)
LICENSE_KEYS = ("license", "license_name", "license_link")  # in the header of a card


def model_card(
    head: DraftHead,
    meta: HeadMeta,
    folder: Path,
    *,
    place: str = FOLDER,
    alone: bool = False,
    license: Mapping[str, str] | None = None,
) -> str:
    """Render the model card: Markdown with the Hub's header, sealed.

    head: need not be bound to its target.
    folder: the head or fused checkpoint that the card describes.
    place: its name in commands, a folder or Hub id.
    alone: the folder holds a head without its target.
    license: license keys of the target, if the folder holds no card of the target.
    """
    name = meta.target.split("/")[-1]
    noted = {} if meta.license is None else {"license": meta.license}
    terms: dict[str, Any] = license_of(folder / TARGET_CARD) or dict(license or {}) or noted
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
    unsupported = support(head, "vllm")
    text = card_template().render(
        card_data=data.to_yaml(),
        name=name,
        head=head,
        meta=meta,
        millions=sum(parameter.numel() for parameter in head.parameters()) / 1e6,
        alone=alone,
        place=place,
        fused=fused,
        weights=meta.target if alone and not is_joint(folder) else fused,
        custom_generate=(folder / FILES[0]).is_file(),
        unsupported=unsupported,
        serving=[] if unsupported else _serving(head, meta, folder, place, alone),
        recipe=yaml.safe_dump(meta.recipe, sort_keys=False) if meta.recipe else "",
    )
    return _sealed(f"{ModelCard(text)}\n")


def card_template() -> Template:
    """The template of the card, in which an undefined name is an error."""
    text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    return Environment(undefined=StrictUndefined).from_string(text)


def is_edited(text: str) -> bool:
    """Whether a card was written or edited by hand.

    False for a card without text, as the Hub makes for a new repository.
    """
    found = SEAL.search(text)
    if found is None:
        return bool(HEADER.sub("", text).strip())
    return _hash(text[: found.start()]) != found[1]


def _sealed(text: str) -> str:
    return f"{text}\n<!-- written by headstart {_hash(text)}; a card that was edited is kept -->\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _results(meta: HeadMeta) -> list[EvalResult]:
    """The measurements for the Hub's model-index, with the conditions as their configuration."""
    found = []
    for one in meta.measured:
        metrics = {"acceptance_length": one.acceptance_length}
        if one.speedup is not None:
            metrics["speedup"] = one.speedup
        if one.responses:
            metrics["identical_to_baseline"] = one.identical / one.responses
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
            for metric, value in metrics.items()
        ]
    return found


def _serving(head: DraftHead, meta: HeadMeta, folder: Path, place: str, alone: bool) -> list[str]:
    """Shell commands that serve the target with the head in vLLM and SGLang."""
    target, draft, before = "fused", f"fused/{HEADS}", []
    if alone and _holds_lm_head(head, folder) and not is_joint(folder):
        target, draft = meta.target, place
    elif alone:
        before = [f"headstart fuse {meta.target} {place} fused"]
    elif place == FOLDER:
        target, draft = place, f"{place}/{HEADS}"
    else:  # engines do not find a draft model inside a repository
        before = [f"hf download {place} --local-dir fused"]
    return [*before, *(launch_line(engine, target, draft, meta.steps) for engine in ENGINES)]


def _holds_lm_head(head: DraftHead, folder: Path) -> bool:
    """Whether the head's file has the LM head rows that engines need for its draft vocabulary."""
    if head.config.draft_vocab is None:
        return True
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return LM_HEAD in file.keys()


def license_of(card: Path) -> dict[str, str]:
    """Read the license keys in the header of a card; empty without a card or keys."""
    if not card.exists():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in LICENSE_KEYS if isinstance(data.get(key), str)}
