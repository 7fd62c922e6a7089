"""Multi-token prediction layers as model families publish them, beside the target's own tensors.

A layout says under which names; reading and writing go through `places`, so what is written back is
what was read. Beside names, families differ in the order in which the two inputs are joined and in
which hidden state goes in:

    u = proj([norm(embed(x[t+1])), norm(h[t])])   or   proj([norm(h[t]), norm(embed(x[t+1]))])

Legend: E experts, D hidden size, F width of an expert.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.model.heads import mtp
from headstart.model.heads.common.base import DraftHead
from headstart.model.heads.common.layers import ZeroCentredNorm

from .engine_config import unservable

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPERTS = "mlp.experts."
IGNORED = "rotary_emb.inv_freq"  # older checkpoints store what follows from the configuration
MARKS = ("mtp", "nextn", "eh_proj")  # in the names of layouts that are not known


@dataclass(frozen=True)
class Layout:
    """enorm, hnorm, proj, norm: names of our parts. hidden_first: the order in `proj`. before_norm:
    h[t] comes from before the target's final norm. zero_centred: the weights of those norms are
    added to 1. embed, head: copies of the target's embedding and LM head. layer: in front of the
    decoder layer's tensors, which have the names of the target's own layers.
    """

    prefix: str  # {layers}: how many decoder layers the target has
    enorm: str
    hnorm: str
    proj: str
    norm: str
    hidden_first: bool = False
    before_norm: bool = False
    zero_centred: bool = False
    layer: str = ""
    embed: str = "embed_tokens.weight"
    head: str = "shared_head.head.weight"

    def at(self, layers: int) -> str:
        return self.prefix.format(layers=layers)


LAYOUTS = {
    # GLM-4.5 to 5, DeepSeek-V3 to V3.2 and R1; what `headstart fuse --index` writes
    "glm": Layout("model.layers.{layers}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    # MiMo-7B; what vLLM computes, whose class is of the authors
    "mimo": Layout(
        "model.mtp_layers.0.",
        "token_layernorm",
        "hidden_layernorm",
        "input_proj",
        "final_layernorm",
        hidden_first=True,
        before_norm=True,
    ),
    # Qwen3-Next and Qwen3.5; what vLLM computes
    "qwen": Layout(
        "mtp.",
        "pre_fc_norm_embedding",
        "pre_fc_norm_hidden",
        "fc",
        "norm",
        zero_centred=True,
        layer="layers.0.",
    ),
}


@dataclass(frozen=True)
class NativeMTP:
    """The layer in a checkpoint's folder. files: of each tensor, by its name without the prefix."""

    folder: Path
    layout: Layout
    prefix: str
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(self.prefix + name)


def find(folder: Path, layers: int) -> NativeMTP:
    """The layer that a checkpoint with so many decoder layers carries. ValueError without one."""
    files = _files(folder)
    for layout in LAYOUTS.values():
        prefix = layout.at(layers)
        found = {
            name.removeprefix(prefix): file
            for name, file in files.items()
            if name.startswith(prefix) and not name.endswith(IGNORED)
        }
        if layout.proj + ".weight" in found:
            _refuse_more(files, layout, layers, folder)
            return NativeMTP(folder, layout, prefix, found)
    others = sorted(name for name in files if any(mark in name for mark in MARKS))
    if others:
        raise ValueError(
            f"{folder} carries multi-token prediction tensors under names that are not known here "
            f"({', '.join(others[:3])}, ...). Known: GLM and DeepSeek-V3 (model.layers.N.eh_proj), "
            "MiMo (model.mtp_layers.0.input_proj), Qwen3-Next and Qwen3.5 (mtp.fc). Train a head "
            "with `headstart train` instead."
        )
    raise ValueError(
        f"{folder} carries no multi-token prediction layer: there is none among its "
        f"{len(files)} tensors. Train a head with `headstart train` instead."
    )


def _refuse_more(files: Mapping[str, Path], layout: Layout, layers: int, folder: Path) -> None:
    after = (layout.prefix + layout.layer).replace(".0.", ".1.").format(layers=layers + 1)
    if any(name.startswith(after) for name in files):
        raise ValueError(
            f"{folder} carries several multi-token prediction layers ({after}* too), one for each "
            "step. A head of kind mtp has one for all steps, so these cannot be used."
        )


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint."""
    index = folder / INDEX
    try:
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has no safetensors files, which the layer is read from.")
        with safe_open(folder / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"The tensors of {folder} cannot be listed: {error}") from error


def tensor_views(head: mtp.Head, published: NativeMTP) -> dict[str, list[Tensor]]:
    """For each published tensor, without the prefix, the parts of the head's own ones that stand
    side by side in it (along the last dimension). They share the head's memory."""
    layout = published.layout
    size = head.config.hidden_size
    embedding, hidden = head.eh_proj.weight.data.split(size, 1)
    found = {
        layout.enorm + ".weight": [head.enorm.weight.data],
        layout.hnorm + ".weight": [head.hnorm.weight.data],
        layout.norm + ".weight": [head.norm.weight.data],
        layout.proj + ".weight": [hidden, embedding]
        if layout.hidden_first
        else [embedding, hidden],
    }
    for own, tensor in head.layer.state_dict().items():
        name = own.removeprefix("block.")
        whole = layout.layer + name in published.files
        parts = {name: [tensor]} if whole else _in_layer(name, tensor)
        found |= {layout.layer + one: part for one, part in parts.items()}
    return found


def _in_layer(name: str, tensor: Tensor) -> dict[str, list[Tensor]]:
    """Experts that are published one by one are held together, E x 2F x D (gate, up) and
    E x D x F."""
    if not name.startswith(EXPERTS):
        return {name: [tensor]}
    kind = name.removeprefix(EXPERTS)
    found: dict[str, list[Tensor]] = {}
    for number, matrix in enumerate(tensor):
        if kind == "down_proj":
            found[f"{EXPERTS}{number}.down_proj.weight"] = [matrix]
        else:
            gate, up = matrix.chunk(2)
            found[f"{EXPERTS}{number}.gate_proj.weight"] = [gate]
            found[f"{EXPERTS}{number}.up_proj.weight"] = [up]
    return found


@torch.no_grad()
def read_into(head: mtp.Head, published: NativeMTP) -> None:
    """Fill a head, bound to its target, with the published layer. ValueError where they differ."""
    expected = tensor_views(head, published)
    _same_names(expected, published)
    for name, parts in expected.items():
        stored = published.read(name)
        _same_shape(name, parts, stored, published)
        widths = [part.shape[-1] for part in parts]
        for part, piece in zip(parts, stored.split(widths, -1), strict=True):
            part.copy_(piece)
    _same_copies(head, published)


def _same_names(expected: Mapping[str, object], published: NativeMTP) -> None:
    copies = {published.layout.embed, published.layout.head}
    missing = sorted(expected.keys() - published.files.keys())
    unknown = sorted(published.files.keys() - expected.keys() - copies)
    if missing or unknown:
        raise ValueError(
            f"The multi-token prediction layer in {published.folder} ({published.prefix}*) is not "
            f"built as its names and the target's own layers say: missing "
            f"{missing[:5] or 'nothing'}, unknown {unknown[:5] or 'nothing'}."
        )


def _same_shape(name: str, parts: list[Tensor], stored: Tensor, published: NativeMTP) -> None:
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    if stored.shape != shape or not stored.is_floating_point():
        raise ValueError(
            f"{published.prefix}{name} in {published.folder} is {stored.dtype} "
            f"{list(stored.shape)}, but the head has {list(shape)} there."
        )


def _same_copies(head: mtp.Head, published: NativeMTP) -> None:
    """Heads share the target's embedding and LM head, so copies of them must be copies."""
    model = head.target.model
    for name, owner in (
        (published.layout.embed, model.get_input_embeddings()),
        (published.layout.head, model.get_output_embeddings()),
    ):
        if name not in published.files:
            continue
        shared: Tensor = owner.weight
        if not torch.equal(published.read(name).bfloat16(), shared.bfloat16().cpu()):
            raise ValueError(
                f"{published.prefix}{name} in {published.folder} is not the target's own, and "
                "heads share the target's embedding and LM head. Heads with one of their own are "
                "not supported."
            )


def write_native(head: DraftHead, folder: Path) -> str:
    """Put a head's weights in the place of the layer that a checkpoint carries; returns the names.
    ValueError where the head is another one than the checkpoint's engines compute.

    Only the bytes of tensors that differ (in bfloat16) change: no name, type or file does, so every
    engine that reads the checkpoint reads the new layer.
    """
    reason = unservable(head)
    if not isinstance(head, mtp.Head) or reason is not None:
        raise ValueError(
            f"Only a head of kind mtp that engines can draft with is written over the target's own "
            f"layer, and this one is {head.kind}{': ' if reason else ''}{reason or ''}."
        )
    published = find(folder, head.target.num_layers)
    _refuse_other_norms(head, published)
    last = head.target.num_layers - 1
    if head.taps != ((last,) if published.layout.before_norm else ()):
        raise ValueError(
            f"The layer in {published.prefix}* of {folder} reads the target's hidden state "
            f"{'before' if published.layout.before_norm else 'after'} its final norm, and this "
            "head another one. Write a head that began with `headstart adopt`."
        )
    expected = tensor_views(head, published)
    _same_names(expected, published)
    for name, parts in expected.items():
        stored = published.read(name)
        _same_shape(name, parts, stored, published)
        ours = torch.cat([part.cpu() for part in parts], -1)
        if not torch.equal(ours.bfloat16(), stored.bfloat16()):
            _overwrite(published.files[name], published.prefix + name, ours.to(stored.dtype))
    return f"{published.prefix}*"


def _refuse_other_norms(head: mtp.Head, published: NativeMTP) -> None:
    if isinstance(head.norm, ZeroCentredNorm) != published.layout.zero_centred:
        raise ValueError(
            f"The norms in {published.prefix}* of {published.folder} are held in another way than "
            "this head's. Write a head that began with `headstart adopt`."
        )


def _overwrite(file: Path, name: str, tensor: Tensor) -> None:
    """A tensor's bytes in a safetensors file: 8 bytes of length, a table as JSON, the tensors."""
    if file.stat().st_nlink > 1:  # the target's own file must stay as it is
        part = file.with_name(f".{file.name}.part")
        shutil.copyfile(file, part)
        os.replace(part, file)
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        table: dict[str, Any] = json.loads(opened.read(length))
        begin, end = table[name]["data_offsets"]
        assert end - begin == len(data)
        opened.seek(8 + length + begin)
        opened.write(data)
