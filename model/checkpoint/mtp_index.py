"""The other form of a fused checkpoint: an mtp head listed among the target's own weights.

transformers drafts with such a head by itself: `generate(..., use_mtp=True)` on a model opened with
`trust_remote_code=True`, which runs the three lines written below. The price: config.json and the
index are no longer the target's own, and vLLM refuses the extra tensors. All weights stay the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from headstart.model.backends.int8 import full_precision
from headstart.model.heads import mtp
from headstart.model.heads.common.base import DraftHead

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
RENAMED, ADDED = "model-target.safetensors", "model-draft-head.safetensors"
CODE = "modeling_fused"


def write_index(head: DraftHead, folder: Path) -> None:
    """Turn a fused folder into the indexed form. ValueError when transformers cannot draft so.

    The head is tried with transformers' own code: it must say what ours says.
    """
    if not isinstance(head, mtp.Head):
        raise ValueError(
            f"Only heads of kind mtp can be listed in the index, and this one is {head.kind}. "
            "Fuse it without the index."
        )
    if head.taps:
        raise ValueError(
            "transformers gives a head the hidden state behind the target's final norm, and this "
            "one reads another. Fuse it without the index."
        )
    if head.target.recurrent:
        raise ValueError(
            f"{head.target.name} has recurrent layers, and transformers cannot take a guess back "
            "from them. Fuse it without the index."
        )
    prefix = f"model.layers.{head.target.num_layers}."
    _refuse_own(folder, prefix)
    stored = load_file(folder / "draft_heads" / SINGLE)
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    (folder / ADDED).write_bytes(save(tensors, metadata={"format": "pt"}))
    _list_weights(folder, dict.fromkeys(tensors, ADDED))
    pattern = prefix.replace(".", r"\.")
    model_class = type(head.target.model).__name__
    _write_config(folder, model_class)
    (folder / f"{CODE}.py").write_text(
        f"from transformers import {model_class}\n\n\nclass Fused({model_class}):\n"
        f'    _keys_to_ignore_on_load_unexpected = [r"{pattern}.*"]\n',
        encoding="utf-8",
    )
    _try_out(head, folder, pattern)


def _refuse_own(folder: Path, prefix: str) -> None:
    """A checkpoint that carries such a layer would then have two of one name."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(folder / SINGLE, framework="pt") as file:
            names = file.keys()
    if any(name.startswith(prefix) for name in names):
        raise ValueError(
            f"The target carries a layer {prefix}* of its own, in whose place the head can be "
            "written: fuse with --native instead of --index."
        )


def _list_weights(folder: Path, added: dict[str, str]) -> None:
    if not (folder / INDEX).exists():
        # A file of the usual name would be opened before any index.
        (folder / SINGLE).rename(folder / RENAMED)
        with safe_open(folder / RENAMED, framework="pt") as file:
            names = dict.fromkeys(file.keys(), RENAMED)
        index: dict[str, Any] = {"weight_map": names}
    else:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= added
    sizes = [(folder / name).stat().st_size for name in set(index["weight_map"].values())]
    index["metadata"] = {"total_size": sum(sizes)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, model_class: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "num_mtp_layers": 1,
        "num_nextn_predict_layers": 1,
        "mtp_layer_types": ["full_attention"],
        "auto_map": {"AutoModelForCausalLM": f"{CODE}.Fused"},
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _try_out(head: mtp.Head, folder: Path, pattern: str) -> None:
    """Compare the first step on a short text: norms, rotary positions and names must all agree."""
    model = head.target.model
    tokens_BT = torch.arange(1, 17, device=head.target.device)[None] % head.config.vocab_size
    seen = head.target.forward(tokens_BT)
    with full_precision(head):
        ours_BTD = head.unroll(seen, tokens_BT, 1)[0][:, :-1]
    try:
        theirs_BTD = _transformers_step(model, folder, pattern, tokens_BT, seen.lm_head_input_BTD)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"transformers cannot draft with this head on {head.target.name}: {error} "
            "Fuse it without the index."
        ) from error
    scale = float(ours_BTD.abs().max())
    off = float((ours_BTD - theirs_BTD).abs().max()) / scale
    if not off < 1e-3 + 4 * torch.finfo(ours_BTD.dtype).eps:
        raise ValueError(
            f"transformers computes this head differently for {head.target.name} (by {off:.0%}), "
            "so its guesses would be worth little there. Fuse it without the index."
        )


def _transformers_step(
    model: PreTrainedModel,
    folder: Path,
    pattern: str,
    tokens_BT: torch.Tensor,
    lm_head_input_BTD: torch.Tensor,
) -> torch.Tensor:
    """The head's first step on all pairs, B x T-1 x D, by transformers."""
    before = model.config.name_or_path
    changes = {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"], "name_or_path": folder}
    model.config.update(changes)
    model._keys_to_ignore_on_load_unexpected = [pattern + ".*"]
    try:
        layer = MtpModel.from_pretrained(model, device_map={"": tokens_BT.device})
    finally:
        model.config.name_or_path = before
    positions = torch.arange(1, tokens_BT.shape[1], device=tokens_BT.device)[None]
    assert layer.rotary_emb is not None
    embedded_BTD = model.get_input_embeddings()(tokens_BT[:, 1:])
    hidden: torch.Tensor = layer.layers[0](
        embedded_BTD,
        lm_head_input_BTD[:, :-1],
        position_embeddings=layer.rotary_emb(embedded_BTD, positions),
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
    )
    return hidden
