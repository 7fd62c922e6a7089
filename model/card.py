"""The model card of a fused checkpoint, written from what its files say."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .engines import unservable
from .head import DraftHead
from .meta import HeadMeta, Lora, Measurement

CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TARGET_CARD = "README.target.md"  # the target's own card, kept beside ours


def model_card(head: DraftHead, meta: HeadMeta, folder: Path) -> str:
    """Markdown with the Hub's header. folder: the fused one, for the target's licence."""
    data = ModelCardData(
        base_model=meta.target if HUB_ID.fullmatch(meta.target) else None,
        base_model_relation="finetune",
        license=_licence(folder) or meta.license,
        library_name="headstart",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "multi-token-prediction", head.kind],
    )
    millions = sum(parameter.numel() for parameter in head.parameters()) / 1e6
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {meta.target.split('/')[-1]} with a draft head",
        f"The weights of {meta.target}, {_changed(meta.joint)}, and in `draft_heads/` a draft head "
        f"of kind `{head.kind}` ({millions:.1f} M parameters) that guesses several tokens ahead. "
        "Decoding checks the guesses with these weights, so the text is what they alone would "
        "write.",
        *([_native(meta.replaces)] if meta.replaces else []),
        _usage(head),
        "## Measured\n\n" + (_table(meta) if meta.measured else "Not measured."),
        *(["## Calibration\n\n" + _calibration(meta)] if meta.calibration_rows else []),
        "## Training\n\n" + _training(head, meta),
    ]
    return "\n\n".join(parts) + "\n"


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


def _usage(head: DraftHead) -> str:
    lines = [
        "## Use\n",
        '    headstart generate FOLDER "..."\n',
        "`transformers`, vLLM and SGLang open the folder as the plain target.",
    ]
    reason = unservable(head)
    if head.kind == "eagle3" and reason is None:
        lines.append(
            "To draft with the head (a chain, not a tree), vLLM takes\n"
            '`--speculative-config \'{"method": "eagle3", "model": "FOLDER/draft_heads", '
            '"num_speculative_tokens": 3}\'`.'
        )
    elif reason is not None:
        lines.append(f"Stock engines cannot draft with the head: {reason}.")
    return "\n".join(lines)


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
    return "\n".join(rows)


def _row(measured: Measurement) -> str:
    depths = " ".join(f"{share:.2f}" for share in measured.acceptance)
    speedup = "" if measured.speedup is None else f"{measured.speedup:.2f}"
    cells = [
        measured.prompts,
        f"{measured.tokens:,}",
        f"{measured.identical}/{measured.answers}" if measured.answers else "",
        f"{measured.accepted_length:.2f}",
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
        "layers read (0-based outputs)": ", ".join(map(str, head.layers))
        or "the last hidden state",
        "draft vocabulary": head.config.draft_vocab or head.config.vocab_size,
        "steps ahead in training": meta.steps,
        "answer tokens": None if meta.tokens is None else f"{meta.tokens:,}",
        "data": meta.data,
        "data sha256": meta.data_hash,
        "began as": meta.start,
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value is not None)


def _licence(folder: Path) -> str | None:
    card = folder / TARGET_CARD
    if not card.exists():
        return None
    licence: str | None = ModelCard.load(card).data.to_dict().get("license")
    return licence
