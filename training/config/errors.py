"""Errors in a recipe, by the full name of each key; settings that were removed or renamed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

TAG = "kind"  # discriminates the sections of a union

# Former settings: the value that turned them off, and why they were removed.
REMOVED: dict[str, tuple[Any, str]] = {
    "data.pack": (
        False,
        "several conversations in one row were slower than rows of their own, on CPUs and GPUs",
    ),
    "train.compile": (False, "torch.compile made the head's layers hardly faster"),
}


# Former names of settings.
RENAMED = {"data.batch_tokens": "data.global_batch_tokens"}


def readable(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """Format pydantic's errors as one line per key. source: where the values come from.

    Unknown keys are reported alone, since a wrong or missing value may be one of them.
    """
    unknown: list[str] = []
    wrong: dict[str, list[str]] = {}
    for item in error.errors():
        names, known, choices = _find(model, item["loc"])
        if item["type"] == "extra_forbidden":
            unknown.append(_unknown(".".join(names), known))
            continue
        if item["type"].startswith("union_tag_"):
            names.append(TAG)
        place = ".".join(names) or "the recipe"
        wrong.setdefault(place, []).append(_message(item, choices))
    if unknown:
        return "\n  ".join([f"Unknown keys in {source}:", *unknown])
    lines = [f"{place}: {', or '.join(messages)}" for place, messages in wrong.items()]
    return "\n  ".join([f"Wrong values in {source}:", *lines])


def current_settings(saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Translate a recipe that an older version saved: renamed settings, and removed ones that were
    off. ValueError names a removed one that was on.
    """
    values = {
        name: dict(section) if isinstance(section, Mapping) else section
        for name, section in saved.items()
    }
    for key, (off, why) in REMOVED.items():
        section, name = key.split(".")
        value = (values.get(section) or {}).pop(name, off)
        if value != off:
            raise ValueError(
                f"{source} was made with {key}={value}, a setting that was removed: {why}. Start "
                "again in another train.output, or resume with the version of Headstart that "
                "began it."
            )
    for former, key in RENAMED.items():
        section, name = former.split(".")
        if name in (values.get(section) or {}):
            values[section][key.split(".")[1]] = values[section].pop(name)
    return values


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections in an annotation: `Section`, `Section | None` or `One | Other`."""
    options = (annotation, *get_args(annotation))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _find(
    model: type[BaseModel], loc: Iterable[int | str]
) -> tuple[list[str], list[str], list[str]]:
    """Follow pydantic's path to a value: its names, the siblings of the last, the tags below it.

    Pydantic's path also names the chosen alternative of a union, which no recipe holds.
    """
    names: list[str] = []
    known: list[str] = []
    sections = [model]
    for step in loc:
        if len(sections) > 1:
            sections = [section for section in sections if step in _tags(section)]
        elif sections:
            fields = sections[0].model_fields
            names, known = [*names, str(step)], list(fields)
            sections = sections_of(fields[str(step)].annotation) if step in fields else []
        elif isinstance(step, int):
            names.append(str(step))
    return names, known, [tag for section in sections for tag in _tags(section)]


def _unknown(key: str, known: list[str]) -> str:
    if key in REMOVED:
        return f"{key} (removed: {REMOVED[key][1]}; leave it out)"
    if key in RENAMED:
        return f"{key} (renamed: write {RENAMED[key]})"
    return _nearest(key, known)


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    field = section.model_fields.get(TAG)
    return () if field is None else get_args(field.annotation)


def _message(item: ErrorDetails, choices: list[str]) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "union_tag_invalid":
        return f"unknown {_nearest(item['ctx']['tag'], choices)}"
    if item["type"] == "union_tag_not_found":
        return f"Field required: one of {', '.join(choices)}"
    return item["msg"]


def check_random_sizes(sizes: Mapping[str, Any]) -> None:
    """ValueError for settings that a random target's model type does not have."""
    from transformers import CONFIG_MAPPING  # slow to import, and only needed here

    if sizes.get("model_type") not in CONFIG_MAPPING:
        return  # refused with a better message where the model is made
    config = CONFIG_MAPPING[sizes["model_type"]]()
    unknown = [str(key) for key in sizes if not hasattr(config, str(key))]
    if unknown:
        known = sorted(config.to_dict())
        found = [_nearest(f"target.random.{key}", known) for key in unknown]
        raise ValueError(f"{sizes['model_type']} has no {'; '.join(found)}")


def merged(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings over defaults, section by section."""
    whole = dict(defaults)
    for key, value in settings.items():
        under = whole.get(key)
        sections = isinstance(under, Mapping) and isinstance(value, Mapping)
        whole[key] = merged(dict(under or {}), value) if sections else value
    return whole


def _nearest(name: str, known: list[str]) -> str:
    """Return a name that does not exist with the nearest one that does."""
    *path, key = name.split(".")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if close:
        return f"{name} (did you mean {'.'.join([*path, close[0]])}?)"
    return f"{name} (there are: {', '.join(known)})"
