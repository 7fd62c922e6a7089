"""Hidden states of a frozen target on disk, for several epochs without repeating its forward pass.

    features.json                  metadata, and every finished shard with its sha256
    shard-00000.safetensors ...    one tensor per conversation, (taps + 1) x T x D: the outputs of
                                   the tapped layers, then the LM head's input

Only the layers that a head taps are stored. As float8 (e4m3) every vector has its own scale, and
the error is recorded. A shard counts once it is in the index, so writing resumes where it stopped.

Legend: T positions, L stored layers (with the LM head's input), D hidden size, B sequences.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from torch import Tensor

from headstart.model.checkpoint.atomic import file_sha256, replace_text
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.training.config.schema import Recipe

from .batching import Batch, Corpus
from .conversations import Conversations, grouped_by_length

INDEX = "features.json"
Kind = Literal["float32", "bfloat16", "float16", "float8"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
SCALE_BYTES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = torch.float8_e4m3fn
SPARE = 1.02  # factor on the disk space, for names and offsets

Progress = Callable[[int, int], None]  # conversations stored, and their total number


class Shard(BaseModel):
    """A file of hidden states. rows: its conversations, [first, last). squares: sums of the squared
    errors that storing made, and of the squared values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    rows: tuple[int, int]
    sha256: str
    squares: tuple[float, float]


class Index(BaseModel):
    """Metadata of a folder of hidden states.

    weight_only: format of the target's weights, if quantized. rows: number of conversations to
    store, held-out ones last.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_hash: str
    weight_only: str | None = None
    data_hash: str
    layers: tuple[int, ...]
    hidden_size: int
    kind: Kind
    rows: int
    shards: tuple[Shard, ...] = ()

    @property
    def done(self) -> int:
        return self.shards[-1].rows[1] if self.shards else 0

    @property
    def error(self) -> float:
        """Root mean square error relative to that of the values."""
        wrong = sum(shard.squares[0] for shard in self.shards)
        return float((wrong / max(1e-30, sum(shard.squares[1] for shard in self.shards))) ** 0.5)


def wanted(
    data: Conversations, target: Target, layers: tuple[int, ...], kind: Kind | None
) -> Index:
    """Return the empty index for this data, target and taps. kind None: the target's dtype."""
    return Index(
        target_hash=target_hash(target),
        weight_only=target.weight_only,
        data_hash=data_hash(data),
        layers=tuple(sorted(layers)),
        hidden_size=target.hidden_size,
        kind=kind or _kind(target.dtype),
        rows=len(data.train) + len(data.holdout),
    )


def size_bytes(index: Index, data: Conversations) -> int:
    """Return the disk space of the whole store."""
    tokens = int(data.train.lengths.sum() + data.holdout.lengths.sum())
    per_vector = index.hidden_size * BYTES[index.kind]
    if index.kind == "float8":
        per_vector += SCALE_BYTES
    return tokens * (len(index.layers) + 1) * per_vector


def write_features(
    folder: Path,
    index: Index,
    data: Conversations,
    target: Target,
    *,
    batch_tokens: int,
    shard_bytes: int,
    progress: Progress | None = None,
) -> Index:
    """Run the target over all conversations, store its hidden states and return the final index.

    Resumes a folder of the same target, data and taps. ValueError for a folder of others and
    for a full disk, before anything is written.
    """
    known = _read_index(folder) if (folder / INDEX).exists() else None
    if known is not None:
        _check_same(folder, known, index)
        index = known
    _check_room(folder, index, data)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = torch.cat([data.train.lengths, data.holdout.lengths])
    per_token = size_bytes(index, data) / max(1, int(lengths.sum()))
    for first, last in _cuts(lengths, index.done, shard_bytes / per_token):
        tensors, squares = _shard(index, data, target, range(first, last), batch_tokens)
        name = f"shard-{len(index.shards):05d}.safetensors"
        content = safetensors.torch.save(tensors)
        (folder / name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(file=name, rows=(first, last), sha256=digest, squares=squares)
        index = index.model_copy(update={"shards": (*index.shards, shard)})
        replace_text(folder / INDEX, index.model_dump_json(indent=1) + "\n")
        if progress is not None:
            progress(last, index.rows)
    return index


class Features:
    """A finished store, to read batches from."""

    def __init__(self, folder: Path, wanted: Index):
        """Open a store. ValueError when it is unfinished or holds other things than `wanted`."""
        self.folder, self.index = folder, _read_index(folder)
        _check_same(folder, self.index, wanted.model_copy(update={"kind": self.index.kind}))
        if self.index.done < self.index.rows:
            raise ValueError(
                f"{folder} holds the features of {self.index.done} of {self.index.rows} "
                "conversations. Resume the `headstart features` that began it."
            )
        self._open: dict[str, safe_open] = {}

    def read(self, batch: Batch, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """Return the hidden states of a batch, L x B x T x D in main memory; zeros as padding.

        pinned: in memory that a GPU fetches asynchronously.
        """
        assert batch.rows_B is not None
        rows, length = batch.rows_B.tolist(), batch.tokens_BT.shape[1]
        shape = (len(self.index.layers) + 1, len(rows), length, self.index.hidden_size)
        stored_LBTD = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        for place, row in enumerate(rows):
            end = int(batch.lengths_B[place])
            stored_LBTD[:, place, :end] = self._row(row)[:, :end].to(dtype)
        return stored_LBTD

    def _row(self, row: int) -> Tensor:
        file = self._shard(row)
        values: Tensor = file.get_tensor(str(row))
        if self.index.kind != "float8":
            return values
        scales: Tensor = file.get_tensor(f"{row}.scale")
        return values.to(torch.float32) * scales[..., None]

    def _shard(self, row: int) -> safe_open:
        shard = next(one for one in self.index.shards if one.rows[0] <= row < one.rows[1])
        if shard.file not in self._open:
            path = self.folder / shard.file
            if not path.is_file() or file_sha256(path) != shard.sha256:
                raise ValueError(
                    f"{path} is missing, was cut short or has changed since it was written. "
                    f"Remove {self.folder} and store the features again."
                )
            self._open[shard.file] = safe_open(path, "pt")
        return self._open[shard.file]


def target_output(stored_LBTD: Tensor, layers: Sequence[int]) -> TargetOutput:
    """Return stored hidden states as the target's output. layers: of the store's index."""
    return TargetOutput(None, stored_LBTD[-1], dict(zip(layers, stored_LBTD, strict=False)))


def open_features(
    recipe: Recipe, data: Conversations, target: Target, head: DraftHead
) -> Features | None:
    """Open the store that a recipe names, if any. ValueError where it does not fit."""
    if recipe.data.features is None:
        return None
    return Features(Path(recipe.data.features), wanted(data, target, head.taps, None))


def data_hash(data: Conversations) -> str:
    """Return the hash of training and held-out conversations together."""
    return hashlib.sha256((data.train.sha256() + data.holdout.sha256()).encode()).hexdigest()


def _kind(dtype: torch.dtype) -> Kind:
    for name, known in DTYPES.items():
        if known == dtype:
            return name  # type: ignore[return-value]
    raise ValueError(f"Features of a target in {dtype} cannot be stored. Load it in bfloat16.")


def _cuts(lengths: Tensor, first: int, tokens: float) -> Iterator[tuple[int, int]]:
    """Yield the conversations of one shard after the other, [first, last)."""
    held = 0
    start = first
    for row in range(first, len(lengths)):
        held += int(lengths[row])
        if held >= tokens or row + 1 == len(lengths):
            yield start, row + 1
            start, held = row + 1, 0


def _shard(
    index: Index, data: Conversations, target: Target, rows: range, batch_tokens: int
) -> tuple[dict[str, Tensor], tuple[float, float]]:
    tensors: dict[str, Tensor] = {}
    wrong = whole = 0.0
    for corpus, places in _of_corpora(data, rows):
        for group in grouped_by_length(corpus, batch_tokens, places):
            batch = corpus.batch(group)
            output = target.forward(
                batch.tokens_BT.to(target.device),
                lengths_B=batch.lengths_B.to(target.device),
                taps=index.layers,
                logits=False,
            )
            taps = [output.hidden_states[layer] for layer in index.layers]
            values_LBTD = torch.stack([*taps, output.lm_head_input_BTD]).cpu()
            assert batch.rows_B is not None
            for place, row in enumerate(batch.rows_B.tolist()):
                values_LTD = values_LBTD[:, place, : int(batch.lengths_B[place])].contiguous()
                stored = _encoded(str(row), values_LTD, index.kind)
                tensors |= stored
                restored = _restored(str(row), stored)
                wrong += float((restored - values_LTD.float()).square().sum(dtype=torch.float64))
                whole += float(values_LTD.float().square().sum(dtype=torch.float64))
    return tensors, (wrong, whole)


def _encoded(name: str, values_LTD: Tensor, kind: Kind) -> dict[str, Tensor]:
    if kind != "float8":
        return {name: values_LTD.to(DTYPES[kind])}
    values_LTD = values_LTD.float()
    scale_LT = values_LTD.abs().amax(-1).clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return {name: (values_LTD / scale_LT[..., None]).to(FLOAT8), f"{name}.scale": scale_LT}


def _restored(name: str, stored: dict[str, Tensor]) -> Tensor:
    values = stored[name].float()
    scale = stored.get(f"{name}.scale")
    return values if scale is None else values * scale[..., None]


def _of_corpora(data: Conversations, rows: range) -> Iterator[tuple[Corpus, list[int]]]:
    trained = len(data.train)
    for corpus, first in ((data.train, 0), (data.holdout, trained)):
        places = [row - first for row in rows if first <= row < first + len(corpus)]
        if places:
            yield corpus, places


def _check_room(folder: Path, index: Index, data: Conversations) -> None:
    parent = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    lengths = torch.cat([data.train.lengths, data.holdout.lengths])
    left = int(lengths[index.done :].sum()) / max(1, int(lengths.sum()))
    needed = int(size_bytes(index, data) * left * SPARE)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(
            f"The features need {needed / 1e9:.1f} GB in {folder}, but {free / 1e9:.1f} GB are "
            "free there. Nothing was written. Name another --out, store them as float8, or leave "
            "data.features out: then the target runs in the same process."
        )


def _check_same(folder: Path, found: Index, wanted: Index) -> None:
    named = {
        "target_hash": "another target",
        "weight_only": "a target with another target.quantize",
        "data_hash": "other data (or another data.max_length, data.holdout or train.seed)",
        "hidden_size": "another hidden size",
        "kind": "another dtype",
    }
    for name, what in named.items():
        if getattr(found, name) != getattr(wanted, name):
            raise ValueError(
                f"The features in {folder} were made of {what}. Store them again with "
                "`headstart features` into a new folder."
            )
    missing = sorted(set(wanted.layers) - set(found.layers))
    if missing:
        raise ValueError(
            f"The features in {folder} hold the layers {list(found.layers)}, but the head taps "
            f"{missing} too. Store them again with the recipe of this head."
        )


def _read_index(folder: Path) -> Index:
    try:
        return Index.model_validate(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise ValueError(
            f"{folder} holds no stored features: {INDEX} cannot be read ({error}). Make them with "
            "`headstart features RECIPE --out FOLDER`."
        ) from error
