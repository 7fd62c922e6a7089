"""A tiny random chat model as a folder: byte tokens, a chat template, real files."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate(alphabet)}
    bytes_only = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    return made


def write_recipe(path: Path, target: Path, data: Path, output: Path, steps: int) -> Path:
    """A short training of an mtp head, as a file."""
    path.write_text(
        f"target: {{name: {target}, dtype: float32}}\nhead: {{kind: mtp}}\n"
        f"data: {{path: {data}, max_length: 32, global_batch_tokens: 64}}\nloss: {{steps: 2}}\n"
        f"train: {{output: {output}, steps: {steps}, precision: float32, log_every: 1}}\n"
        "eval: {prompts: null}\n"
    )
    return path


def save(folder: Path, *, context: int = 256, seed: int = 0) -> Path:
    """Write the model; float32, 2 layers, a few megabytes at most."""
    made = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
