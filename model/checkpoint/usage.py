"""How to use a checkpoint, for its card: with Headstart, transformers, vLLM and SGLang."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from headstart.model.checkpoint.custom_generate.write import FILES
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import is_joint

from .download import HEADS, WEIGHTS
from .engine_config import ENGINES, LM_HEAD, launch_line, undraftable
from .metadata import HeadMeta


def usage(head: DraftHead, meta: HeadMeta, folder: Path, place: str, alone: bool) -> str:
    """place: how commands name the checkpoint in the folder. alone: a head without its target."""
    target, fused = meta.target, "fused" if alone else place
    whole = target if alone and not is_joint(folder) else fused  # what holds the target's weights
    first = [f"headstart fuse {target} {place} fused"] if alone else []
    parts = [
        "## Use",
        "Headstart:",
        _code("bash", *first, f'headstart generate {fused} "Why is the sky blue?"'),
        _python(
            "from headstart.inference import SpeculativeModel",
            f'model = SpeculativeModel.from_pretrained("{fused}")',
            'ids = model.target.tokenizer("Why is the sky blue?", return_tensors="pt").input_ids',
            "out = model.generate(ids, max_new_tokens=100)",
            "print(model.target.tokenizer.decode(out[0]), model.last_stats.acceptance_length)",
        ),
        _plain(whole, alone),
        _python(
            "from transformers import pipeline",
            f'answer = pipeline("text-generation", model="{whole}")',
            'print(answer("Why is the sky blue?", max_new_tokens=100))',
        ),
        *_speculating(folder, whole),
        _engines(head, meta, folder, place, alone),
    ]
    return "\n\n".join(parts)


def _plain(whole: str, alone: bool) -> str:
    if alone:
        return f"`transformers` opens `{whole}`, without the head:"
    return "`transformers`, vLLM and SGLang open the checkpoint as the plain target:"


def _speculating(folder: Path, whole: str) -> list[str]:
    """How transformers drafts with the head, where the folder has the code for that."""
    if not (folder / FILES[0]).is_file():
        return []
    return [
        "With the code in the checkpoint it drafts with the head too (a chain, not a tree):",
        _python(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("{whole}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{whole}")',
            'ids = tokenizer("Why is the sky blue?", return_tensors="pt")',
            f'code = {{"custom_generate": "{whole}", "trust_remote_code": True}}',
            "out = model.generate(**ids, max_new_tokens=100, **code)",
        ),
    ]


def _engines(head: DraftHead, meta: HeadMeta, folder: Path, place: str, alone: bool) -> str:
    """What makes vLLM and SGLang draft with the head."""
    reason = undraftable(head)
    if reason is not None:
        return f"vLLM and SGLang cannot draft with the head: {reason}."
    target, steps = meta.target, meta.steps
    if not alone:
        # They find a draft model by a folder or a whole repository, not inside one.
        fetch = [] if place == "FOLDER" else [f"hf download {place} --local-dir fused"]
        fused = place if place == "FOLDER" else "fused"
        return _serving(fused, f"{fused}/{HEADS}", steps, fetch)
    if _holds_lm_head(head, folder) and not is_joint(folder):
        return _serving(target, place, steps, [])
    fuse = f"headstart fuse {target} {place} fused"
    return _serving("fused", f"fused/{HEADS}", steps, [fuse])


def _serving(target: str, draft: str, steps: int | None, before: list[str]) -> str:
    """Shell commands that serve a target with a chain of guesses."""
    lines = [launch_line(engine, target, draft, steps) for engine in ENGINES]
    return "\n\n".join(
        [
            "vLLM and SGLang draft with the head (a chain, not a tree):",
            _code("bash", *before, *lines),
        ]
    )


def _holds_lm_head(head: DraftHead, folder: Path) -> bool:
    """Whether a head's file has the LM head rows that engines want of a draft vocabulary."""
    if head.config.draft_vocab is None:
        return True
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return LM_HEAD in file.keys()


def _python(*lines: str) -> str:
    return _code("python", *lines)


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
