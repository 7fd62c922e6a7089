"""Targets from GGUF files: the same logits, and a plain folder that a head can be fused into."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from families import VOCAB, build, prompts
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from headstart.model.gguf import save_plain
from headstart.model.target import Target

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


def logits_of(target: Target) -> Tensor:
    logits_BTV = target.read(prompts([12])[0][None]).logits_BTV
    assert logits_BTV is not None
    return logits_BTV


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True})


@pytest.fixture
def falcon() -> PreTrainedModel:
    return build("falcon", {"tie_word_embeddings": True})


def test_a_gguf_file_gives_the_logits_of_its_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", {})
    target = Target.load(tmp_path / "tiny.gguf", device="cpu")
    torch.testing.assert_close(logits_of(target), logits_of(Target.wrap(llama)))
    assert target.tokenizer.convert_ids_to_tokens([94, 95]) == ["ab", "abc"]


def test_output_weight_is_used_where_the_file_has_it(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    head = torch.randn(VOCAB, llama.config.hidden_size)
    write_gguf(llama, tmp_path / "tiny.gguf", {"output.weight": head})
    target = Target.load(tmp_path / "tiny.gguf", device="cpu")
    torch.testing.assert_close(target.model.get_output_embeddings().weight.data, head)
    embedding = llama.get_input_embeddings().weight.data
    torch.testing.assert_close(target.model.get_input_embeddings().weight.data, embedding)


def test_output_weight_is_used_for_both_where_they_are_tied(
    falcon: PreTrainedModel, tmp_path: Path
) -> None:
    """As with files that hold the embedding in fewer bits than the output matrix."""
    exact = falcon.get_input_embeddings().weight.data
    rough = (exact * 8).round() / 8
    file = tmp_path / "tiny.gguf"
    write_gguf(falcon, file, {"token_embd.weight": rough, "output.weight": exact})
    target = Target.load(file, device="cpu")
    assert target.config.tie_word_embeddings
    head, embedding = target.model.get_output_embeddings(), target.model.get_input_embeddings()
    assert head.weight is embedding.weight
    torch.testing.assert_close(head.weight.data, exact)
    torch.testing.assert_close(logits_of(target), logits_of(Target.wrap(falcon)))


def test_a_gguf_target_is_saved_as_a_plain_folder(llama: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", {})
    target = Target.load(tmp_path / "tiny.gguf", device="cpu")
    save_plain(target, tmp_path / "plain")
    again = Target.load(tmp_path / "plain", device="cpu")
    torch.testing.assert_close(logits_of(again), logits_of(target), rtol=0, atol=0)
    ids = target.tokenizer("abcabzz").input_ids
    assert ids == AutoTokenizer.from_pretrained(tmp_path / "plain")("abcabzz").input_ids
    assert {file.name for file in (tmp_path / "plain").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    with pytest.raises(ValueError, match=r"not empty"):
        save_plain(target, tmp_path / "plain")


@pytest.mark.slow
def test_a_real_gguf_file_opens_and_talks(smollm2: Path) -> None:
    target = Target.load(smollm2, device="cpu")
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (30, 576, 49152)
    ids_1T = target.tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits_BTV = target.read(ids_1T).logits_BTV
    assert logits_BTV is not None
    assert target.tokenizer.decode(logits_BTV[0, -1].argmax()).strip() == "Paris"
