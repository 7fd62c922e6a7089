"""The model card of a fused checkpoint or of a head alone, written from what their files say.

A card ends with a seal, the hash of what is before it: one that was edited by hand is known by it,
and never written over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from headstart.model.heads.common.base import DraftHead

from .metadata import HeadMeta, Lora, Measurement
from .usage import usage

CARD = "README.md"
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
    place: str = "FOLDER",
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
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {'A draft head for ' + name if alone else name + ' with a draft head'}",
        _what(head, meta, alone),
        *([_native(meta.replaces)] if meta.replaces else []),
        *(["## Carried over\n\n" + _grafts(meta)] if meta.grafts else []),
        usage(head, meta, folder, place, alone),
        "## Measured\n\n" + (_table(meta) if meta.measured else "Not measured."),
        *(["## Calibration\n\n" + _calibration(meta)] if meta.calibration_rows else []),
        "## Training\n\n" + _training(head, meta),
    ]
    return _sealed("\n\n".join(parts) + "\n")


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


def _what(head: DraftHead, meta: HeadMeta, alone: bool) -> str:
    millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    size = f"of kind `{head.kind}` ({millions:.1f} M parameters)"
    if alone:
        changed = (
            f" In training the target was {_changed(meta.joint)}: `adapter/` holds the change, "
            "and fusing makes it."
            if meta.joint is not None and not meta.grafts
            else ""
        )
        return (
            f"A draft head {size} for {meta.target}, which guesses several of its tokens ahead. "
            "Decoding checks the guesses with the target's weights, so the text is what they alone "
            "would write. The head belongs to just these weights; on others it is refused."
            f"{changed}"
        )
    return (
        f"The weights of {meta.target}, {_changed(None if meta.grafts else meta.joint)}, and in "
        f"`draft_heads/` a draft head {size} that guesses several tokens ahead. Decoding checks "
        "the guesses with these weights, so the text is what they alone would write."
    )


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


def _changed(joint: Lora | None) -> str:
    if joint is None:
        return "unchanged"
    text = f"CHANGED along with the head (LoRA of rank {joint.rank}"
    if joint.divergence is not None:
        text += (
            f"; on held-out answers the Kullback-Leibler divergence from the original is "
            f"{joint.divergence:.4f} nats per token"
        )
    return f"{text})"


def _native(replaces: str) -> str:
    return (
        f"The multi-token prediction layer that came with them (`{replaces}`) IS this head too, so "
        "engines that draft with that layer draft with this one. All other tensors are as they "
        "were, byte for byte."
    )


def _grafts(meta: HeadMeta) -> str:
    """What the head was trained on, and what each change of the target cost."""
    along = f", {_changed(meta.joint)}," if meta.joint is not None else ""
    targets = [*(one.source for one in meta.grafts[1:]), meta.target]
    rows = [
        f"| {one.source} | {target} | {'' if one.before is None else f'{one.before:.2f}'} "
        f"| {one.after:.2f} |"
        for one, target in zip(meta.grafts, targets, strict=True)
    ]
    return "\n".join(
        [
            f"The head was TRAINED ON ANOTHER TARGET, {meta.trained_on}{along} and carried over to "
            "this one as it was. The text is this target's own all the same; what suffers is how "
            "much of it is guessed. Training the head on for this target (`train.start_from`) "
            "wins that back.",
            "",
            "| from | to | accepted length before | after |",
            "|---|---|--:|--:|",
            *rows,
        ]
    )


def _table(meta: HeadMeta) -> str:
    rows = [
        "| prompts | tokens | identical | accepted length | acceptance by depth | speedup "
        "| conditions |",
        "|---|--:|--:|--:|---|--:|---|",
        *map(_row, meta.measured),
        "",
        "Identical: answers that equal those of plain decoding. Accepted length: tokens per "
        "forward pass of the target. Speedup: total tokens over total time, relative to plain "
        "decoding in the same engine.",
    ]
    answers = sum(one.answers for one in meta.measured)
    if answers:
        same = sum(one.identical for one in meta.measured)
        rows += ["", f"{same:,} of {answers:,} answers equal plain decoding's, token for token."]
    return "\n".join(rows)


def _row(measured: Measurement) -> str:
    depths = " ".join(f"{share:.2f}" for share in measured.acceptance)
    speedup = "" if measured.speedup is None else f"{measured.speedup:.2f}"
    cells = [
        measured.prompts,
        f"{measured.tokens:,}",
        f"{measured.identical}/{measured.answers}" if measured.answers else "",
        f"{measured.acceptance_length:.2f}",
        depths,
        speedup,
        measured.conditions,
    ]
    return f"| {' | '.join(cells)} |"


def _calibration(meta: HeadMeta) -> str:
    columns = (
        meta.calibration_rows,
        meta.temperatures,
        meta.calibration_errors,
        meta.rank_acceptance,
    )
    rows = [
        f"| {depth} | {positions:,} | {temperature:.2f} | {before:.3f} | {after:.3f} "
        f"| {' '.join(f'{share:.3f}' for share in ranks)} |"
        for depth, (positions, temperature, (before, after), ranks) in enumerate(
            zip(*columns, strict=True), start=1
        )
    ]
    text = [
        "| depth | positions | temperature | error before | error after | acceptance by rank |",
        "|--:|--:|--:|--:|--:|---|",
        *rows,
        "",
        "On held-out answers. Error: mean distance between the probability of a guess and how "
        "often it comes. Acceptance by rank: how often the likeliest guess comes, the second "
        "likeliest, and so on.",
    ]
    if meta.path_errors is not None:
        before, after = meta.path_errors
        text[-1] += f" Over whole paths of drafted trees: {before:.3f} before, {after:.3f} after."
    return "\n".join(text)


def _training(head: DraftHead, meta: HeadMeta) -> str:
    facts = {
        "kind": head.kind,
        "trained on": meta.trained_on if meta.grafts else None,
        "layers read (0-based outputs)": ", ".join(map(str, head.taps)) or "the last hidden state",
        "draft vocabulary": head.config.draft_vocab or head.config.vocab_size,
        "steps ahead in training": meta.steps,
        "answer tokens": None if meta.tokens is None else f"{meta.tokens:,}",
        "data": meta.data,
        "data sha256": meta.data_hash,
        "began as": meta.start,
        "target's layers in training, weight-only": meta.weight_only,
    }
    text = "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)
    if meta.recipe:
        text += f"\n\nRecipe:\n\n```yaml\n{yaml.safe_dump(meta.recipe, sort_keys=False)}```"
    return text


def licence_of(card: Path) -> dict[str, str]:
    """What the header of a card says of the licence; empty where there is none."""
    if not card.exists():
        return {}
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in LICENCE if isinstance(data.get(key), str)}
