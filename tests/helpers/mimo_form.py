"""A Llama checkpoint in the published form of MiMo-7B, for which engines have a class: Qwen2's
layers with biases of zero, and a multi-token prediction layer that starts as the last layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LEFT = ("config.json", "model.safetensors", "README.md")
# The model's repository brings the configuration's class.
CLASS = """from transformers import Qwen2Config


class MiMoConfig(Qwen2Config):
    model_type = "mimo"
"""


def as_mimo(llama: Path, out: Path) -> Path:
    """llama: a folder with one safetensors file, whose head size divides as MiMo's does."""
    out.mkdir()
    for file in llama.iterdir():
        if file.is_file() and file.name not in LEFT:
            shutil.copy(file, out / file.name)
    tensors = load_file(llama / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name.replace("weight", "bias")] = torch.zeros_like(tensors[name][:, 0])
    last, ours = f"model.layers.{config['num_hidden_layers'] - 1}.", "model.mtp_layers.0."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[ours + name.removeprefix(last)] = tensors[name].clone()
    norm, size = tensors["model.norm.weight"], config["hidden_size"]
    tensors[ours + "token_layernorm.weight"] = torch.ones_like(norm)
    tensors[ours + "hidden_layernorm.weight"] = torch.ones_like(norm)
    tensors[ours + "final_layernorm.weight"] = norm.clone()
    joined = torch.cat([torch.eye(size), 0.1 * torch.eye(size)], 1)  # hidden state, embedding
    tensors[ours + "input_proj.weight"] = joined.to(norm.dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "use_sliding_window": False,
        "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "configuration_mimo.py").write_text(CLASS)
    return out
