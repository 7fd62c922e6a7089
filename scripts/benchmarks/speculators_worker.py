"""Train an EAGLE-3 head with speculators.

`versus_speculators` runs this file in an environment that has speculators, and not this project.

    python speculators_worker.py FOLDER ATTENTION [compile]

FOLDER was written by `versus_speculators`. The last line printed is JSON: seconds, CPU seconds and
conversations (rows) of every step, and the loss of the first batch before training.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.models.eagle3.data import shift_batch
from speculators.train.data import ArrowDataset, CollateFn
from speculators.train.distributed_batch_sampler import MultipackDistributedBatchSamplerV2
from speculators.train.trainer import Trainer, TrainerConfig
from torch.utils.data import DataLoader
from transformers import LlamaConfig


class TrainerOnCPU(Trainer):
    """speculators' trainer, which supports only GPUs, on a CPU."""

    def setup_model(self) -> None:
        self.local_rank = self.device_type = "cpu"
        super().setup_model()


def main(folder: Path, attention: str, compiled: bool) -> None:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, settings["precision"])
    model = make_model(folder, settings, attention)
    dataset = ArrowDataset(
        settings["batch_tokens"], folder / "data", on_missing="raise", hidden_states_dtype=dtype
    )
    collate = CollateFn(
        settings["batch_tokens"],
        settings["layer"]["hidden_size"],
        num_target_layers=len(settings["taps"]),
        dtype=dtype,
        preprocess=shift_batch,
    )
    sampler = MultipackDistributedBatchSamplerV2(
        batch_max_length=settings["batch_tokens"],
        lengths=dataset.approx_lengths,
        num_replicas=1,
        rank=0,
    )
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)
    trainer = make_trainer(folder, settings, model, loader)
    first = collate([dataset[row] for row in settings["first_batch"]])
    first_losses = losses(trainer, first)
    if compiled:
        model.compile()
    trainer.global_step = 1  # its log at step 0 needs an accelerator
    times: list[tuple[float, float]] = []

    def tick() -> None:
        times.append((time.perf_counter(), time.process_time()))

    tick()
    trainer.train_epoch(0, step_callback=tick)
    walls, cpus = (torch.tensor(kind, dtype=torch.float64) for kind in zip(*times, strict=True))
    passed = {"seconds": walls.diff().tolist(), "cpu_seconds": cpus.diff().tolist()}
    rows = [[int(row) for row in batch] for batch in sampler]
    print(json.dumps({**passed, "rows": rows, "first_losses": first_losses}))


def make_model(folder: Path, settings: dict[str, Any], attention: str) -> Any:
    """speculators' model, with the initial weights of Headstart's head."""
    layer = LlamaConfig(**settings["layer"], num_hidden_layers=1)
    start = load_file(folder / "head.safetensors")
    model = Eagle3DraftModel.from_training_args(
        layer,
        t2d=start.pop("t2d", None),
        d2t=start.pop("d2t", None),
        verifier_name_or_path=str(folder / "verifier"),
        target_layer_ids=[
            tap + 1 for tap in settings["taps"]
        ],  # speculators counts layers by their inputs
        draft_vocab_size=settings["draft_vocab"],
        draft_attn_impl=attention,
        norm_before_residual=False,
        fc_norm=settings["fc_norm"],
        norm_output=settings["norm_output"],
        ttt_steps=settings["ttt_steps"],
    )
    unknown = model.load_state_dict(start, strict=False).unexpected_keys
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    if unknown or trained != set(start):
        raise SystemExit(f"not the same head: {sorted(trained ^ set(start))}, {unknown}")
    return model


def make_trainer(folder: Path, settings: dict[str, Any], model: Any, loader: Any) -> TrainerOnCPU:
    call, _ = Eagle3DraftModel.get_trainer_kwargs(
        loss_fn="kl_div",
        loss_implementation="eager",  # the fused one needs Triton
        ttt_steps=settings["ttt_steps"],
        ttt_step_loss_decay=settings["step_decay"],
    )
    config = TrainerConfig(
        lr=settings["lr"],
        num_epochs=1,
        save_path=str(folder / "run"),
        train_call_kwargs=call,
        optimizer="adamw",
        weight_decay=settings["weight_decay"],
        hidden_states_dtype=getattr(torch, settings["precision"]),
        log_freq=1 << 30,  # logging takes time
    )
    return TrainerOnCPU(model, config, loader)


@torch.no_grad()
def losses(trainer: TrainerOnCPU, batch: dict[str, Any]) -> list[float]:
    """Mean loss of each draft step."""
    config = trainer.config
    with torch.autocast("cpu", dtype=config.hidden_states_dtype):
        _, _, metrics = trainer.model(**batch, **config.train_call_kwargs)
    steps = config.train_call_kwargs["ttt_steps"]
    return [float(metrics[f"loss_{step}_sum"]) for step in range(steps)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], "compile" in sys.argv[3:])
