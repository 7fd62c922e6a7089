"""Metadata of a trained head: how it was trained and what was measured.

It is stored under "headstart" in the head's config.json and shown in its model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the metadata. Unknown keys are an error; keys of earlier versions are translated.

    RENAMED: today's names by those that earlier versions wrote.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    RENAMED: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _translate_old_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # An old key beside today's stays, and is an unknown key then.
        renamed = {old: new for old, new in cls.RENAMED.items() if new not in values}
        return {renamed.get(key, key): value for key, value in values.items()}


class Measurement(Section):
    """Real decoding of one set of prompts.

    prompts: the set, how many, and the most new tokens of each.
    tokens: generated tokens.
    acceptance_length: mean tokens per forward pass of the target, bonus token included.
    acceptance_rates: acceptance rate per draft position, the first one first.
    speedup: total tokens over total time, relative to autoregressive decoding in the same engine.
    responses: number of responses that were compared with autoregressive decoding.
    identical: number of those that were equal to it.
    conditions: device, dtype, versions, tree shape and sampling.
    """

    RENAMED = {
        "accepted_length": "acceptance_length",
        "acceptance": "acceptance_rates",
        "answers": "responses",
    }

    prompts: str
    tokens: int
    acceptance_length: float
    acceptance_rates: tuple[float, ...] = ()
    speedup: float | None = None
    responses: int = 0
    identical: int = 0
    conditions: str


class Lora(Section):
    """Low-rank adapters of the target that were trained jointly with the head.

    divergence_weight: weight in the loss of the divergence from the original target.
    divergence: mean Kullback-Leibler divergence from it per held-out response token, in nats.
    """

    RENAMED = {"keep": "divergence_weight"}

    rank: int
    alpha: float
    divergence_weight: float
    divergence: float | None = None


class Graft(Section):
    """A transfer of the head to a changed target (`headstart graft`).

    source: the target it was transferred from.
    before, after: acceptance length on the source (None if it was not available) and on the changed
        target, for the same prompts and trees, both uncalibrated.
    """

    source: str
    before: float | None = None
    after: float


class HeadMeta(Section):
    """Metadata of a trained head.

    target: Hub id or name of its target.
    grafts: transfers from the target it was trained on to this one, in order.
    license: license of the target.
    steps: number of draft steps in training.
    tokens: number of response tokens in training.
    data, data_hash: description and sha256 of the training data.
    start: trained head that training started from.
    replaces: tensors of the target in whose place the head also is.
    joint: adapters of the target that were trained jointly with the head.
    weight_only: weight-only format of the target's layers in training (default: their own dtype).
    recipe: settings of the training run, by section.

    Calibration (empty without one):

    temperatures: per depth, the divisor of the draft logits. Loaded heads draft with them.
    rank_acceptance: per depth, how often the top-1 draft token is right, the second likeliest and
        so on, given that the path up to there was drafted.
    calibration_positions: per depth, the number of measured positions.
    calibration_errors: per depth, the expected calibration error before and after.
    path_errors: the same for the path probabilities of drafted trees.
    """

    RENAMED = {"calibration_rows": "calibration_positions"}

    target: str
    grafts: tuple[Graft, ...] = ()
    license: str | None = None
    steps: int | None = None
    tokens: int | None = None
    data: str | None = None
    data_hash: str | None = None
    start: str | None = None
    replaces: str | None = None
    joint: Lora | None = None
    weight_only: str | None = None
    recipe: dict[str, dict[str, Any]] | None = None
    temperatures: tuple[Temperature, ...] = ()
    rank_acceptance: tuple[tuple[Share, ...], ...] = ()
    calibration_positions: tuple[int, ...] = ()
    calibration_errors: tuple[tuple[float, float], ...] = ()
    path_errors: tuple[float, float] | None = None
    measured: tuple[Measurement, ...] = ()

    @property
    def trained_on(self) -> str:
        """The target that the head was trained on."""
        return self.grafts[0].source if self.grafts else self.target

    def grafted(
        self, target: str, before: float | None, after: float, measured: Measurement
    ) -> HeadMeta:
        """Return the metadata of the head on a changed target.

        What describes the training is kept; calibration, earlier measurements and the license
        belong to the old target and are dropped.

        target: name of the changed target.
        before, after: acceptance lengths, as in `Graft`.
        measured: measurement on the changed target.
        """
        kept = ("steps", "tokens", "data", "data_hash", "start", "joint", "weight_only", "recipe")
        graft = Graft(source=self.target, before=before, after=after)
        return HeadMeta(
            target=target,
            grafts=(*self.grafts, graft),
            measured=(measured,),
            **{name: getattr(self, name) for name in kept},
        )


class HeadFile(BaseModel):
    """The section "headstart" of a head's config.json.

    version: version of Headstart that wrote the folder.
    target_hash: hash of the weights of the target that the head belongs to.
    head: configuration of the head; its `kind` says of which class.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str
    target_hash: str
    head: dict[str, Any]
    meta: HeadMeta
