"""The acceptance length of a head alone, without a baseline: for evaluation during training.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.graph_pool import graph_pool
from headstart.inference.engine.loop import decode
from headstart.inference.engine.stats import Stats
from headstart.model.target.target import Target


def measure_acceptance(
    target: Target,
    speculative: SpeculativeConfig,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
) -> tuple[Stats, list[list[list[int]]]]:
    """Decode prompts one at a time.

    Returns the statistics, and for each prompt the tokens of each decode step.
    """
    stats = Stats()
    responses = []
    for prompt in prompts:
        tokens_BT = torch.tensor([list(prompt)])
        steps = decode(target, tokens_BT, sampling=sampling, speculative=speculative, stats=stats)
        responses.append([emitted[0] for emitted in steps])
    if speculative.head is not None:
        graph_pool(target).forget(speculative.head)  # the next evaluation brings another head
    return stats, responses
