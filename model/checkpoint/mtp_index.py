"""The indexed form of a fused checkpoint: an mtp head listed among the target's own weights.

transformers drafts with such a head by itself: `generate(..., use_mtp=True)` on a model opened with
`trust_remote_code=True`, which runs the three lines written below. The price: config.json and the
index are no longer the target's own, and vLLM rejects the extra tensors. All weights stay the same.

Legend: B sequences, T positions, D hidden size.
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

from .layout import CONFIG, HEADS, INDEX, WEIGHTS

TARGET_WEIGHTS, HEAD_WEIGHTS = "model-target.safetensors", "model-draft-head.safetensors"
CODE = "modeling_fused"


def write_index(head: DraftHead, folder: Path) -> None:
    """Turn a fused checkpoint into the indexed form.

    The head is run with transformers' own code and must compute the same as ours. ValueError if
    transformers cannot draft with it.
    """
    if not isinstance(head, mtp.Head):
        raise ValueError(
            f"Only heads of kind mtp can be listed in the index, and this one is {head.kind}. "
            "Fuse it without the index."
        )
    if head.taps:
        raise ValueError(
            "transformers gives a head the hidden state after the target's final norm, and this "
            "one takes another. Fuse it without the index."
        )
    if head.target.recurrent:
        raise ValueError(
            f"{head.target.name} has recurrent layers, from whose state transformers cannot remove "
            "rejected draft tokens. Fuse it without the index."
        )
    prefix = f"model.layers.{head.target.num_layers}."
    _check_no_native_mtp(folder, prefix)
    stored = load_file(folder / HEADS / WEIGHTS)
    tensors = {name: tensor for name, tensor in stored.items() if name.startswith(prefix)}
    (folder / HEAD_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    _list_weights(folder, dict.fromkeys(tensors, HEAD_WEIGHTS))
    pattern = prefix.replace(".", r"\.")
    model_class = type(head.target.model).__name__
    _write_config(folder, model_class)
    (folder / f"{CODE}.py").write_text(
        f"from transformers import {model_class}\n\n\nclass Fused({model_class}):\n"
        f'    _keys_to_ignore_on_load_unexpected = [r"{pattern}.*"]\n',
        encoding="utf-8",
    )
    _check_in_transformers(head, folder, pattern)


def _check_no_native_mtp(folder: Path, prefix: str) -> None:
    """Raise ValueError if the target has such a layer itself, whose tensor names would clash."""
    if (folder / INDEX).exists():
        names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    else:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = file.keys()
    if any(name.startswith(prefix) for name in names):
        raise ValueError(
            f"The target carries a multi-token prediction layer {prefix}* itself. Fuse with "
            "--native instead of --index, which overwrites that layer with the head."
        )


def _list_weights(folder: Path, added: dict[str, str]) -> None:
    if not (folder / INDEX).exists():
        # transformers prefers a file of the usual name to an index.
        (folder / WEIGHTS).rename(folder / TARGET_WEIGHTS)
        with safe_open(folder / TARGET_WEIGHTS, framework="pt") as file:
            names = dict.fromkeys(file.keys(), TARGET_WEIGHTS)
        index: dict[str, Any] = {"weight_map": names}
    else:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= added
    sizes = [(folder / name).stat().st_size for name in set(index["weight_map"].values())]
    index["metadata"] = {"total_size": sum(sizes)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(folder: Path, model_class: str) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "num_mtp_layers": 1,
        "num_nextn_predict_layers": 1,
        "mtp_layer_types": ["full_attention"],
        "auto_map": {"AutoModelForCausalLM": f"{CODE}.Fused"},
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _check_in_transformers(head: mtp.Head, folder: Path, pattern: str) -> None:
    """Compare the first draft step on 16 tokens: norms, rotary positions and names must agree."""
    model = head.target.model
    tokens_BT = torch.arange(1, 17, device=head.target.device)[None] % head.config.vocab_size
    output = head.target.forward(tokens_BT)
    with full_precision(head):
        ours_BTD = head.unroll(output, tokens_BT, 1)[0][:, :-1]
    lm_head_input_BTD = output.lm_head_input_BTD
    try:
        theirs_BTD = _transformers_step(model, folder, pattern, tokens_BT, lm_head_input_BTD)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"transformers cannot draft with this head on {head.target.name}: {error} "
            "Fuse it without the index."
        ) from error
    scale = float(ours_BTD.abs().max())
    relative_error = float((ours_BTD - theirs_BTD).abs().max()) / scale
    if not relative_error < 1e-3 + 4 * torch.finfo(ours_BTD.dtype).eps:
        raise ValueError(
            f"transformers computes this head differently for {head.target.name} "
            f"(by {relative_error:.0%}), so few of its draft tokens would be accepted there. Fuse "
            "it without the index."
        )


def _transformers_step(
    model: PreTrainedModel,
    folder: Path,
    pattern: str,
    tokens_BT: torch.Tensor,
    lm_head_input_BTD: torch.Tensor,
) -> torch.Tensor:
    """The head's first draft step in transformers, B x T-1 x D."""
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
