"""How much memory training takes: logits in chunks, steps worked out again.

Measured by the profiler: all bytes that torch's CPU allocator has handed out.
"""

from __future__ import annotations

import json

import pytest
import torch
import typer
from tiny_run import tiny_head, tiny_target
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target
from headstart.scripts.benchmarks.loss_memory import loss_memory, peak_bytes
from headstart.training.config.schema import LossConfig
from headstart.training.data.batching import Batch
from headstart.training.objective import losses

command = typer.Typer()
command.command()(loss_memory)
VOCAB = 152_064  # Qwen2.5's
GIB = 1 << 30


def wide_target() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return wrap_target(LlamaForCausalLM(config))


@pytest.mark.slow
@pytest.mark.parametrize("draft_vocab", [None, 32_000])
def test_logits_of_a_large_vocabulary_stay_under_two_gib(monkeypatch, draft_vocab):
    # As on a GPU, where a chunk is not cut up further. The batch has rows for several chunks, and
    # more of them take no more at a time.
    monkeypatch.setattr(losses, "_blocks", lambda values: [slice(0, len(values))])
    monkeypatch.setattr(losses, "MOST_ROWS_CPU", losses.MOST_ROWS_GPU)
    target = wide_target()
    head = tiny_head(target, "eagle3", draft_vocab=draft_vocab)
    if draft_vocab is not None:
        head.set_draft_vocab(torch.arange(draft_vocab))
    rows = losses.chunk_rows(head, on_gpu=True)
    assert rows >= 256  # large enough for a GPU to be busy
    tokens_BT = torch.randint(0, VOCAB, (1, 2 * rows + 10))
    mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    batch = Batch(tokens_BT, torch.tensor([tokens_BT.shape[1]]), mask_BT)
    seen = target.forward(tokens_BT, taps=head.taps, logits=False)
    hidden = head.unroll(seen, tokens_BT, 1)

    def run() -> None:
        losses.loss_sum(LossConfig(steps=1), head, seen, hidden, batch).total.backward()

    peak = peak_bytes(run, target.device)
    assert peak < 2.05 * GIB  # beside logits there is little: hidden states of 16 numbers
    assert peak > 0.8 * GIB  # or the measurement sees nothing


@pytest.mark.parametrize("layout", ["append", "kvshare"])
@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_steps_worked_out_again_give_the_same_gradient_in_less_memory(kind, layout):
    target = tiny_target()
    tokens_BT = torch.randint(0, target.vocab_size, (2, 40))

    def gradients(recompute: bool) -> tuple[dict[str, Tensor], int]:
        head = tiny_head(target, kind, attention_layout=layout)
        head.recompute = recompute
        seen = target.forward(tokens_BT, taps=head.taps, logits=False)
        kept = 0

        def pack(value: Tensor) -> Tensor:
            nonlocal kept
            kept += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            hidden = head.unroll(seen, tokens_BT, 4)
            torch.stack(hidden).square().sum().backward()
        return {name: one.grad for name, one in head.named_parameters()}, kept

    (plain, all_kept), (again, some_kept) = gradients(False), gradients(True)
    for name, value in plain.items():
        assert value is not None and torch.equal(again[name], value), name
    assert some_kept < all_kept / 3


def test_the_command_measures_every_chunk():
    arguments = ["--vocab", "500", "--hidden", "16", "--tokens", "300", "--rows", "64,128,auto"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.output.splitlines()[-1])
    assert [one["rows"] for one in figures["chunks"]] == [64, 128, 256]
    small, larger, _ = (one["peak_mib"] for one in figures["chunks"])
    assert small <= larger and figures["torch"] == torch.__version__
