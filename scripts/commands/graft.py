"""`headstart graft`: carry a head over to a changed target, and measure what that costs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from headstart.model.target.load import load_target
from headstart.scripts.console import console, show
from headstart.scripts.options.common import Limit, MaxNewTokens, PromptSet

if TYPE_CHECKING:
    from headstart.inference.benchmark.metrics import Case
    from headstart.inference.rollout import Prompt
    from headstart.model.checkpoint.graft import TrainedHead
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target

MAX_LOSS = 0.1  # of the acceptance length above 1; beyond that, retraining is recommended
Report = dict[str, Any]  # as `headstart eval` writes it


def graft(
    head: Annotated[Path, typer.Argument(help="Fused checkpoint or head: folder or Hub id.")],
    target: Annotated[str, typer.Argument(help="Changed target: Hub id, folder or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: the changed target and the head.")],
    prompts: PromptSet = "heldout",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 128,
) -> None:
    """Carry a head over to a fine-tuned, merged or quantised target; measure what is lost."""
    from headstart.model.checkpoint.fuse import check_output, fuse
    from headstart.model.checkpoint.graft import TrainedHead
    from headstart.scripts.options.comparison import measurement

    check_output(out)
    trained = TrainedHead.find(head, target)
    if trained.original is not None and out.resolve() == Path(trained.original).resolve():
        raise ValueError(
            f"{out} holds the original target, which the changed one would replace. Name a new "
            "folder."
        )
    kind, meta = str(trained.file.head["kind"]), trained.file.meta
    after, decoded = _on_changed_target(trained, target, prompts, limit, max_new_tokens)
    before = _on_original_target(trained, decoded, max_new_tokens)
    console.print(table(before, after, kind))
    loss = _report_loss(before, after, kind)
    grafted = meta.grafted(
        target,
        None if isinstance(before, str) else before["results"][kind]["acceptance_length"],
        after["results"][kind]["acceptance_length"],
        measurement(after, kind, Path(prompts).name, max_new_tokens),
    )
    fuse(target, trained.folder, out, regraft=grafted)
    show(f"{out}: {target} with the head, which now stores the hash of this target.")
    if meta.calibration_positions or meta.temperatures or meta.measured:
        show(
            "Calibration and measurements of the old target were removed. `headstart calibrate "
            f"{shlex.quote(str(out))} --responses responses.jsonl` calibrates the head again, with "
            "responses of the new one."
        )
    if loss is None or loss > MAX_LOSS:
        show(_retraining(kind, target, out, loss_is_known=loss is not None))


def _on_changed_target(
    trained: TrainedHead, name: str, prompts: str, limit: int | None, max_new_tokens: int
) -> tuple[Report, list[Prompt]]:
    """The report of the head on the changed target, and the prompts behind it."""
    from headstart.model.checkpoint.head import load_head
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.comparison import first_turn_cases
    from headstart.scripts.options.prompts import decodable

    target = load_target(name)
    if target_hash(target) == trained.file.target_hash:
        raise ValueError(
            f"{name} has exactly the weights that the head in {trained.name} was trained on, so "
            f"nothing has to be carried over. `headstart fuse {name} {trained.name} OUT` puts both "
            "in one folder."
        )
    head = load_head(trained.folder, target, regraft=True)
    decoded = decodable(prompts, limit, target)
    return _decode(target, head, first_turn_cases(target, decoded), max_new_tokens), decoded


def _on_original_target(
    trained: TrainedHead, prompts: Sequence[Prompt], max_new_tokens: int
) -> Report | str:
    """The report of the head on its original target, or why there is none."""
    from headstart.model.checkpoint.head import load_head
    from headstart.model.target.weights_hash import target_hash
    from headstart.scripts.options.comparison import first_turn_cases
    from headstart.scripts.options.prompts import has_room

    if trained.original is None:
        return (
            f"the original target, {trained.file.meta.target}, is not available. Fuse it with the "
            "head (`headstart fuse`) and graft the fused checkpoint to know"
        )
    target = load_target(trained.original)
    if target_hash(target) != trained.file.target_hash:
        return f"the weights of {trained.original} are no longer those that the head was trained on"
    if not target.has_tokenizer or target.tokenizer.chat_template is None:
        return f"{trained.original} has no chat template"
    cases = first_turn_cases(target, prompts)
    if not all(has_room(target, case.tokens) for case in cases):
        return f"some of these prompts exceed the context length of {trained.original}"
    head = load_head(trained.folder, target)
    head.temperatures = ()  # as on the changed target, so that only the target differs
    return _decode(target, head, cases, max_new_tokens)


def _decode(target: Target, head: DraftHead, cases: Sequence[Case], max_new_tokens: int) -> Report:
    """Always the same tree: step costs of this machine say nothing about the head."""
    from headstart.inference.config import SpeculativeConfig
    from headstart.inference.tree_policy.defaults import DEFAULT_TREE, for_target
    from headstart.scripts.options.comparison import compare

    config = SpeculativeConfig(head, for_target(target, DEFAULT_TREE))
    show(f"decoding with {target.name}")
    return compare(target, {head.kind: config}, cases, max_new_tokens)


def table(before: Report | str, after: Report, kind: str) -> Table:
    from headstart.scripts.options.comparison import rates

    shown = Table(title="The same prompts and trees, greedy, uncalibrated", title_justify="left")
    for column in ("", "identical", "acceptance length", "rate per position"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, report in (("original target", before), ("changed target", after)):
        if isinstance(report, str):
            continue
        metrics = report["results"][kind]
        shown.add_row(
            name,
            f"{metrics['identical']}/{metrics['compared']}",
            f"{metrics['acceptance_length']:.2f}",
            rates(metrics),
        )
    return shown


def lost_share(before: float, after: float) -> float:
    """The lost share of the acceptance length above 1, which autoregressive decoding has too."""
    return (before - after) / (before - 1) if before > 1 else 0.0


def _report_loss(before: Report | str, after: Report, kind: str) -> float | None:
    """Print what was lost; its share, None where that is unknown."""
    now = after["results"][kind]
    all_equal = now["identical"] == now["compared"]
    show(
        f"{now['identical']} of {now['compared']} responses equal the changed target's "
        "autoregressive decoding" + ("." if all_equal else "; in 16 bits near ties can differ.")
    )
    length = now["acceptance_length"]
    if isinstance(before, str):
        show(f"Acceptance length {length:.2f}. The loss is unknown: {before}.")
        return None
    then = before["results"][kind]["acceptance_length"]
    loss = lost_share(then, length)
    if then <= 1:
        show("No draft token was accepted on the original target, so nothing could be lost.")
    elif loss <= 0:
        show(f"Nothing was lost: acceptance length {then:.2f} before, {length:.2f} now.")
    else:
        show(
            f"Lost: {loss:.0%} of the head's gain, acceptance length {then:.2f} before, "
            f"{length:.2f} now (1.00 is autoregressive decoding). Retraining is recommended above "
            f"{MAX_LOSS:.0%}."
        )
    return loss


def _retraining(kind: str, target: str, out: Path, *, loss_is_known: bool) -> str:
    """The commands that continue training the head."""
    name, start = shlex.quote(target), shlex.quote(str(out))
    advice = "RETRAIN IT: continue" if loss_is_known else "If that is too little, continue"
    return "\n".join(
        [
            f"{advice} training the head on responses of the changed target:",
            f"  headstart data PROMPTS --target {name} --out responses.jsonl",
            f"  headstart train RECIPE target.name={name} head.kind={kind} "
            f"data.path=responses.jsonl train.start_from={start} train.output=run",
            f"  headstart fuse {name} run/best FUSED",
        ]
    )
