"""The `head` section of a recipe: one model per kind, made from the kind's own `Config`.

The settings of a kind are documented in its file in `model/heads/`. Sizes come from the target, so
that a recipe needs none of them.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_serializer,
)
from pydantic.fields import FieldInfo

from headstart.model.heads.common.base import head_class, kinds

from .errors import TAG, sections_of

FROM_TARGET = "from the target"  # marks settings whose default the target decides


class Section(BaseModel):
    """A part of a recipe. Keys that do not exist are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PartlyGiven(Section):
    """Settings that dump only those given: the target decides the others."""

    @model_serializer
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in self if name in self.model_fields_set}


class HeadSection(PartlyGiven):
    """Base of the sections of all kinds."""

    kind: str = Field(description=f"Kind of head: {', '.join(kinds())}.")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that were given, without the kind."""
        return {name: value for name, value in self.model_dump().items() if name != TAG}


def _of_kind(kind: str) -> type[BaseModel]:
    tag: Any = (Literal[kind], Field(description=HeadSection.model_fields[TAG].description))
    settings = {
        name: _optional(field, field.is_required())
        for name, field in head_class(kind)[1].model_fields.items()
        if name != TAG
    }
    section: type[BaseModel] = create_model(
        f"{kind}_head", __base__=HeadSection, **{TAG: tag}, **settings
    )
    return section


def _optional(field: FieldInfo, from_target: bool) -> Any:
    """Return an optional field for `create_model` with the same rules.

    from_target: ignore its default and those of the settings below it.
    """
    kind: Any = field.annotation
    for section in sections_of(kind):  # one at most
        inner = {
            name: _optional(one, from_target or one.is_required())
            for name, one in section.model_fields.items()
        }
        part = create_model(section.__name__, __base__=PartlyGiven, **inner)
        kind = part if kind is section else part | None
    for rule in field.metadata:
        kind = Annotated[kind, rule]
    if from_target:
        return Annotated[kind, FROM_TARGET], Field(default=None, description=field.description)
    return kind, Field(default=field.default, description=field.description)


if TYPE_CHECKING:
    AnyHead = HeadSection
else:
    AnyHead = Annotated[reduce(or_, map(_of_kind, kinds())), Field(discriminator=TAG)]
