"""Prompt files: JSON lines with `prompt`, `turns` or `messages`, or a data set of such rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from headstart.inference.rollout import Message, Prompt, prompt_ids
from headstart.model.target.target import Target
from headstart.training.data.conversations import read_lines


def shipped_prompts(name: str) -> Path:
    """A shipped prompt file: `train`, `dev` (to choose a head by) or `heldout` (to measure on)."""
    return Path(str(resources.files("headstart.configs") / "prompts" / f"{name}.jsonl"))


def read_prompts(
    paths: Sequence[str],
    *,
    split: str = "train",
    skip_broken: bool = False,
    remedy: str = "Fix or remove the line.",
) -> tuple[list[Prompt], list[str]]:
    """Read prompts of JSONL files, local data sets or Hub data sets.

    skip_broken: leave out invalid lines instead of raising ValueError with file and line.
    remedy: advice that ends this error.
    Returns the prompts, and notes on the lines that were left out.
    """
    prompts: dict[str, Prompt] = {}
    broken: list[str] = []
    lines = [
        line
        for path in paths
        for line in read_lines(path, split=split, skip_broken=True, broken=broken)
    ]
    if broken and not skip_broken:
        raise ValueError(f"{broken[0]} {remedy}")
    for where, value in lines:
        try:
            prompt = _prompt(where, value)
            if prompt == prompts.get(prompt.id):
                broken.append(f"{where} repeats an earlier prompt.")
                continue
            if prompt.id in prompts:
                raise ValueError(f"{where} repeats the id {prompt.id!r} of another prompt.")
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{error} {remedy}") from error
            broken.append(str(error))
            continue
        prompts[prompt.id] = prompt
    if not prompts:
        raise ValueError(f"There is no prompt in {', '.join(paths)}. Check the files.")
    return list(prompts.values()), broken


def first_turns(target: Target, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The token ids of the first turn of each prompt, in the target's chat template."""
    return [
        prompt_ids(target, [*one.before, {"role": "user", "content": one.turns[0]}])
        for one in prompts
    ]


def decodable(name: str, limit: int | None, target: Target) -> list[Prompt]:
    """The first prompts of a file or of a shipped set that leave room for a response.

    Raises ValueError for a prompt of a file that does not fit, before any decoding. Shipped prompts
    that do not fit are left out.
    """
    shipped = shipped_prompts(name)
    if Path(name).exists() or not shipped.is_file():
        prompts, _ = read_prompts([name])
        prompts = prompts[:limit]
        for prompt, tokens in zip(prompts, first_turns(target, prompts), strict=True):
            if not has_room(target, tokens):
                raise ValueError(
                    f"The prompt {prompt.id!r} has {len(tokens)} tokens, but the context of "
                    f"{target.name}, prompt and response together, is {target.context_limit}. "
                    "Shorten or remove it."
                )
        return prompts
    prompts, _ = read_prompts([str(shipped)])
    ids = first_turns(target, prompts)
    fitting = [one for one, tokens in zip(prompts, ids, strict=True) if has_room(target, tokens)]
    if not fitting:
        raise ValueError(
            f"No shipped prompt leaves room for a response in the context of {target.name}. Name a "
            "file of shorter prompts, or in a recipe set eval.prompts=null to choose the best head "
            "by the held-out loss."
        )
    return fitting[:limit]


def has_room(target: Target, tokens: Sequence[int]) -> bool:
    """Whether the target's context has room for at least one token behind the prompt."""
    limit = target.context_limit
    return limit is None or len(tokens) < limit


def _prompt(where: str, value: Any) -> Prompt:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} holds {type(value).__name__}, not a JSON object.")
    before, turns = _turns(where, value)
    if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError(f"{where} has an empty prompt.")
    # Without an id, a hash of the text: line numbers would repeat across files.
    text = json.dumps([before, turns], sort_keys=True)
    name = str(value.get("id", f"prompt-{hashlib.sha256(text.encode()).hexdigest()[:12]}"))
    source = value.get("source") or value.get("category")
    return Prompt(name, turns, before, None if source is None else str(source))


def _turns(where: str, value: Mapping[str, Any]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """System messages, and user messages in order; assistant messages are left out."""
    if isinstance(value.get("prompt"), str):
        return (), (value["prompt"],)
    if isinstance(value.get("turns"), list):
        return (), tuple(value["turns"])
    if isinstance(value.get("messages"), list):
        messages = value["messages"]
        if not all(
            isinstance(one, Mapping)
            and isinstance(one.get("role"), str)
            and isinstance(one.get("content"), str)
            for one in messages
        ):
            raise ValueError(f"{where} has a message without `role` and `content` as text.")
        if not any(one["role"] == "user" for one in messages):
            raise ValueError(f"{where} has no user message, so there is no prompt.")
        system = tuple(dict(one) for one in messages if one.get("role") == "system")
        return system, tuple(one["content"] for one in messages if one.get("role") == "user")
    raise ValueError(
        f"{where} has none of `prompt` (text), `turns` (list of texts) and `messages` "
        f"(it has: {', '.join(map(str, value))})."
    )
