"""What a benchmark measures: metrics of one configuration, summed over its prompts.

Ratios are of sums: total tokens by total target passes, total tokens by total seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headstart.inference.engine.stats import Stats

AUTOREGRESSIVE = "autoregressive"  # Headstart's own loop without drafts: what others are held to
GENERATE = "generate"  # transformers' `generate`
MEGA = 1e6


@dataclass(frozen=True)
class Case:
    """A tokenized prompt. id: unique in its suite."""

    id: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """The first position where a response differs from the autoregressive one.

    margin: distance of the target's two best scores at that position, in logits, sampling noise
        included, in one forward pass over the autoregressive response. Near 0 it is a tie that
        rounding decides.
    """

    prompt: str
    position: int
    margin: float


@dataclass
class RunMetrics:
    """Sums over the prompts of one configuration.

    prompts: number of responses.
    seconds, cpu_seconds: wall time and time of all CPU threads, prefill included.
    decode_steps: target forward passes after the prefill, once per batch.
    compared: responses that must equal the autoregressive ones; identical: those that do.
    peak_bytes: peak memory; working_bytes: the part of it that decoding allocated. None where the
        system does not report it.
    error: why the configuration dropped out.
    """

    stats: Stats = field(default_factory=lambda: Stats(timing=True))
    prompts: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    decode_steps: int = 0
    compared: int = 0
    identical: int = 0
    differences: list[Difference] = field(default_factory=list)
    peak_bytes: int | None = None
    working_bytes: int | None = None
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.stats.num_tokens / self.seconds if self.seconds else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds per decode step, without the prefill."""
        if not self.decode_steps:
            return 0.0
        return (self.seconds - self.stats.seconds["prefill"]) / self.decode_steps

    @staticmethod
    def total(parts: Sequence[RunMetrics]) -> RunMetrics:
        """Sum several runs of one configuration. It failed if one of them failed."""
        total = RunMetrics()
        for part in parts:
            total.stats.add(part.stats)
            total.prompts += part.prompts
            total.seconds += part.seconds
            total.cpu_seconds += part.cpu_seconds
            total.decode_steps += part.decode_steps
            total.compared += part.compared
            total.identical += part.identical
            total.differences += part.differences
            total.peak_bytes = max_known(total.peak_bytes, part.peak_bytes)
            total.working_bytes = max_known(total.working_bytes, part.working_bytes)
            total.error = total.error or part.error
        return total

    def summary(self) -> dict[str, Any]:
        """The metrics, ready for JSON (`scripts/benchmarks/report.py` documents the keys)."""
        if self.error is not None:
            return {"error": self.error, "prompts": self.prompts}
        stats = self.stats
        summary: dict[str, Any] = {
            "prompts": self.prompts,
            "tokens": stats.num_tokens,
            "acceptance_length": round(stats.acceptance_length, 4),
            "acceptance_rate_per_position": [round(rate, 4) for rate in stats.acceptance_rates],
            "tokens_per_second": round(self.tokens_per_second, 3),
            "seconds": {"total": round(self.seconds, 4)},
            "cpu_ms_per_token": round(1e3 * self.cpu_seconds / stats.num_tokens, 4),
            "peak_memory_mb": _megabytes(self.peak_bytes),
            "working_memory_mb": _megabytes(self.working_bytes),
            "calibration_error": stats.calibration_error,
            "reliability": [
                [count, round(stated, 2), accepted] for count, stated, accepted in stats.reliability
            ],
            "compared": self.compared,
            "identical": self.identical,
            "first_differences": [vars(one) for one in self.differences],
        }
        if stats.total_seconds:  # Headstart's loop, which times its phases
            self._add_phases(summary)
        return summary

    def _add_phases(self, summary: dict[str, Any]) -> None:
        stats = self.stats
        seconds = {phase: stats.seconds[phase] for phase in ("prefill", "draft", "verify")}
        seconds["host"] = max(self.seconds - sum(seconds.values()), 0.0)
        summary["seconds"] |= {phase: round(value, 4) for phase, value in seconds.items()}
        summary["host_share"] = round(seconds["host"] / self.seconds, 4)
        decoded = (stats.num_tokens - self.prompts) / (self.seconds - seconds["prefill"])
        summary["decode_tokens_per_second"] = round(decoded, 3)
        summary["num_draft_tokens"] = stats.num_draft_tokens
        summary["num_accepted_tokens"] = stats.num_accepted_tokens


def summaries(metrics: Mapping[str, RunMetrics]) -> dict[str, dict[str, Any]]:
    """Each configuration's summary, with its speed-ups over the baselines that ran."""
    summaries = {name: one.summary() for name, one in metrics.items()}
    for baseline in (AUTOREGRESSIVE, GENERATE):
        if baseline not in metrics or metrics[baseline].error is not None:
            continue
        baseline_speed = metrics[baseline].tokens_per_second
        for name, one in metrics.items():
            if one.error is None:
                speedup = one.tokens_per_second / baseline_speed
                summaries[name][f"speedup_over_{baseline}"] = round(speedup, 4)
    return summaries


def max_known(left: int | None, right: int | None) -> int | None:
    """The larger number, where None is unknown."""
    return max((value for value in (left, right) if value is not None), default=None)


def _megabytes(size: int | None) -> float | None:
    return None if size is None else round(size / MEGA, 1)
