"""Print every setting of a recipe with its value and meaning, as a recipe in YAML."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from .errors import sections_of
from .head_settings import FROM_TARGET, PartlyGiven
from .schema import Recipe

FROM_START = "from train.start_from"
WIDTH = 92  # of comments, without indentation
END = "..."  # YAML's end mark after a lone value


def explain(recipe: Recipe) -> str:
    """Return the resolved recipe in YAML, each setting below its meaning.

    Defaults are marked. Settings that the target or the first head decides are commented out, and
    so are those of sections that the recipe does not have.
    """
    origin = FROM_TARGET if recipe.train.start_from is None else FROM_START
    fields = type(recipe).model_fields
    sections = [_setting(name, field, recipe, origin) for name, field in fields.items()]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _section(model: type[BaseModel], values: BaseModel | None, origin: str) -> list[str]:
    fields = model.model_fields.items()
    return [line for name, field in fields for line in _setting(name, field, values, origin)]


def _setting(name: str, field: FieldInfo, values: BaseModel | None, origin: str) -> list[str]:
    """Return the lines of one setting. values: its section, None for one that the recipe does not
    have. origin: of the head's settings that are not given."""
    meaning = [f"# {line}" for line in textwrap.wrap(field.description or "", WIDTH)]
    value = field.default if values is None else getattr(values, name)
    if isinstance(value, BaseModel):
        lines = _section(type(value), value, origin)
        given = any(not line.startswith("#") for line in lines)
        return [*meaning, f"{name}:" if given else f"{name}: {{}}", *_indented(lines, "  ")]
    below = sections_of(field.annotation) if value is None else []
    inner = [line for section in below for line in _section(section, None, origin)]
    lines = [_line(name, field, value, values, origin), *_indented(inner, "#   ")]
    return [*meaning, *lines]


def _line(name: str, field: FieldInfo, value: Any, values: BaseModel | None, origin: str) -> str:
    if values is None and field.is_required():
        return f"{name}:  # required"
    given = values is not None and name in values.model_fields_set
    of_a_head = isinstance(values, PartlyGiven) and origin == FROM_START
    if not given and (of_a_head or FROM_TARGET in field.metadata):
        return f"{'' if values is None else '# '}{name}:  # {origin}"
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000)
    line = f"{name}: {text.strip().removesuffix(END).strip()}"
    return line if given or values is None else f"{line}  # default"


def _indented(lines: list[str], prefix: str) -> list[str]:
    return [f"{prefix}{line}" for line in lines]
