"""Export the head of a fused checkpoint as a folder for vLLM or SGLang.

    native        for vLLM and SGLang: the same as `draft_heads/`. Each engine reads its own keys.
    speculators   for vLLM: the format of the speculators library, which names the target (the
                  verifier), so that `vllm serve OUT` needs no further options.

Legend: V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from headstart.model.checkpoint.atomic import atomic_folder
from headstart.model.checkpoint.download import fetch_fused, hub_name
from headstart.model.checkpoint.engine_config import engine_keys
from headstart.model.checkpoint.engine_support import Engine, support
from headstart.model.checkpoint.fused import is_fused, load_fused
from headstart.model.checkpoint.head import build_head, read_head_file, write_weights
from headstart.model.checkpoint.launch import DEFAULT_DRAFT_STEPS, launch_line, mtp_launch_line
from headstart.model.checkpoint.layout import CONFIG, HEADS, LM_HEAD, OURS, WEIGHTS
from headstart.model.checkpoint.metadata import HeadFile
from headstart.model.heads.common.base import DraftHead

Format = Literal["native", "speculators"]

# Families for whose MTP layers engines have classes, among those that `fuse --native` writes.
ENGINE_MTP = (
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
# Keys of the draft model's decoder layer and of the whole model, which both formats share.
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
    "num_aux_hidden_states",  # vLLM takes the size of fc from it
)
DRAFT_KEYS = (
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "eagle_aux_hidden_state_layer_ids",
    "torch_dtype",
)
# vLLM looks for the tokenizer in the folder of the draft model.
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
    """Write the head of a fused checkpoint for an engine, atomically.

    folder: a fused checkpoint, as a folder or Hub id.
    out: the folder to write.
    form: format of the folder.
    verifier: the target that the engine serves, as a folder or Hub id (default: the fused
        checkpoint itself).

    Returns the command that starts the engine. ValueError if the engine would not draft the same
    tokens as the head.
    """
    if engine == "sglang" and form == "speculators":
        raise ValueError(
            "SGLang does not support the format speculators. Leave --format out: the native format "
            "works in both engines."
        )
    root = fused_root(folder, out)
    file = read_head_file(root)
    check_engine_support(file, root)
    served = _verifier(folder, verifier)
    architectures = _architectures(served, root)
    _, head = load_fused(root, device="cpu")  # also checks that head and target fit
    check_embedding_and_lm_head(head)
    keys = engine_keys(head, head.target.config)
    tensors = load_file(root / HEADS / WEIGHTS)
    if form == "speculators":
        keys = _speculators_keys(keys, file.meta.steps, served, architectures)
        tensors = _speculators_tensors(tensors, head)
    with atomic_folder(Path(out), CONFIG, OURS) as part:
        write_weights(part, keys | {OURS: file.model_dump(mode="json")}, tensors)
        if form == "speculators":
            _copy_tokenizer(root, part)
    where = str(Path(out).resolve())
    if form == "speculators":
        return shlex.join(["vllm", "serve", where])
    return launch_line(engine, served, where, file.meta.steps)


def fused_root(folder: str | Path, out: str | Path) -> Path:
    """Return the local folder of a fused checkpoint.

    ValueError if it is none, or if `out` is inside it.
    """
    root = fetch_fused(folder)
    if not is_fused(root):
        raise ValueError(
            f"{folder} is not a fused checkpoint: it has no {HEADS} folder. Make one with "
            "`headstart fuse`, which puts the target's LM head rows beside the head."
        )
    if Path(out).resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} is inside {folder}, which must not change. Name a new folder.")
    return root


def check_engine_support(file: HeadFile, root: Path) -> None:
    """Raise ValueError if vLLM and SGLang cannot draft with the folder of a head.

    file: configuration of the head.
    root: folder of the fused checkpoint.
    """
    with torch.device("meta"):
        head = build_head(file, root)
    if support(head, "native_mtp") is None:
        raise ValueError(_mtp_alternative(file, root))
    reason = support(head, "vllm")
    if reason is not None:
        raise ValueError(
            f"vLLM and SGLang cannot draft with the head in {root}: {reason}. They serve the "
            "folder as the plain target. Train a head of kind eagle3, or use `headstart serve`."
        )


def _mtp_alternative(file: HeadFile, root: Path) -> str:
    """The way to draft with an mtp head, which engines load only as a part of the target."""
    config = json.loads((root / CONFIG).read_text(encoding="utf-8"))
    family = config.get("text_config", config)["model_type"]
    if family not in ENGINE_MTP:
        return (
            "vLLM and SGLang draft with a head of kind mtp in families that have such layers "
            f"({', '.join(ENGINE_MTP)}), and have no class for {family}. Train a head of kind "
            "eagle3, or use `headstart serve`."
        )
    if file.meta.replaces is not None:
        return (
            "There is nothing to export: the head is already in the place of the target's MTP "
            f"layer ({file.meta.replaces}), and engines serve the folder as it is: "
            f"`{mtp_launch_line(str(root), file.meta.steps)}`."
        )
    return (
        "Engines load a head of kind mtp as the MTP layer of the target, not from a folder of its "
        f"own. Write it there: `headstart fuse {file.meta.target} HEAD OUT --native` (HEAD: "
        f"{root / HEADS})."
    )


@torch.no_grad()
def check_embedding_and_lm_head(head: DraftHead) -> None:
    """Raise ValueError if engines would use the target's embedding or LM head in another way.

    They take unscaled rows of the embedding, and an LM head without bias. Scaled or capped logits
    do not matter, since they keep the order and therefore greedy draft tokens.
    """
    embedding = head.target.model.get_input_embeddings()
    token = torch.tensor([head.config.vocab_size // 2])
    if not torch.equal(head.target.embed(token), embedding.weight[token]):
        raise ValueError(
            f"{head.target.name} scales its embeddings, and the EAGLE-3 layers of engines take "
            "them unscaled, unlike this head in training. Use `headstart serve`."
        )
    if getattr(head.target.model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"The LM head of {head.target.name} has a bias, and engines draft without one. Use "
            "`headstart serve`."
        )


def _verifier(folder: str | Path, verifier: str | None) -> str:
    """The name by which an engine finds the target."""
    if verifier is not None:
        if not Path(verifier).is_dir() and hub_name(verifier) is None:
            raise ValueError(
                f"--verifier {verifier} is neither a folder nor a Hub id (owner/name). Name what "
                "the engine serves, or leave it out for the fused checkpoint."
            )
        return verifier if hub_name(verifier) is not None else str(Path(verifier).resolve())
    found = hub_name(folder)
    if found is None:
        return str(Path(folder).resolve())
    repo, revision = found
    if revision is not None:
        raise ValueError(
            f"Engines take no revision in a model name, so they cannot serve {folder}. Add "
            "--verifier with a folder or an owner/name."
        )
    return repo


def _architectures(verifier: str, root: Path) -> list[str]:
    """Architectures of the target. ValueError if the verifier is another model."""
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
    greedy = {"proposal_type": "greedy", "speculative_tokens": steps or DEFAULT_DRAFT_STEPS}
    return {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS,
        "draft_vocab_size": native["draft_vocab_size"] or native["vocab_size"],
        "target_hidden_size": None,  # the same as that of the draft model
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
    """Tensors under the names of speculators, with embedding, LM head and draft vocabulary.

    The embedding has to be there: the loader of speculators leaves a missing one uninitialised.
    """
    found = {
        name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name: tensor
        for name, tensor in native.items()
    }
    model, size = head.target.model, head.config.vocab_size
    found[EMBEDDING] = _bfloat16(model.get_input_embeddings().weight[:size])
    if LM_HEAD not in found:
        found[LM_HEAD] = _bfloat16(model.get_output_embeddings().weight[:size])
    if head.draft_ids is not None:
        in_draft_vocab_V = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        in_draft_vocab_V[head.draft_ids] = True
        found["t2d"] = in_draft_vocab_V
    return found


def _bfloat16(weight_VD: Tensor) -> Tensor:
    return weight_VD.detach().to(torch.bfloat16).clone()  # tied weights share memory


def _copy_tokenizer(root: Path, part: Path) -> None:
    for file in {file for pattern in TOKENIZER for file in root.glob(pattern) if file.is_file()}:
        shutil.copyfile(file, part / file.name)
