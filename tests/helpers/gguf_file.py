"""Write a model as a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
from families import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "falcon": gguf.MODEL_ARCH.FALCON}


def write_gguf(model: PreTrainedModel, file: Path, tensors: dict[str, Tensor]) -> None:
    """A model as llama.cpp's converter writes it. tensors: stored in place of the model's own."""
    config = model.config
    name = config.model_type
    names = gguf.get_tensor_name_map(ARCHITECTURES[name], config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(256)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1 if name == "falcon" else config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(33 + index) for index in range(VOCAB - 5)]
    writer.add_token_list(["<pad>", "<s>", "</s>", *letters, "ab", "abc"])
    writer.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
    for key, weight in weights.items():
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert stored is not None, key
        if name == "llama" and ("q_proj" in key or "k_proj" in key):  # llama.cpp pairs neighbours
            heads = weight.view(config.num_attention_heads, 2, -1, weight.shape[1])
            weight = heads.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(stored, tensors.pop(stored, weight).contiguous().numpy())
    for stored, weight in tensors.items():
        writer.add_tensor(stored, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
