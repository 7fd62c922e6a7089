"""Run the benchmark on token ids, and a runner whose responses a test decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from headstart.inference.benchmark.metrics import Case, RunMetrics
from headstart.inference.benchmark.runner import headstart_runners, run_benchmark
from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.model.target.target import Target


def benchmark(
    target: Target,
    configs: Mapping[str, SpeculativeConfig],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> dict[str, RunMetrics]:
    """Greedy metrics of autoregressive decoding and of each configuration."""
    cases = [Case(str(number), tuple(ids)) for number, ids in enumerate(prompts)]
    runners = headstart_runners(target, configs)
    return run_benchmark(target, runners, cases, SamplingParams(max_new_tokens)).metrics


class ScriptedRunner:
    """Responds as `respond` decides. size: bytes that it allocates meanwhile."""

    max_batch_size: int | None = None
    same_noise = True
    device = torch.device("cpu")

    def __init__(self, respond: Callable[[Tensor], list[list[int]]], size: int = 0):
        self.respond, self.size = respond, size

    def generate(
        self, tokens_BT: Tensor, mask_BT: Tensor, sampling: SamplingParams, metrics: RunMetrics
    ) -> list[list[int]]:
        torch.ones(self.size, dtype=torch.uint8)
        responses = self.respond(tokens_BT)
        metrics.stats.num_tokens += sum(map(len, responses))
        return responses
