"""The head of a fused checkpoint as a folder of its own, in a form that a production engine reads
(for llama.cpp: `model/llama_cpp.py`).

    native        for vLLM and SGLang: what `draft_heads/` holds. Each engine reads its own keys.
    speculators   for vLLM: the format of the speculators library, which names the target (its
                  verifier), so that `vllm serve OUT` finds all by itself.

Legend: V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from headstart.model.checkpoint.atomic import atomic_folder
from headstart.model.checkpoint.download import CONFIG, HEADS, OURS, WEIGHTS, fetch_fused, hub_name
from headstart.model.checkpoint.engine_config import (
    LM_HEAD,
    USUAL_STEPS,
    Engine,
    engine_keys,
    launch_line,
    native_line,
    undraftable,
    unservable,
)
from headstart.model.checkpoint.head import (
    HeadFile,
    build_head,
    is_fused,
    load_fused,
    read_head_file,
)
from headstart.model.heads import mtp
from headstart.model.heads.common.base import DraftHead

Format = Literal["native", "speculators"]

# Families whose multi-token prediction layers engines have classes for, among those that
# `fuse --native` writes.
STOCK_MTP = (
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "mimo",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
)
SPECULATORS = "0.9.0"  # the version whose format is written
EMBEDDING = "embed_tokens.weight"
# Keys of the draft's decoder layer, and of the whole draft: the same in both formats.
LAYER_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "rope_parameters",
    "tie_word_embeddings",
    "num_aux_hidden_states",  # vLLM sizes fc by it
)
DRAFT_KEYS = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
    "torch_dtype",
)
# vLLM looks for the tokenizer where the draft is.
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)


def export(
    folder: str | Path,
    out: str | Path,
    engine: Engine,
    form: Format = "native",
    verifier: str | None = None,
) -> str:
    """Write the head of a fused checkpoint for an engine, whole or not at all; returns the line
    that starts the engine.

    folder: a fused checkpoint, here or on the Hub. verifier: what the engine is to serve, a folder
    or a Hub id, if not the fused checkpoint itself. ValueError where the engine would not draft as
    the head does.
    """
    if engine == "sglang" and form == "speculators":
        raise ValueError(
            "SGLang does not read the format speculators. Leave --format out: the native form is "
            "right for both engines."
        )
    root = fused_root(folder, out)
    file = read_head_file(root)
    refuse_undraftable(file, root)
    served = _verifier(folder, verifier)
    architectures = _architectures(served, root)
    _, head = load_fused(root, device="cpu")  # it also says whether the two belong together
    refuse_other_ends(head)
    keys = engine_keys(head, head.target.config)
    tensors = load_file(root / HEADS / WEIGHTS)
    if form == "speculators":
        keys = _speculators_keys(keys, file.meta.steps, served, architectures)
        tensors = _speculators_tensors(tensors, head)
    with atomic_folder(Path(out), CONFIG, OURS) as part:
        _write(part, keys | {OURS: file.model_dump(mode="json")}, tensors)
        if form == "speculators":
            _copy_tokenizer(root, part)
    where = str(Path(out).resolve())
    if form == "speculators":
        return shlex.join(["vllm", "serve", where])
    return launch_line(engine, served, where, file.meta.steps)


def fused_root(folder: str | Path, out: str | Path) -> Path:
    """The fused checkpoint on this machine. ValueError for others, and for an `out` inside it."""
    root = fetch_fused(folder)
    if not is_fused(root):
        raise ValueError(
            f"{folder} is not a fused checkpoint: it has no {HEADS} folder. Make one with "
            "`headstart fuse`, which puts the target's LM head rows beside the head."
        )
    if Path(out).resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{out} is a part of {folder}, which is to stay as it is. Name a new folder."
        )
    return root


def refuse_undraftable(file: HeadFile, root: Path) -> None:
    """ValueError for a head that vLLM and SGLang cannot draft with."""
    with torch.device("meta"):
        head = build_head(file, root)
    if isinstance(head, mtp.Head) and unservable(head) is None:
        raise ValueError(_instead_of_mtp(file, root))
    reason = undraftable(head)
    if reason is not None:
        raise ValueError(
            f"vLLM and SGLang cannot draft with the head in {root}: {reason}. They serve the "
            "folder as the plain target. Train a head of kind eagle3, or use `headstart serve`."
        )


def _instead_of_mtp(file: HeadFile, root: Path) -> str:
    """What to do with a multi-token prediction layer, which engines read beside the target only."""
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    family = config.get("text_config", config)["model_type"]
    if family not in STOCK_MTP:
        return (
            "vLLM and SGLang draft with a head of kind mtp in families that come with such layers "
            f"({', '.join(STOCK_MTP)}), and have no class for one of {family}. Train a head of "
            "kind eagle3, or use `headstart serve`."
        )
    if file.meta.replaces is not None:
        return (
            "There is nothing to export: the head already is the target's own layer "
            f"({file.meta.replaces}), and engines serve the folder as it is: "
            f"`{native_line(str(root), file.meta.steps)}`."
        )
    return (
        "Engines read a head of kind mtp in the place of the layer that the target carries, not "
        f"in a folder of its own: `headstart fuse {file.meta.target} HEAD OUT --native` puts it "
        f"there (HEAD: {root / HEADS})."
    )


@torch.no_grad()
def refuse_other_ends(head: DraftHead) -> None:
    """Engines take plain rows of the target's embedding, and its LM head without a bias. That a
    family scales or caps logits changes no order, so no greedy guess. ValueError for others."""
    embedding = head.target.model.get_input_embeddings()
    token = torch.tensor([head.config.vocab_size // 2])
    if not torch.equal(head.target.embed(token), embedding.weight[token]):
        raise ValueError(
            f"{head.target.name} scales its embeddings, which this head learned with, and the "
            "EAGLE-3 layers of engines read them as they are stored. Use `headstart serve`."
        )
    if getattr(head.target.model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"The LM head of {head.target.name} has a bias, and the one that engines draft with "
            "has none. Use `headstart serve`."
        )


def _verifier(folder: str | Path, verifier: str | None) -> str:
    """The name under which an engine finds the target."""
    if verifier is not None:
        if not Path(verifier).is_dir() and hub_name(verifier) is None:
            raise ValueError(
                f"--verifier {verifier} is neither a folder nor a Hub id (owner/name). Name what "
                "the engine is to serve, or leave it out for the fused checkpoint."
            )
        return verifier if hub_name(verifier) is not None else str(Path(verifier).resolve())
    found = hub_name(folder)
    if found is None:
        return str(Path(folder).resolve())
    repo, revision = found
    if revision is not None:
        raise ValueError(
            f"Engines take no revision in the name of a model, so {folder} cannot be named as "
            "what is served. Add --verifier with a folder or an owner/name."
        )
    return repo


def _architectures(verifier: str, root: Path) -> list[str]:
    """The target's, which the fused checkpoint has too. ValueError where the verifier's differ."""
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    theirs = config
    if Path(verifier).is_dir():
        theirs = json.loads((Path(verifier) / CONFIG).read_text(encoding="utf-8"))
    for key in ("architectures", "hidden_size", "vocab_size", "num_hidden_layers"):
        if theirs.get(key) != config.get(key):
            raise ValueError(
                f"The verifier {verifier} has {key} {theirs.get(key)}, but the head's target has "
                f"{config.get(key)}. Name a copy of the target, or leave --verifier out."
            )
    return list(config.get("architectures") or [])


def _speculators_keys(
    native: dict[str, Any], steps: int | None, verifier: str, architectures: list[str]
) -> dict[str, Any]:
    greedy = {"proposal_type": "greedy", "speculative_tokens": steps or USUAL_STEPS}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "draft_vocab_size": native["draft_vocab_size"] or native["vocab_size"],
        "target_hidden_size": None,  # the draft is as wide as its target
        **{key: native[key] for key in DRAFT_KEYS},
        "embed_requires_grad": False,
        "transformer_layer_config": {key: native[key] for key in LAYER_KEYS},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
    }


def _speculators_tensors(native: dict[str, Tensor], head: DraftHead) -> dict[str, Tensor]:
    """The layer under its name there, embedding and LM head, and which tokens can be proposed.

    speculators' own loader leaves an embedding that is not in the file as the memory was."""
    found = {
        name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name: tensor
        for name, tensor in native.items()
    }
    model, size = head.target.model, head.config.vocab_size
    found[EMBEDDING] = _bfloat16(model.get_input_embeddings().weight[:size])
    if LM_HEAD not in found:
        found[LM_HEAD] = _bfloat16(model.get_output_embeddings().weight[:size])
    if head.draft_ids is not None:
        proposed_V = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        proposed_V[head.draft_ids] = True
        found["t2d"] = proposed_V
    return found


def _bfloat16(weight_VD: Tensor) -> Tensor:
    return weight_VD.detach().to(torch.bfloat16).clone()  # of its own: tied ones share memory


def _write(part: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    # Through Python, so that a full disk is an OSError.
    (part / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(root: Path, part: Path) -> None:
    for file in {file for pattern in TOKENIZER for file in root.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, part / file.name)
