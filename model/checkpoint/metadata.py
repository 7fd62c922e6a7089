"""How a head was trained and what was measured: stored beside its weights, shown in its card."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Measurement(BaseModel):
    """Real decoding on one set of prompts.

    accepted_length: emitted tokens per forward pass of the target, the bonus token included.
    acceptance: share of rounds in which the token of each depth was accepted. speedup: total tokens
    over total time, relative to plain decoding in the same engine. identical: answers that equal
    the plain ones, of `answers`. conditions: machine, dtype and versions, tree shape and sampling.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: str
    tokens: int
    acceptance_length: float
    acceptance: tuple[float, ...] = ()
    speedup: float | None = None
    answers: int = 0
    identical: int = 0
    conditions: str


class Lora(BaseModel):
    """How the target was changed along with the head, by low-rank adapters (model/joint.py).

    keep: weight of the divergence from the original target in training. divergence: mean
    Kullback-Leibler divergence from the original per held-out answer token, in nats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int
    alpha: float
    keep: float
    divergence: float | None = None


class Graft(BaseModel):
    """A head that was carried over to a changed target (`headstart graft`).

    source: the target that it came from. before, after: the accepted length there, None where that
    target was not at hand, and on the changed one: the same prompts and trees, both uncalibrated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    before: float | None = None
    after: float


class HeadMeta(BaseModel):
    """What is known about a trained head.

    target: the Hub id or name of its target. grafts: how it came there from the one that it was
    trained on, the first one's source; empty where that is the target. steps: how many steps
    ahead it was trained for. tokens: how many answer tokens it saw. data_hash: sha256 of the
    training data. start: the trained head that it began as. replaces: the target's own tensors in
    whose place it also is. joint: how its target was changed along with it. weight_only: what the
    target's layers were held in while it was trained, if not in their own type. recipe: the
    settings that it was trained with, by section.

    Calibration, all of it empty before (training/calibrate.py). temperatures: one per depth,
    dividing its logits so that path probabilities are calibrated; what a loaded head drafts with.
    rank_acceptance: per depth, the share of positions whose next token is the head's likeliest
    guess, its second likeliest, and so on, where the path up to there was guessed.
    calibration_rows: positions per depth. calibration_errors: per depth, the expected calibration
    error of its guesses before and after. path_errors: that of the nodes of drafted trees.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    calibration_rows: tuple[int, ...] = ()
    calibration_errors: tuple[tuple[float, float], ...] = ()
    path_errors: tuple[float, float] | None = None
    measured: tuple[Measurement, ...] = ()

    @property
    def trained_on(self) -> str:
        return self.grafts[0].source if self.grafts else self.target

    def grafted(
        self, target: str, before: float | None, after: float, measured: Measurement
    ) -> HeadMeta:
        """What is known on a changed target: how the head was trained, and the new measurement.

        Calibration, earlier measurements and the licence were of the old target. target: its name.
        before, after: as in `Graft`.
        """
        kept = ("steps", "tokens", "data", "data_hash", "start", "joint", "weight_only", "recipe")
        graft = Graft(source=self.target, before=before, after=after)
        return HeadMeta(
            target=target,
            grafts=(*self.grafts, graft),
            measured=(measured,),
            **{name: getattr(self, name) for name in kept},
        )
