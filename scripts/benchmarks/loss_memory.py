"""Peak memory of the loss of a batch, by chunk size.

    python -m headstart.scripts.benchmarks.loss_memory --vocab 152064 --rows 64,auto

Uses a random target of that width. Prints a table, then machine, versions and metrics as one line
of JSON. Memory is measured by torch's allocator on a GPU, and by its profiler on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from headstart.model.target.load import wrap_target
from headstart.scripts.console import friendly, show
from headstart.scripts.options.environment import environment

if TYPE_CHECKING:
    import torch

AUTO = "auto"


def loss_memory(
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary size of the target.")] = 152_064,
    hidden: Annotated[int, typer.Option(min=8, help="Hidden size of the target.")] = 896,
    draft_vocab: Annotated[
        int | None, typer.Option(help="Draft vocabulary size of the head (default: all).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens per batch.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Draft steps per position.")] = 3,
    rows: Annotated[
        str, typer.Option(help="Rows per chunk, e.g. 64,256,auto.")
    ] = "64,128,256,auto",
) -> None:
    """Measure peak memory and time of the loss and its gradient."""
    import torch

    from headstart.model.heads.common.base import make_head
    from headstart.model.target.synthetic import random_model
    from headstart.training.config.schema import LossConfig
    from headstart.training.data.batching import Batch
    from headstart.training.objective.losses import chunk_rows, loss_sum

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = {"hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": 1}
    shape = {"model_type": "llama", "vocab_size": vocab, "num_hidden_layers": 2, **sizes}
    model = random_model(shape, 0)
    model.to(device)  # type: ignore[arg-type]  # decorated in transformers
    target = wrap_target(model)
    head = make_head(target, "eagle3", {"draft_vocab": draft_vocab})
    if draft_vocab is not None:
        head.set_draft_vocab(torch.arange(draft_vocab))
    tokens_BT = torch.randint(0, vocab, (1, tokens), device=device)
    lengths_B = torch.tensor([tokens], device=device)
    batch = Batch(tokens_BT, lengths_B, torch.ones_like(tokens_BT, dtype=torch.bool))
    output = target.forward(tokens_BT, taps=head.taps, logits=False)
    chunks = []
    for count in rows.split(","):
        size = None if count == AUTO else int(count)
        config = LossConfig(steps=steps, chunk_rows=size)
        hidden_states = [one.detach() for one in head.unroll(output, tokens_BT, steps)]
        states = [one.requires_grad_() for one in hidden_states]

        def run(config: LossConfig = config, states: list[torch.Tensor] = states) -> None:
            loss_sum(config, head, output, states, batch).total.backward()

        run()  # warm-up
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
        peak = peak_bytes(run, device)
        used = size or chunk_rows(head, device.type == "cuda")
        chunks.append({"rows": used, "peak_mib": peak >> 20, "tokens_per_second": tokens / seconds})
        show(f"{used} rows: {peak / 2**20:.0f} MiB, {tokens / seconds:.0f} tokens/s")
    settings = {"vocab": vocab, "hidden": hidden, "draft_vocab": draft_vocab, "tokens": tokens}
    print(json.dumps({**settings, "steps": steps, **environment(target), "chunks": chunks}))


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that torch allocated, above those before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [one["args"] for one in events if one["name"] == "[memory]"]
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return int(max(one["Total Allocated"] for one in changes) - before)


if __name__ == "__main__":
    typer.run(friendly(loss_memory))
