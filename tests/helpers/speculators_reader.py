"""Opens an exported folder with speculators' own `Eagle3DraftModel`: a process of its own, in an
environment that holds speculators and not this project.

    python speculators_reader.py FOLDER CASE

CASE: a file of tensors. features 1 x T x (taps D), tokens 1 x T (those that follow the features).
Its logits go into `logits` there, steps x T x Vd: what it computes for each step of training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # its forward compiles itself
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from torch import Tensor

STEPS = 2


@torch.no_grad()
def main(folder: Path, case: Path) -> None:
    given = load_file(case)
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"  # the other one needs a GPU
    model = Eagle3DraftModel.from_pretrained(folder, config=config).float().eval()
    unloaded = [name for name, one in model.named_parameters() if one.isnan().any()]
    assert not unloaded, unloaded
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, __, output: logits.append(output[0]))
    tokens = given["tokens"]
    model(given["features"], tokens, torch.zeros_like(tokens), ttt_steps=STEPS)
    proposed = torch.arange(model.draft_vocab_size)
    if model.d2t is not None:
        proposed = proposed + model.d2t
        assert torch.equal(model.t2d.nonzero()[:, 0], proposed)
    save_file({"logits": torch.stack(logits), "ids": proposed}, case.with_suffix(".read"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
