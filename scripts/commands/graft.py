"""`headstart graft`: a head goes along when its target is changed, and what that costs is said."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headstart.model.target.load import load_target
from headstart.scripts.console import console, progress, show

from .evaluate import conditions, measurement, summaries

if TYPE_CHECKING:
    from headstart.inference.rollout import Prompt
    from headstart.model.checkpoint.graft import TrainedHead
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target

MOST_LOST = 0.1  # of the accepted length above 1; where it is more, retraining is recommended
Figures = dict[str, Any]  # as `headstart eval` writes them


def graft(
    head: Annotated[Path, typer.Argument(help="Fused checkpoint or head: folder or Hub id.")],
    target: Annotated[str, typer.Argument(help="The changed target: Hub id, folder or .gguf.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: the changed target and the head.")],
    prompts: Annotated[
        str | None, typer.Option(help="Prompt JSONL, or shipped: train, dev, heldout.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Carry a head over to a fine-tuned, merged or quantised target; measure what is lost."""
    from headstart.model.checkpoint.fuse import check_place, fuse
    from headstart.model.checkpoint.graft import TrainedHead

    check_place(out)
    trained = TrainedHead.find(head, target)
    if trained.original is not None and out.resolve() == Path(trained.original).resolve():
        raise ValueError(
            f"{out} holds the original target, whose place the changed one would take. Name a new "
            "folder."
        )
    kind, meta = str(trained.file.head["kind"]), trained.file.meta
    after, chosen = _on_the_changed(trained, target, prompts, limit, max_new_tokens)
    before = _on_the_original(trained, chosen, max_new_tokens)
    console.print(table(before, after, kind))
    lost = _tell(before, after, kind)
    file = Path(prompts).name if prompts else "heldout.jsonl"
    noted = meta.grafted(
        target,
        None if isinstance(before, str) else before["results"][kind]["acceptance_length"],
        after["results"][kind]["acceptance_length"],
        measurement(after, kind, file, max_new_tokens),
    )
    fuse(target, trained.folder, out, regraft=noted)
    show(f"{out}: {target} with the head, whose hash of its target is made anew.")
    if meta.calibration_rows or meta.temperatures or meta.measured:
        show(
            "Its calibration and what was measured before were of the old target, and are left "
            f"out. `headstart calibrate {shlex.quote(str(out))} --answers answers.jsonl` makes it "
            "anew, with answers of the new one."
        )
    if lost is None or lost > MOST_LOST:
        show(_retraining(kind, target, out, unknown=lost is None))


def _on_the_changed(
    trained: TrainedHead, name: str, prompts: str | None, limit: int | None, max_new_tokens: int
) -> tuple[Figures, list[Prompt]]:
    """The figures now, and the prompts that gave them."""
    from headstart.model.checkpoint.head import load_head
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.prompts import decodable, first_turns

    target = load_target(name)
    if target_hash(target) == trained.file.target_hash:
        raise ValueError(
            f"{name} has just the weights that the head in {trained.name} belongs to, so there is "
            f"nothing to carry over. `headstart fuse {name} {trained.name} OUT` puts both in one "
            "folder."
        )
    head = load_head(trained.folder, target, regraft=True)
    chosen = decodable(prompts or "heldout", limit, target)
    return _decoded(target, head, first_turns(target, chosen), max_new_tokens), chosen


def _on_the_original(
    trained: TrainedHead, prompts: Sequence[Prompt], max_new_tokens: int
) -> Figures | str:
    """The figures before, or why there are none."""
    from headstart.model.checkpoint.head import load_head
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.prompts import first_turns, has_room

    if trained.original is None:
        return (
            f"{trained.file.meta.target} as the head knew it is not at hand. To know, `headstart "
            "fuse` the two first, and graft what that writes"
        )
    target = load_target(trained.original)
    if target_hash(target) != trained.file.target_hash:
        return f"the weights of {trained.original} are no longer those that the head knew"
    if not target.has_tokenizer or target.tokenizer.chat_template is None:
        return f"{trained.original} has no chat template to write prompts in"
    ids = first_turns(target, prompts)
    if not all(has_room(target, one) for one in ids):
        return f"{trained.original} reads fewer tokens than some of these prompts have"
    head = load_head(trained.folder, target)
    head.temperatures = ()  # as on the changed target, so that this alone makes the difference
    return _decoded(target, head, ids, max_new_tokens)


def _decoded(
    target: Target, head: DraftHead, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> Figures:
    """Always the same tree: what a machine makes pay says nothing of the head."""
    from headstart.inference.benchmark.runner import measure
    from headstart.inference.config import SpeculativeConfig
    from headstart.inference.tree_policy.defaults import DEFAULT_TREE, for_target
    from headstart.scripts.options.tree_budget import described

    one = SpeculativeConfig(head, for_target(target, DEFAULT_TREE))
    show(f"decoding with {target.name}")
    with progress("decoding", len(prompts)) as update:
        results = measure(
            target, {head.kind: one}, prompts, max_new_tokens=max_new_tokens, report=update
        )
    return {
        "conditions": conditions(target),
        "trees": {head.kind: described(one)},
        "results": summaries(results),
    }


def table(before: Figures | str, after: Figures, kind: str) -> Table:
    shown = Table(title="The same prompts and trees, greedy, uncalibrated", title_justify="left")
    for column in ("", "identical", "accepted length", "acceptance per depth"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, figures in (("original target", before), ("changed target", after)):
        if isinstance(figures, str):
            continue
        one = figures["results"][kind]
        shown.add_row(
            name,
            f"{one['identical']}/{one['prompts']}",
            f"{one['accepted_length']:.2f}",
            " ".join(f"{rate:.2f}" for rate in one["acceptance_per_depth"]) or "-",
        )
    return shown


def lost_share(before: float, after: float) -> float:
    """Of the accepted length above 1, which plain decoding has too."""
    return (before - after) / (before - 1) if before > 1 else 0.0


def _tell(before: Figures | str, after: Figures, kind: str) -> float | None:
    """What was lost, in words, and its share; None where that is not known."""
    now: Mapping[str, Any] = after["results"][kind]
    all_equal = now["identical"] == now["prompts"]
    show(
        f"{now['identical']} of {now['prompts']} answers equal the changed target's own plain "
        + ("decoding." if all_equal else "decoding; in 16 bits a near tie can fall the other way.")
    )
    length = now["acceptance_length"]
    if isinstance(before, str):
        show(f"Accepted length {length:.2f}. What was lost is not known: {before}.")
        return None
    then = before["results"][kind]["acceptance_length"]
    lost = lost_share(then, length)
    if then <= 1:
        show("The head guessed nothing right on the original target, so nothing could be lost.")
    elif lost <= 0:
        show(f"Nothing was lost: accepted length {then:.2f} before, {length:.2f} now.")
    else:
        show(
            f"Lost: {lost:.0%} of what the head gains, an accepted length of {then:.2f} before and "
            f"{length:.2f} now (1.00 is plain decoding). Retraining is recommended above "
            f"{MOST_LOST:.0%}."
        )
    return lost


def _retraining(kind: str, target: str, out: Path, *, unknown: bool) -> str:
    """The commands that train the head on, from where it is."""
    name, start = shlex.quote(target), shlex.quote(str(out))
    advice = "If that is too little, train" if unknown else "RETRAIN IT: train"
    return "\n".join(
        [
            f"{advice} the head on with answers of the changed target:",
            f"  headstart data PROMPTS --target {name} --out answers.jsonl",
            f"  headstart train RECIPE target.name={name} head.kind={kind} "
            f"data.path=answers.jsonl train.start_from={start} train.output=run",
            f"  headstart fuse {name} run/best FUSED",
        ]
    )
