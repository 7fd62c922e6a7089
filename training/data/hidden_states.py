"""What a frozen target sees, stored on disk: for repeated passes where reading again costs more.

    features.json                  what it holds and of what; each finished shard with its sha256
    shard-00000.safetensors ...    one tensor per conversation, (taps + 1) x T x D: the outputs of
                                   the tapped layers, then the LM head's input

Only the layers that a head taps are stored. As float8 (e4m3) every vector has a scale of its own,
and the error is noted. A shard counts once it is in the index, so writing goes on where it stopped.

Legend: T positions, L stored layers (with the LM head's input), D hidden size, B batch rows.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
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
from headstart.training.preflight import fingerprint

from .batching import Batch, Corpus
from .conversations import Conversations, in_batches

INDEX = "features.json"
Kind = Literal["float32", "bfloat16", "float16", "float8"]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
SCALE_BYTES = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8 = torch.float8_e4m3fn
SPARE = 1.02  # of the disk space, for names and offsets

Progress = Callable[[int, int], None]  # conversations stored, of how many


class Shard(BaseModel):
    """rows: the conversations [first, last) that it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    rows: tuple[int, int]
    sha256: str
    squares: tuple[float, float]  # of the error that storing made, and of the values


class Index(BaseModel):
    """What a folder of features holds. rows: conversations to be stored, held-out ones last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_hash: str
    weight_only: str | None = None  # what the target's layers were held in
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
        """Root mean square of the error, relative to that of the values."""
        wrong = sum(shard.squares[0] for shard in self.shards)
        return float((wrong / max(1e-30, sum(shard.squares[1] for shard in self.shards))) ** 0.5)


def wanted(
    data: Conversations, target: Target, layers: tuple[int, ...], kind: Kind | None
) -> Index:
    """The empty index of a store for this data, target and taps. kind None: the target's type."""
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
    """What the whole store takes on disk."""
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
    """Read all conversations with the target and store what it saw; the finished index.

    Goes on with a folder of the same target, data and taps. ValueError for a folder of others and
    for a disk without room, before anything is written.
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
        """ValueError when it is not finished or was made of other things than those wanted."""
        self.folder, self.index = folder, _read_index(folder)
        _check_same(folder, self.index, wanted.model_copy(update={"kind": self.index.kind}))
        if self.index.done < self.index.rows:
            raise ValueError(
                f"{folder} holds the features of {self.index.done} of {self.index.rows} "
                "conversations. Go on with the `headstart features` that began it."
            )
        self._open: dict[str, safe_open] = {}

    def read(self, batch: Batch, device: torch.device, dtype: torch.dtype) -> TargetOutput:
        """What the target saw of a batch, as `Target.read` gives it; zeros behind the lengths."""
        return self.seen(self.load(batch, dtype), device)

    def load(self, batch: Batch, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """L x B x T x D in main memory. pinned: where a GPU fetches it on its own."""
        assert batch.rows_B is not None
        rows, length = batch.rows_B.tolist(), batch.tokens_BT.shape[1]
        taps = len(self.index.layers) + 1
        shape = (taps, len(rows), length, self.index.hidden_size)
        seen_LBTD = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        for place, row in enumerate(rows):
            end = int(batch.lengths_B[place])
            seen_LBTD[:, place, :end] = self._row(row)[:, :end].to(dtype)
        return seen_LBTD

    def seen(self, seen_LBTD: Tensor, device: torch.device) -> TargetOutput:
        """From what `load` gave."""
        seen_LBTD = seen_LBTD.to(device, non_blocking=True)
        hidden = dict(zip(self.index.layers, seen_LBTD, strict=False))
        return TargetOutput(None, seen_LBTD[-1], hidden)

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


def open_features(
    recipe: Recipe, data: Conversations, target: Target, head: DraftHead
) -> Features | None:
    """The store that a recipe names, if it names one. ValueError where it does not fit."""
    if recipe.data.features is None:
        return None
    return Features(Path(recipe.data.features), wanted(data, target, head.taps, None))


def data_hash(data: Conversations) -> str:
    """Of the conversations to train on and of those held out."""
    return hashlib.sha256(
        (fingerprint(data.train) + fingerprint(data.holdout)).encode()
    ).hexdigest()


def _kind(dtype: torch.dtype) -> Kind:
    for name, known in DTYPES.items():
        if known == dtype:
            return name  # type: ignore[return-value]
    raise ValueError(f"Features of a target in {dtype} cannot be stored. Load it in bfloat16.")


def _cuts(lengths: Tensor, first: int, tokens: float) -> Iterator[tuple[int, int]]:
    """Conversations of one shard after the other, [first, last)."""
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
        for batch in in_batches(corpus, batch_tokens, places):
            seen = target.forward(
                batch.tokens_BT.to(target.device),
                lengths_B=batch.lengths_B.to(target.device),
                taps=index.layers,
                logits=False,
            )
            taps = [*(seen.hidden_states[layer] for layer in index.layers), seen.lm_head_input_BTD]
            values_LBTD = torch.stack(taps).cpu()
            assert batch.rows_B is not None
            for place, row in enumerate(batch.rows_B.tolist()):
                values_LTD = values_LBTD[:, place, : int(batch.lengths_B[place])].contiguous()
                stored = _stored(str(row), values_LTD, index.kind)
                tensors |= stored
                again = _again(str(row), stored)
                wrong += float((again - values_LTD.float()).square().sum(dtype=torch.float64))
                whole += float(values_LTD.float().square().sum(dtype=torch.float64))
    return tensors, (wrong, whole)


def _stored(name: str, values_LTD: Tensor, kind: Kind) -> dict[str, Tensor]:
    if kind != "float8":
        return {name: values_LTD.to(DTYPES[kind])}
    values_LTD = values_LTD.float()
    scale_LT = values_LTD.abs().amax(-1).clamp(min=1e-12) / torch.finfo(FLOAT8).max
    return {name: (values_LTD / scale_LT[..., None]).to(FLOAT8), f"{name}.scale": scale_LT}


def _again(name: str, stored: dict[str, Tensor]) -> Tensor:
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
            "data.features out: then the target reads in the same process."
        )


def _check_same(folder: Path, found: Index, wanted: Index) -> None:
    named = {
        "target_hash": "another target",
        "weight_only": "a target with another target.quantize",
        "data_hash": "other data (or another data.max_length, data.holdout or train.seed)",
        "hidden_size": "another hidden size",
        "kind": "another type of numbers",
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
            f"The features in {folder} hold the layers {list(found.layers)}, but the head reads "
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
