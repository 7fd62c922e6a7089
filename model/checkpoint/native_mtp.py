"""Native multi-token prediction (MTP) layers, stored among the tensors of a checkpoint.

A `Layout` gives the tensor names of a family; loading and writing both go through `tensor_views`,
so writing back what was loaded changes nothing. Families also differ in the order in which the two
inputs are concatenated and in which hidden state is the input:

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

from .engine_support import support
from .layout import INDEX, WEIGHTS

EXPERTS = "mlp.experts."
IGNORED = "rotary_emb.inv_freq"  # stored by older checkpoints, derived from the configuration
MTP_MARKS = ("mtp", "nextn", "eh_proj")  # parts of tensor names in unknown layouts


@dataclass(frozen=True)
class Layout:
    """Tensor names of an MTP layer, and how it is computed.

    prefix: of all its tensors; {layers} is the number of the target's decoder layers.
    enorm, hnorm, proj, norm: modules that `mtp.Head` calls enorm, hnorm, eh_proj and norm.
    hidden_first: proj takes the hidden state before the embedding.
    before_norm: the hidden state is the one before the target's final norm.
    zero_centred: norms scale by 1 + weight.
    layer: prefix of the decoder layer, whose tensors have the names of the target's own layers.
    embed, head: copies of the target's embedding and LM head.
    """

    prefix: str
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
    # GLM-4.5 to 5, DeepSeek-V3 to V3.2 and R1; also written by `headstart fuse --index`
    "glm": Layout("model.layers.{layers}.", "enorm", "hnorm", "eh_proj", "shared_head.norm"),
    # MiMo-7B, as computed in vLLM, whose class its authors wrote
    "mimo": Layout(
        "model.mtp_layers.0.",
        "token_layernorm",
        "hidden_layernorm",
        "input_proj",
        "final_layernorm",
        hidden_first=True,
        before_norm=True,
    ),
    # Qwen3-Next and Qwen3.5, as computed in vLLM
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
    """The MTP layer of a checkpoint.

    folder: of the checkpoint.
    prefix: of the layer's tensor names.
    files: the file of each tensor, by its name without the prefix.
    """

    folder: Path
    layout: Layout
    prefix: str
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(self.prefix + name)


def find_native_mtp(folder: Path, layers: int) -> NativeMTP:
    """Find the MTP layer of a checkpoint. ValueError if it has none, or one that is not supported.

    layers: number of decoder layers of the target.
    """
    files = _files(folder)
    for layout in LAYOUTS.values():
        prefix = layout.at(layers)
        found = {
            name.removeprefix(prefix): file
            for name, file in files.items()
            if name.startswith(prefix) and not name.endswith(IGNORED)
        }
        if layout.proj + ".weight" in found:
            _check_single_layer(files, layout, layers, folder)
            return NativeMTP(folder, layout, prefix, found)
    others = sorted(name for name in files if any(mark in name for mark in MTP_MARKS))
    if others:
        raise ValueError(
            f"{folder} carries multi-token prediction tensors in an unknown layout "
            f"({', '.join(others[:3])}, ...). Supported: GLM and DeepSeek-V3 "
            "(model.layers.N.eh_proj), MiMo (model.mtp_layers.0.input_proj), Qwen3-Next and "
            "Qwen3.5 (mtp.fc). Train a head with `headstart train` instead."
        )
    raise ValueError(
        f"{folder} carries no multi-token prediction layer among its {len(files)} tensors. "
        "Train a head with `headstart train` instead."
    )


def _check_single_layer(
    files: Mapping[str, Path], layout: Layout, layers: int, folder: Path
) -> None:
    after = (layout.prefix + layout.layer).replace(".0.", ".1.").format(layers=layers + 1)
    if any(name.startswith(after) for name in files):
        raise ValueError(
            f"{folder} carries several multi-token prediction layers ({after}* too), one for each "
            "draft step. A head of kind mtp uses one layer for all steps, so this checkpoint is "
            "not supported."
        )


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a checkpoint."""
    index = folder / INDEX
    try:
        if index.is_file():
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in names.items()}
        if not (folder / WEIGHTS).is_file():
            raise ValueError(
                f"{folder} has no safetensors files, and multi-token prediction layers are loaded "
                "from no other format."
            )
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / WEIGHTS)
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"The tensors of {folder} cannot be listed: {error}") from error


def tensor_views(head: mtp.Head, native: NativeMTP) -> dict[str, list[Tensor]]:
    """Map the tensors of an MTP layer to those of a head, with which they share memory.

    Returns for each name without the prefix the head's tensors whose concatenation along the last
    dimension is the stored one.
    """
    layout = native.layout
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
        whole = layout.layer + name in native.files
        parts = {name: [tensor]} if whole else _expert_views(name, tensor)
        found |= {layout.layer + one: part for one, part in parts.items()}
    return found


def _expert_views(name: str, tensor: Tensor) -> dict[str, list[Tensor]]:
    """Views for experts that are stored one by one. The head stacks them: E x 2F x D (gate, up)
    and E x D x F."""
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
def load_native_mtp(head: mtp.Head, native: NativeMTP) -> None:
    """Copy an MTP layer into a head that is bound to its target. ValueError if they do not fit."""
    expected = tensor_views(head, native)
    _same_names(expected, native)
    for name, parts in expected.items():
        stored = native.read(name)
        _same_shape(name, parts, stored, native)
        widths = [part.shape[-1] for part in parts]
        for part, piece in zip(parts, stored.split(widths, -1), strict=True):
            part.copy_(piece)
    _same_copies(head, native)


def _same_names(expected: Mapping[str, object], native: NativeMTP) -> None:
    copies = {native.layout.embed, native.layout.head}
    missing = sorted(expected.keys() - native.files.keys())
    unknown = sorted(native.files.keys() - expected.keys() - copies)
    if missing or unknown:
        raise ValueError(
            f"The multi-token prediction layer in {native.folder} ({native.prefix}*) does not "
            f"have the tensors of its layout and the target's own layers: missing "
            f"{missing[:5] or 'nothing'}, unknown {unknown[:5] or 'nothing'}."
        )


def _same_shape(name: str, parts: list[Tensor], stored: Tensor, native: NativeMTP) -> None:
    shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
    if stored.shape != shape or not stored.is_floating_point():
        raise ValueError(
            f"{native.prefix}{name} in {native.folder} is {stored.dtype} "
            f"{list(stored.shape)}, but the head expects {list(shape)}."
        )


def _same_copies(head: mtp.Head, native: NativeMTP) -> None:
    """Check stored copies of the embedding and LM head, which heads share with the target."""
    model = head.target.model
    for name, owner in (
        (native.layout.embed, model.get_input_embeddings()),
        (native.layout.head, model.get_output_embeddings()),
    ):
        if name not in native.files:
            continue
        shared: Tensor = owner.weight
        if not torch.equal(native.read(name).bfloat16(), shared.bfloat16().cpu()):
            raise ValueError(
                f"{native.prefix}{name} in {native.folder} differs from the target's own. "
                "Heads share the target's embedding and LM head; an MTP layer with other ones is "
                "not supported."
            )


def write_native_mtp(head: DraftHead, folder: Path) -> str:
    """Overwrite the MTP layer of a checkpoint with the weights of a head.

    Only the bytes of tensors that differ (in bfloat16) change. Names, dtypes and files stay, so
    every engine that loads the checkpoint loads the new layer.

    Returns the pattern of the tensor names. ValueError if engines would compute another head.
    """
    reason = support(head, "native_mtp")
    if reason is not None:
        raise ValueError(
            f"This head cannot be written over the target's own MTP layer: {reason}. Fuse it "
            "without --native."
        )
    assert isinstance(head, mtp.Head)
    native = find_native_mtp(folder, head.target.num_layers)
    _check_norms(head, native)
    last = head.target.num_layers - 1
    if head.taps != ((last,) if native.layout.before_norm else ()):
        raise ValueError(
            f"The layer in {native.prefix}* of {folder} takes the target's hidden state "
            f"{'before' if native.layout.before_norm else 'after'} its final norm, and this "
            "head another one. Use a head that was trained from `headstart adopt`."
        )
    expected = tensor_views(head, native)
    _same_names(expected, native)
    for name, parts in expected.items():
        stored = native.read(name)
        _same_shape(name, parts, stored, native)
        ours = torch.cat([part.cpu() for part in parts], -1)
        if not torch.equal(ours.bfloat16(), stored.bfloat16()):
            _overwrite(native.files[name], native.prefix + name, ours.to(stored.dtype))
    return f"{native.prefix}*"


def _check_norms(head: mtp.Head, native: NativeMTP) -> None:
    if isinstance(head.norm, ZeroCentredNorm) != native.layout.zero_centred:
        raise ValueError(
            f"The norms in {native.prefix}* of {native.folder} are "
            f"{'' if native.layout.zero_centred else 'not '}zero-centred, unlike this head's. "
            "Use a head that was trained from `headstart adopt`."
        )


def _overwrite(file: Path, name: str, tensor: Tensor) -> None:
    """Replace the bytes of a tensor in a safetensors file.

    The format: the length of the table (8 bytes), the table as JSON, the tensors.
    """
    if file.stat().st_nlink > 1:  # hard-linked to the target's own file, which must not change
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
