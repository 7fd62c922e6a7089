"""A recipe: all settings of a training run, in one YAML file.

Unknown keys are refused by their full name, and single values can be set as `section.key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from headstart.model.target.weight_only import Kind as WeightOnly

from .errors import check_random_sizes, readable
from .head_settings import AnyHead, Section

Objective = Literal["kl", "tv", "lk", "e2e_tv"]  # defined in training/objective/losses.py


class TargetConfig(Section):
    name: str | None = Field(
        default=None,
        description="Model on the Hub, folder or .gguf file to load. Give this or `random`.",
    )
    random: dict[str, Any] | None = Field(
        default=None,
        description="A tiny random model in place of `name`: `model_type` and other settings of "
        "transformers' configuration of that type.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of the target's weights. auto: float32 on a CPU, bfloat16 on a GPU.",
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the Hub (default: the main branch)."
    )
    quantize: WeightOnly | None = Field(
        default=None,
        description="Hold the target's layers in 8 bits (int8, float8) or 4 (nf4) during training. "
        "The head learns from the quantised target and can be fused with its original weights.",
    )

    @field_validator("random")
    @classmethod
    def _known_sizes(cls, sizes: dict[str, Any] | None) -> dict[str, Any] | None:
        if sizes is not None:
            check_random_sizes(sizes)
        return sizes

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name is None) == (self.random is None):
            raise ValueError("give either name (a model to load) or random (sizes of a random one)")
        if self.random is not None and self.quantize is not None:
            raise ValueError("quantize is for a model to load (name), not for a random one")
        return self


class DataConfig(Section):
    path: str | tuple[str, ...] | None = Field(
        default=None,
        description="JSONL file of conversations, a list of them, a folder, or a data set on the "
        "Hub. Give this or `random_rows`.",
    )
    random_rows: int | None = Field(
        default=None, ge=1, description="Number of random sequences, for a random target."
    )
    split: str = Field(default="train", description="Split of a data set on the Hub.")
    max_length: int = Field(
        default=2048, ge=3, description="Maximum tokens of a conversation; longer ones are cut."
    )
    global_batch_tokens: int = Field(
        default=4096,
        ge=3,
        description="Maximum tokens of a batch over all processes together, padding included "
        "(sequences times the longest one). Decides the memory of a step.",
    )
    holdout: int = Field(
        default=0,
        ge=0,
        description="Number of conversations kept out of training, to measure the loss on.",
    )
    skip_broken: bool = Field(
        default=False, description="Leave out lines that are not valid instead of stopping."
    )
    features: str | None = Field(
        default=None,
        description="Folder that `headstart features` wrote with this recipe. The target's hidden "
        "states are read from there instead of being recomputed.",
    )

    @model_validator(mode="after")
    def _row_fits(self) -> Self:
        if self.global_batch_tokens < self.max_length:
            raise ValueError(
                f"global_batch_tokens ({self.global_batch_tokens}) is less than max_length "
                f"({self.max_length}): a long conversation would fit no batch; raise one or lower "
                "the other"
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
    kind: Objective = Field(
        default="lk",
        description="Objective. kl: divergence from the target's distribution; tv: its total "
        "variation distance, 1 - acceptance rate; lk: from kl to tv as acceptance grows; e2e_tv: "
        "acceptance length of the whole chain of draft tokens.",
    )
    steps: int = Field(
        default=3, ge=1, description="Draft tokens to train for: steps the head is unrolled."
    )
    step_decay: float = Field(
        default=1.0, gt=0, le=1, description="Weight of each step relative to the one before."
    )
    eta: float = Field(
        default=3.0, ge=0, description="How fast `lk` moves from kl to tv as acceptance grows."
    )
    chunk_rows: int | None = Field(
        default=None,
        ge=1,
        description="Rows whose logits are in memory at once (default: as fit into 2 GiB).",
    )
    recompute: bool = Field(
        default=False,
        description="Recompute activations in the backward pass instead of keeping them.",
    )
    finish: Objective | None = Field(
        default=None, description="Objective for the last part of the run (default: no change)."
    )
    finish_part: float = Field(
        default=0.25, ge=0, le=1, description="Share of the run that `finish` holds for."
    )


class WandbConfig(Section):
    project: str = Field(description="wandb project.")
    name: str | None = Field(default=None, description="Name of the run (default: wandb's choice).")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: write to the run's folder, for `wandb sync`."
    )


class TrainConfig(Section):
    output: str = Field(description="Folder of the run.")
    start_from: str | None = Field(
        default=None,
        description="Folder of a head (or fused folder) to start from, of this target or another "
        "of the same sizes. Its settings hold where `head` gives no others.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the data.")
    steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps, in place of `epochs`."
    )
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Plan no more steps than fit into this time at the speed of the first ones. "
        "Evaluations come on top.",
    )
    accumulate: int = Field(default=1, ge=1, description="Batches per optimizer step.")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: Muon for matrices, which needs fewer steps, AdamW for the rest.",
    )
    lr: float = Field(
        default=6e-4, gt=0, description="Peak learning rate. It falls along a cosine."
    )
    lr_floor: float = Field(
        default=0.1, ge=0, le=1, description="Learning rate at the end, as a share of `lr`."
    )
    warmup: float = Field(
        default=0.04, ge=0, le=1, description="Share of the run with a linear warm-up."
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="AdamW's betas. The second is Muon's momentum too."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    clip: float = Field(default=1.0, gt=0, description="Maximum norm of the gradients.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of the head's matrix products; its weights are float32. auto: "
        "bfloat16 where the hardware has it, else float32.",
    )
    seed: int = Field(default=0, description="Seed of the first weights and the order of the data.")
    log_every: int = Field(default=10, ge=1, description="Steps between two lines of metrics.")
    save_every: int = Field(
        default=500,
        ge=0,
        description="Steps between two checkpoints to resume from. 0: only before evaluations and "
        "at the end.",
    )
    keep: int = Field(
        default=1,
        ge=1,
        description="Checkpoints to keep. Older ones are `state_stepN`; rename one to `state` to "
        "go back to it.",
    )
    resume: bool | Literal["auto"] = Field(
        default=False,
        description="Resume the run in `output`. auto: start one where there is none yet, for "
        "jobs that a cluster stops and restarts.",
    )
    wandb: WandbConfig | None = Field(
        default=None, description="Send metrics, samples and the best head to wandb."
    )
    tensorboard: bool = Field(
        default=False, description="Write metrics and samples for TensorBoard."
    )


class ParallelConfig(Section):
    engine: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = Field(
        default="auto",
        description="How processes share the head: ddp replicates it, fsdp2 shards weights, "
        "gradients and optimizer state, zero1 to zero3 shard by DeepSpeed. auto: as `accelerate "
        "launch` was configured, else ddp.",
    )
    deepspeed: str | None = Field(
        default=None,
        description="JSON file with more settings for zero1 to zero3 (offloading, bucket sizes).",
    )
    target: Literal["replicated", "sharded", "tensor_parallel"] = Field(
        default="replicated",
        description="For a target that fits no accelerator. sharded: its layers are gathered one "
        "at a time; tensor_parallel: all processes compute a part of every layer, of the whole "
        "batch. Both choose the best head by held-out conversations, not by decoding.",
    )


class JointConfig(Section):
    rank: int = Field(default=16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(default=32.0, gt=0, description="alpha / rank scales the adapters.")
    modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description="Names of linear layers that get an adapter. all-linear: all but the LM head.",
    )
    keep: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the divergence from the original target, beside the head's loss.",
    )
    lr: float = Field(
        default=0.1, gt=0, description="Learning rate of the adapters, as a share of `train.lr`."
    )
    start: float = Field(
        default=0.25, ge=0, lt=1, description="Share of the run in which the head trains alone."
    )


class EvalConfig(Section):
    every: float = Field(
        default=0,
        ge=0,
        description="Optimizer steps between two evaluations. Below 1: a share of the run (0.25: "
        "four evaluations); 0: only at the end.",
    )
    prompts: str | None = Field(
        default="dev",
        description="Prompt JSONL, or the name of a shipped one. null, or a target without chat "
        "template: the held-out loss chooses the best head.",
    )
    count: int = Field(default=32, ge=1, description="Number of prompts.")
    max_new_tokens: int = Field(default=128, ge=1, description="Maximum tokens per response.")
    temperature: float = Field(default=0.0, ge=0, description="Sampling temperature. 0: greedy.")
    nodes: int = Field(default=8, ge=2, description="Maximum nodes of the tree, root included.")
    depth: int = Field(default=4, ge=1, description="Maximum depth of the tree.")
    width: int = Field(default=4, ge=1, description="Maximum children of a node.")
    samples: int = Field(
        default=1, ge=0, description="Responses to show, and to keep in samples.jsonl."
    )
    contexts: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="Lengths in tokens that the prompts are also filled up to, to see how the "
        "acceptance length changes. They do not choose the best head, and each takes longer than "
        "the evaluation itself.",
    )

    @model_validator(mode="after")
    def _prompts_to_fill(self) -> Self:
        if self.contexts and self.prompts is None:
            raise ValueError("contexts are lengths of prompts, but prompts is null: name a file")
        return self


# Settings that name files, or decide how a run is reported and saved.
UNDECISIVE = {
    "data": {"path", "features", "split", "skip_broken"},
    "loss": {"chunk_rows", "recompute"},
    "train": {
        *("output", "start_from", "log_every", "save_every", "keep", "resume"),
        *("wandb", "tensorboard"),
    },
}


class Recipe(Section):
    target: TargetConfig = Field(description="The frozen model that the head drafts for.")
    head: AnyHead = Field(description="The draft head: its kind, and that kind's settings.")
    data: DataConfig = Field(description="Conversations to learn from.")
    loss: LossConfig = Field(default=LossConfig(), description="The objective.")
    train: TrainConfig = Field(description="The run: length, optimizer, checkpoints, tracking.")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="How several processes share the work."
    )
    joint: JointConfig | None = Field(
        default=None,
        description="Train the target jointly with the head, by LoRA adapters. This CHANGES the "
        "target: the fused checkpoint holds a model of its own.",
    )
    eval: EvalConfig = Field(
        default=EvalConfig(),
        description="Decoding of held-out prompts during training, which chooses the best head.",
    )

    @model_validator(mode="after")
    def _sharded_or_quantized(self) -> Self:
        if self.target.quantize is not None and self.parallel.target != "replicated":
            raise ValueError(
                f"target.quantize={self.target.quantize} and parallel.target="
                f"{self.parallel.target} exclude each other: leave one of them out"
            )
        return self

    def decisive(self) -> dict[str, dict[str, Any]]:
        """Return the settings that decide what a head learns from given data, for its card."""
        sections = {"data", "loss", "train", "joint"}
        found: dict[str, dict[str, Any]] = self.model_dump(
            mode="json", include=sections, exclude=UNDECISIVE, exclude_none=True
        )
        return found


class _Loader(yaml.SafeLoader):
    """YAML 1.1 parses 1e-3 as a string; here it is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a YAML recipe. overrides: `section.key=value`, values in YAML.

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
    """Make a recipe from nested values. ValueError names every wrong key by its full name."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ValueError(readable(error, Recipe, source)) from None


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
