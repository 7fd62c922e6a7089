"""Targets stored as one GGUF file (llama.cpp): opened as dense weights, saved as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import GGUFReader, dequantize
from torch import nn
from transformers import GgufConfig, PreTrainedModel

if TYPE_CHECKING:
    from .target import Target

SUFFIX = ".gguf"
OUTPUT = "output.weight"


def model_arguments() -> dict[str, Any]:
    """Arguments of `from_pretrained` beside `gguf_file` that make the model dense.

    Without it the loaded model counts as quantized, and `save_pretrained` refuses.
    """
    return {"quantization_config": GgufConfig(dequantize=True)}


def take_output_weight(model: PreTrainedModel, file: Path) -> None:
    """Use the file's `output.weight` where the model ties embedding and LM head.

    For a few architectures transformers ties the two whatever the file holds. The matrix is then
    the same, but llama.cpp stores the embedding in fewer bits. (Where transformers does not tie
    them, it loads both by itself.)
    """
    if not model.config.tie_word_embeddings:
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear) and isinstance(embedding, nn.Embedding)
    for tensor in GGUFReader(file).tensors:
        if tensor.name == OUTPUT:
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            with torch.no_grad():
                embedding.weight.copy_(weight.view_as(embedding.weight))
            head.weight = embedding.weight


def save_plain(target: Target, folder: str | Path) -> None:
    """Write config, safetensors and tokenizer as a plain model folder, as a fused one needs."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty, and a saved target must not mix with other files. "
            "Name a new folder."
        )
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
