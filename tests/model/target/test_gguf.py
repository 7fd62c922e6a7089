"""Targets from GGUF files: the same logits, and a plain folder that a head can be fused into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import VOCAB, build, prompts
from gguf_file import write_gguf
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from headstart.model.target.gguf import save_plain
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True})


@pytest.fixture
def falcon() -> PreTrainedModel:
    return build("falcon", {"tie_word_embeddings": True})


def logits_of(target: Target) -> Tensor:
    logits_BTV = target.forward(prompts([12])[0][None]).logits_BTV
    assert logits_BTV is not None
    return logits_BTV


def test_a_gguf_file_gives_the_logits_of_its_model(llama: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", {})
    target = load_target(tmp_path / "tiny.gguf", device="cpu")
    torch.testing.assert_close(logits_of(target), logits_of(wrap_target(llama)))
    assert target.tokenizer.convert_ids_to_tokens([94, 95]) == ["ab", "abc"]


def test_output_weight_is_used_where_the_file_has_it(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    head = torch.randn(VOCAB, llama.config.hidden_size)
    write_gguf(llama, tmp_path / "tiny.gguf", {"output.weight": head})
    target = load_target(tmp_path / "tiny.gguf", device="cpu")
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
    target = load_target(file, device="cpu")
    assert target.config.tie_word_embeddings
    head, embedding = target.model.get_output_embeddings(), target.model.get_input_embeddings()
    assert head.weight is embedding.weight
    torch.testing.assert_close(head.weight.data, exact)
    torch.testing.assert_close(logits_of(target), logits_of(wrap_target(falcon)))


def test_a_gguf_target_is_saved_as_a_plain_folder(llama: PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf", {})
    target = load_target(tmp_path / "tiny.gguf", device="cpu")
    save_plain(target, tmp_path / "plain")
    again = load_target(tmp_path / "plain", device="cpu")
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
    target = load_target(smollm2, device="cpu")
    assert (target.num_layers, target.hidden_size, target.vocab_size) == (30, 576, 49152)
    ids_1T = target.tokenizer("The capital of France is", return_tensors="pt").input_ids
    logits_BTV = target.forward(ids_1T).logits_BTV
    assert logits_BTV is not None
    assert target.tokenizer.decode(logits_BTV[0, -1].argmax()).strip() == "Paris"
