"""A recipe: everything that decides a training run, in one YAML file.

Unknown keys are refused by their full name, and single values can be set as `section.key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from headstart.model.heads.common.base import head_class
from headstart.model.target.weight_only import Kind as WeightOnly

from .errors import dotted, unknown_keys, unknown_open_keys, wrong_head_values


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetConfig(Section):
    """The frozen model. name: Hub id, folder or .gguf; or random: settings of a tiny random one.

    dtype: of the target's own weights; auto is float32 on a CPU and bfloat16 on a GPU. quantize:
    hold its layers in 8 bits, or 4 (nf4), while the head is trained (model/weight_only.py); the
    head learns what that target says, and can be fused with the target's own weights.
    """

    name: str | None = None
    random: dict[str, Any] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None
    quantize: WeightOnly | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.random is None):
            raise ValueError("give either name (a model to load) or random (sizes of a random one)")
        if self.random is not None and self.quantize is not None:
            raise ValueError("quantize is for a model to load (name), not for a random one")
        return self


class HeadSection(BaseModel):
    """The kind, and that kind's own settings (see `Config` in headstart/model/heads/<kind>.py)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataConfig(Section):
    """Conversations to learn from.

    path: a JSONL file, several of them, a folder of data, or a data set on the Hub (its `split`);
    or random_rows: so many made-up sequences, for a random target. batch_tokens: rows times the
    longest row, so the memory of a batch. max_length: longer conversations are cut. holdout:
    conversations kept out of training to measure the loss on. skip_broken: leave broken lines out
    instead of stopping. features: a folder that `headstart features` wrote with this recipe: what
    the target sees is then taken from there instead of being worked out again.
    """

    path: str | tuple[str, ...] | None = None
    random_rows: int | None = Field(default=None, ge=1)
    split: str = "train"
    max_length: int = Field(default=2048, ge=3)
    batch_tokens: int = Field(default=4096, ge=3)
    holdout: int = Field(default=0, ge=0)
    skip_broken: bool = False
    features: str | None = None

    @model_validator(mode="after")
    def _row_fits(self) -> Self:
        if self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) is less than max_length ({self.max_length}): "
                "a long conversation would fit no batch; raise one or lower the other"
            )
        return self

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.random_rows is None):
            raise ValueError("give either path (what to read) or random_rows (how many to make up)")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        if self.path is None:
            return ()
        return (self.path,) if isinstance(self.path, str) else self.path


class LossConfig(Section):
    """The objective (training/losses.py says what each kind is).

    steps: drafted tokens to train for. step_decay: weight of each step relative to the one before.
    eta: how fast `lk` moves from KL to TV as acceptance grows. chunk_rows: rows whose logits are in
    memory at once; null: as many as keep them under 2 GiB. recompute: work the steps out again in
    the backward pass instead of keeping what is in between. finish: the kind for the last
    `finish_part` of the run, if it is to change.
    """

    kind: Literal["kl", "tv", "lk", "e2e_tv"] = "lk"
    steps: int = Field(default=3, ge=1)
    step_decay: float = Field(default=1.0, gt=0, le=1)
    eta: float = Field(default=3.0, ge=0)
    chunk_rows: int | None = Field(default=None, ge=1)
    recompute: bool = False
    finish: Literal["kl", "tv", "lk", "e2e_tv"] | None = None
    finish_part: float = Field(default=0.25, ge=0, le=1)


class WandbConfig(Section):
    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrainConfig(Section):
    """How to optimise.

    output: folder of the run. start_from: a head to begin with, as a folder (a fused one too), with
    the settings that `head` does not change; of another target of the same sizes as well. epochs:
    passes over the data, unless steps says how many optimizer steps. minutes: plan no more steps
    than fit into this time at the speed of the first ones (evaluations come on top). accumulate:
    batches per optimizer step. optimizer: muon trains matrices with Muon, which needs fewer steps,
    and the rest with AdamW; betas[1] is then its momentum too. lr falls as a cosine to lr_floor *
    lr after a linear warm-up over the part `warmup` of the run. precision: of the head's matrix
    products; its weights are always float32; auto is bfloat16 where the hardware has it, else
    float32. save_every: steps between checkpoints to resume from (0: only before evaluations and
    at the end). keep: how many of them stay (the older ones as state_stepN, which take the place of
    the folder state to go back to). resume: go on with the run in output; auto starts one where
    there is none yet, for jobs that a cluster stops and starts again.
    """

    output: str
    start_from: str | None = None
    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=6e-4, gt=0)
    lr_floor: float = Field(default=0.1, ge=0, le=1)
    warmup: float = Field(default=0.04, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=500, ge=0)
    keep: int = Field(default=1, ge=1)
    resume: bool | Literal["auto"] = False
    wandb: WandbConfig | None = None
    tensorboard: bool = False


class ParallelConfig(Section):
    """How several processes share the work (training/engines.py says what each engine spreads).

    engine: auto is what `accelerate launch` was configured for, else ddp. deepspeed: a JSON file
    for zero1, zero2 and zero3, with more settings (offloading, bucket sizes). target: for one that
    fits no accelerator; held-out conversations then choose the best head, since such a target does
    not decode. sharded: its layers lie in parts on all processes, put together one at a time.
    tensor_parallel: all processes compute a part of every layer, of the whole batch.
    """

    engine: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    deepspeed: str | None = None
    target: Literal["replicated", "sharded", "tensor_parallel"] = "replicated"


class JointConfig(Section):
    """Training the target along with the head (training/joint.py). This CHANGES the target: what it
    says is held near the original, and the fused checkpoint holds a model of its own.

    rank, alpha: of the adapters; alpha / rank scales them. modules: names of linear layers that get
    one; all-linear: all but the LM head. keep: weight of the divergence from the original, beside
    the head's loss. lr: the adapters' learning rate as a part of train.lr. start: the part of the
    run in which the head learns alone.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    keep: float = Field(default=1.0, ge=0)
    lr: float = Field(default=0.1, gt=0)
    start: float = Field(default=0.25, ge=0, lt=1)


class EvalConfig(Section):
    """Real decoding during training, by which the best head is chosen.

    every: optimizer steps between two evaluations (0: only at the end; below 1: as a part of the
    run, so 0.25 evaluates four times). prompts: a prompt JSONL, or the name of a shipped one; null,
    or a target without chat template: the held-out loss decides. count: prompts used. nodes, depth,
    width: the tree. samples: answers that are shown and kept in samples.jsonl. contexts: lengths in
    tokens that the prompts are also filled up to, to see how the accepted length changes; they do
    not choose the best head, and each takes longer than the evaluation itself.
    """

    every: float = Field(default=0, ge=0)
    prompts: str | None = "dev"
    count: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    nodes: int = Field(default=8, ge=2)
    depth: int = Field(default=4, ge=1)
    width: int = Field(default=4, ge=1)
    samples: int = Field(default=1, ge=0)
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = ()

    @model_validator(mode="after")
    def _prompts_to_fill(self) -> Self:
        if self.contexts and self.prompts is None:
            raise ValueError("contexts are lengths of prompts, but prompts is null: name a file")
        return self


# Settings that name files, or say how a run is watched and saved.
UNDECISIVE = {
    "data": {"path", "features", "split", "skip_broken"},
    "loss": {"chunk_rows", "recompute"},
    "train": {
        *("output", "start_from", "log_every", "save_every", "keep", "resume"),
        *("wandb", "tensorboard"),
    },
}


class Recipe(Section):
    target: TargetConfig
    head: HeadSection
    data: DataConfig
    loss: LossConfig = LossConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    joint: JointConfig | None = None
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _in_parts_or_quantised(self) -> Self:
        if self.target.quantize is not None and self.parallel.target != "replicated":
            raise ValueError(
                f"target.quantize={self.target.quantize} and parallel.target="
                f"{self.parallel.target} exclude each other: leave one of them out"
            )
        return self

    def decisive(self) -> dict[str, dict[str, Any]]:
        """What decides what a head learns from given data, without names of files: for its card."""
        sections = {"data", "loss", "train", "joint"}
        found: dict[str, dict[str, Any]] = self.model_dump(
            mode="json", include=sections, exclude=UNDECISIVE, exclude_none=True
        )
        return found


END = "..."  # what YAML writes behind a value that stands alone


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a word; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe. overrides: `section.key=value`, values in YAML.

    ValueError names the file and every wrong key by its full name.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The recipe {path} is no UTF-8 text: {error}. Save it as such."
        ) from error
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no recipe: it should hold sections such as `target:`.")
    for override in overrides:
        _override(values, override)
    return make_recipe(values, str(path))


def make_recipe(values: Mapping[str, Any], source: str = "the recipe") -> Recipe:
    """A recipe from nested values. ValueError names every wrong key by its full name."""
    unknown = list(unknown_keys(Recipe, values, ""))
    unknown += unknown_open_keys(values.get("head"), values.get("target"))
    if unknown:
        raise ValueError("\n  ".join([f"Unknown keys in {source}:", *unknown]))
    wrong: list[str] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        wrong += [f"{dotted(item['loc'])}: {item['msg']}" for item in error.errors()]
    wrong += wrong_head_values(values.get("head"))
    if wrong or recipe is None:
        raise ValueError("\n  ".join([f"Wrong values in {source}:", *wrong]))
    return recipe


def explain(recipe: Recipe) -> str:
    """The resolved recipe as YAML; what the recipe itself does not say is marked as default."""
    lines: list[str] = []
    for name, section in recipe:
        if section is None:
            lines.append(f"{name}: null  # default")
            continue
        lines.append(f"{name}:")
        lines += [f"  {line}" for line in _explain_section(section)]
    return "\n".join(lines) + "\n"


def _explain_section(section: BaseModel) -> Iterator[str]:
    values = section.model_dump(mode="json")
    given = set(section.model_fields_set)
    if isinstance(section, HeadSection):
        given |= set(section.settings)
        fields = head_class(section.kind)[1].model_fields
        for name, field in fields.items():
            if name not in values and field.default is not PydanticUndefined:
                values[name] = field.default
    for name, value in values.items():
        text = yaml.safe_dump(value, default_flow_style=True, width=1000)
        line = f"{name}: {text.strip().removesuffix(END).strip()}"
        yield line if name in given else f"{line}  # default"


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{override!r} sets nothing: write section.key=value, e.g. train.lr=1e-3.")
    *sections, name = key.strip().split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"{key} cannot be set: {section} is a value, not a section.")
        place = inner
    place[name] = _parse(text, override)
