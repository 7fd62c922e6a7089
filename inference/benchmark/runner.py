"""The benchmark: several ways of decoding on the same prompts, in turn.

Every configuration decodes a batch before the next batch comes, and which one goes first changes
from batch to batch, so that a machine whose speed drifts treats all alike. The one called
`autoregressive` is what the responses of the others are compared with.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.loop import decode
from headstart.model.target.target import Target

from .exactness import compare_responses
from .metrics import AUTOREGRESSIVE, Case, RunMetrics
from .resources import measured

WARM_UP_TOKENS = 8


class Runner(Protocol):
    """One way of decoding batches of prompts.

    max_batch_size: None for any.
    same_noise: whether sampled tokens use Headstart's noise, so that sampled responses too must
        equal the autoregressive ones.
    """

    device: torch.device
    max_batch_size: int | None
    same_noise: bool

    def generate(
        self, tokens_BT: Tensor, mask_BT: Tensor, sampling: SamplingParams, metrics: RunMetrics
    ) -> list[list[int]]:
        """The responses, end-of-sequence token included. Adds tokens and steps to the metrics."""
        ...


class HeadstartRunner:
    """Headstart's decode loop. speculative: where drafts come from; None decodes
    autoregressively."""

    max_batch_size: int | None = None
    same_noise = True

    def __init__(self, target: Target, speculative: SpeculativeConfig | None = None):
        self.target, self.speculative, self.device = target, speculative, target.device

    def generate(
        self, tokens_BT: Tensor, mask_BT: Tensor, sampling: SamplingParams, metrics: RunMetrics
    ) -> list[list[int]]:
        steps = decode(
            self.target,
            tokens_BT,
            mask_BT,
            sampling=sampling,
            speculative=self.speculative,
            stats=metrics.stats,
        )
        responses: list[list[int]] = [[] for _ in tokens_BT]
        for step, emitted in enumerate(steps):
            metrics.decode_steps += step > 0  # the first one is the prefill
            for response, tokens in zip(responses, emitted, strict=True):
                response += tokens
        return responses


def headstart_runners(
    target: Target, configs: Mapping[str, SpeculativeConfig]
) -> dict[str, HeadstartRunner]:
    """Autoregressive decoding, and each configuration under its name."""
    runners = {AUTOREGRESSIVE: HeadstartRunner(target)}
    return runners | {name: HeadstartRunner(target, one) for name, one in configs.items()}


@dataclass(frozen=True)
class BatchTiming:
    """One batch. measured: tokens, seconds and target passes of each configuration."""

    prompts: tuple[str, ...]
    measured: dict[str, tuple[int, float, int]]


@dataclass(frozen=True)
class BenchmarkResult:
    """Results by configuration. responses: token ids per prompt; a configuration that failed has
    fewer of them."""

    metrics: dict[str, RunMetrics]
    timings: list[BatchTiming]
    responses: dict[str, list[list[int]]]


def run_benchmark(
    target: Target,
    runners: Mapping[str, Runner],
    cases: Sequence[Case],
    sampling: SamplingParams,
    *,
    batch_size: int = 1,
    keep_going: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> BenchmarkResult:
    """Decode every prompt with every runner, after a warm-up.

    sampling: its seed grows by one from batch to batch.
    keep_going: record the error of a runner and continue with the others, instead of raising it.
    on_batch: receives the number of batches that are done.
    """
    result = BenchmarkResult(
        {name: RunMetrics() for name in runners}, [], {name: [] for name in runners}
    )
    batches = [cases[at : at + batch_size] for at in range(0, len(cases), batch_size)]
    names = list(runners)
    for name in names:
        result.metrics[name].error = _warm_up(
            target, runners[name], batches, sampling, keep_going=keep_going
        )
    for number, batch in enumerate(batches):
        seeded = replace(sampling, seed=sampling.seed + number)
        first = number % len(names)
        timing = BatchTiming(tuple(case.id for case in batch), {})
        for name in names[first:] + names[:first]:
            metrics = result.metrics[name]
            before = _counts(metrics)
            responses = _generate(target, runners[name], batch, seeded, metrics, keep_going)
            if metrics.error is None:
                result.responses[name] += responses
                tokens, seconds, passes = before
                after = _counts(metrics)
                timing.measured[name] = after[0] - tokens, after[1] - seconds, after[2] - passes
        result.timings.append(timing)
        _compare(target, runners, batch, seeded, result)
        on_batch(number + 1)
    return result


def _counts(metrics: RunMetrics) -> tuple[int, float, int]:
    return metrics.stats.num_tokens, metrics.seconds, metrics.stats.num_steps


def _warm_up(
    target: Target,
    runner: Runner,
    batches: Sequence[Sequence[Case]],
    sampling: SamplingParams,
    *,
    keep_going: bool,
) -> str | None:
    """Decode the first batch without measuring it; the error if there is one.

    On CUDA also the batch of the longest prompt and the last one, each to its end: every size of a
    KV cache has CUDA graphs of its own.
    """
    metrics = RunMetrics()
    chosen = [batches[0]]
    if target.device.type == "cuda" and isinstance(runner, HeadstartRunner):
        longest = max(batches, key=lambda batch: max(len(case.tokens) for case in batch))
        chosen = [batches[0], longest, batches[-1]]
    else:
        short = min(WARM_UP_TOKENS, sampling.max_new_tokens)
        sampling = replace(sampling, max_new_tokens=short)
    for batch in chosen:
        _generate(target, runner, batch, sampling, metrics, keep_going)
    return metrics.error


def _generate(
    target: Target,
    runner: Runner,
    batch: Sequence[Case],
    sampling: SamplingParams,
    metrics: RunMetrics,
    keep_going: bool,
) -> list[list[int]]:
    """A runner's responses to a batch; none once it has failed."""
    if metrics.error is not None:
        return []
    tokens_BT, mask_BT = _left_padded(batch, target.pad_id)
    try:
        with measured(runner.device, metrics):
            responses = runner.generate(tokens_BT, mask_BT, sampling, metrics)
    except Exception as error:  # whatever it is, the other runners can continue
        if not keep_going:
            raise
        metrics.error = f"{type(error).__name__}: {str(error).strip()[:500]}"
        if runner.device.type == "cuda":
            torch.cuda.empty_cache()
        return []
    metrics.prompts += len(batch)
    return responses


def _left_padded(batch: Sequence[Case], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, as transformers' `generate` takes them, and their mask."""
    longest = max(len(case.tokens) for case in batch)
    tokens_BT = torch.full((len(batch), longest), pad_id)
    mask_BT = torch.zeros_like(tokens_BT)
    for number, case in enumerate(batch):
        tokens_BT[number, longest - len(case.tokens) :] = torch.tensor(case.tokens)
        mask_BT[number, longest - len(case.tokens) :] = 1
    return tokens_BT, mask_BT


def _compare(
    target: Target,
    runners: Mapping[str, Runner],
    batch: Sequence[Case],
    sampling: SamplingParams,
    result: BenchmarkResult,
) -> None:
    """Compare the latest responses with the autoregressive ones, where they must be equal."""
    metrics = result.metrics
    if AUTOREGRESSIVE not in metrics or metrics[AUTOREGRESSIVE].error is not None:
        return
    expected = result.responses[AUTOREGRESSIVE][-len(batch) :]
    for name, runner in runners.items():
        comparable = runner.same_noise or sampling.is_greedy
        if name != AUTOREGRESSIVE and comparable and metrics[name].error is None:
            responses = result.responses[name][-len(batch) :]
            compare_responses(target, batch, sampling, expected, responses, metrics[name])
