"""Keys of a recipe that do not exist (any more), and settings of a head kind that are wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from headstart.model.heads.common.base import head_class

# Settings that there were once: by which value they were off, and why they went.
REMOVED: dict[str, tuple[Any, str]] = {
    "data.pack": (
        False,
        "several conversations in one row were slower than rows of their own, on CPUs and GPUs",
    ),
    "train.compile": (False, "torch.compile made the head's layers hardly faster"),
}


def unknown_keys(model: type[BaseModel], values: Any, path: str) -> Iterator[str]:
    """By their full name, with the nearest one that exists."""
    if not isinstance(values, Mapping) or model.model_config.get("extra") == "allow":
        return
    for key, value in values.items():
        if f"{path}{key}" in REMOVED:
            yield f"{path}{key} (removed: {REMOVED[f'{path}{key}'][1]}; leave it out)"
            continue
        if key not in model.model_fields:
            yield _nearest(path, str(key), list(model.model_fields))
            continue
        for inner in _section_types(model.model_fields[key].annotation):
            yield from unknown_keys(inner, value, f"{path}{key}.")


def without_removed(saved: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A recipe that was saved when there were more settings, without those that were off.

    ValueError names one that was on.
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
                "anew in another train.output, or go on with the version of Headstart that began "
                "it."
            )
    return values


def unknown_open_keys(head: Any, target: Any) -> list[str]:
    """Those of a head kind's own settings, and of a random target's model type."""
    found: list[str] = []
    if isinstance(head, Mapping) and isinstance(head.get("kind"), str):
        found += unknown_keys(head_class(head["kind"])[1], head, "head.")
    sizes = target.get("random") if isinstance(target, Mapping) else None
    if isinstance(sizes, Mapping):
        found += _unknown_sizes(sizes)
    return found


def _unknown_sizes(sizes: Mapping[str, Any]) -> Iterator[str]:
    from transformers import CONFIG_MAPPING  # slow to import, and only needed here

    if sizes.get("model_type") not in CONFIG_MAPPING:
        return  # refused with a better message where the model is made
    config = CONFIG_MAPPING[sizes["model_type"]]()
    for key in sizes:
        if not hasattr(config, str(key)):
            yield _nearest("target.random.", str(key), sorted(config.to_dict()))


def wrong_head_values(head: Any) -> list[str]:
    """What a kind's own settings do not allow. Those not given come from the target."""
    if not isinstance(head, Mapping) or not isinstance(head.get("kind"), str):
        return []
    wrong = list(_wrong_values(head_class(head["kind"])[1], head, "head."))
    size = head.get("draft_vocab")
    if isinstance(size, int) and size < 1:
        wrong.append(f"head.draft_vocab: {size} tokens are none to propose; null is all of them")
    return wrong


def _wrong_values(model: type[BaseModel], values: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in values.items():
        field = model.model_fields[key]
        inner = _section_types(field.annotation)
        if inner and isinstance(value, Mapping):
            yield from _wrong_values(inner[0], value, f"{path}{key}.")
            continue
        kind: Any = field.annotation
        for rule in field.metadata:
            kind = Annotated[kind, rule]
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            for item in error.errors():
                yield f"{path}{dotted((key, *item['loc']))}: {item['msg']}"


def merged(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over defaults, section by section."""
    whole = dict(defaults)
    for key, value in settings.items():
        under = whole.get(key)
        sections = isinstance(under, Mapping) and isinstance(value, Mapping)
        whole[key] = merged(dict(under or {}), value) if sections else value
    return whole


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """The sections in an annotation such as `Section` or `Section | None`."""
    options = (annotation, *getattr(annotation, "__args__", ()))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _nearest(path: str, key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {path}{close[0]}?" if close else f"there are: {', '.join(known)}"
    return f"{path}{key} ({hint})"


def dotted(place: tuple[int | str, ...]) -> str:
    return ".".join(map(str, place)) or "the recipe"
