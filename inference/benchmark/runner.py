"""How well and how fast a head decodes, beside plain decoding in the same engine.

Every prompt is decoded by every contestant in turn before the next prompt comes, so that a machine
whose speed drifts treats them alike. Figures are sums over all prompts: total tokens by total
passes, total tokens by total seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from headstart.inference.config import SamplingParams, SpeculativeConfig
from headstart.inference.engine.graph_pool import graph_pool
from headstart.inference.engine.loop import decode
from headstart.inference.engine.stats import Stats
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

PLAIN = "plain"


@dataclass
class Result:
    """Sums over the prompts. identical: answers equal to the plain ones, of `prompts`.

    differences: for each unequal answer, its prompt's place and the first place that differs.
    """

    stats: Stats = field(default_factory=lambda: Stats(timing=True))
    prompts: int = 0
    identical: int = 0
    differences: list[tuple[int, int]] = field(default_factory=list)

    def summary(self, baseline: Result | None) -> dict[str, Any]:
        """JSON-ready figures; the speed-up is total tokens by total time over the baseline's."""
        stats = self.stats
        speed = stats.tokens_per_second
        return {
            "prompts": self.prompts,
            "identical": self.identical,
            "tokens": stats.tokens,
            "acceptance_length": round(stats.acceptance_length, 4),
            "acceptance_per_depth": [round(rate, 4) for rate in stats.acceptance],
            "tokens_per_second": round(speed, 2),
            "speedup": round(speed / baseline.stats.tokens_per_second, 4) if baseline else 1.0,
            "seconds": {phase: round(value, 3) for phase, value in stats.seconds.items()},
            "first_differences": self.differences,
        }


def measure(
    target: Target,
    contestants: Mapping[str, SpeculativeConfig],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, Result]:
    """Greedy decoding, one prompt at a time: plain and every contestant, in turn.

    prompts: token ids. report: told how many prompts are done. The first prompt runs once
    unmeasured to warm up.
    """
    results = {name: Result() for name in (PLAIN, *contestants)}
    sampling = SamplingParams(max_new_tokens)
    for name in results:
        _run(target, contestants.get(name), prompts[0], SamplingParams(8), Stats())
    for place, prompt in enumerate(prompts):
        expected: list[int] = []
        # Who goes first changes from prompt to prompt.
        names = list(results)
        turned = [PLAIN, *names[1 + place % max(len(names) - 1, 1) :], *names[1:]]
        for name in dict.fromkeys(turned):
            result = results[name]
            steps = _run(target, contestants.get(name), prompt, sampling, result.stats)
            answer = [token for step in steps for token in step]
            expected = answer if name == PLAIN else expected
            result.prompts += 1
            result.identical += answer == expected
            if answer != expected:
                result.differences.append((place, first_difference(answer, expected)))
        report(place + 1)
    return results


def acceptance_length(
    target: Target,
    head: DraftHead,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    shape: TreeShape | None = None,
    temperature: float = 0.0,
) -> tuple[Stats, list[list[list[int]]]]:
    """Only what the head does, without the plain runs: for checks during training.

    Also each prompt's answer, as the tokens of its steps.
    """
    stats = Stats()
    sampling = SamplingParams(max_new_tokens, temperature)
    one = SpeculativeConfig(head, shape)
    answers = [_run(target, one, prompt, sampling, stats) for prompt in prompts]
    graph_pool(target).forget(head)  # the next check brings another one
    return stats, answers


def _run(
    target: Target,
    speculative: SpeculativeConfig | None,
    prompt: Sequence[int],
    sampling: SamplingParams,
    stats: Stats,
) -> list[list[int]]:
    """The tokens of each step."""
    tokens_BT = torch.tensor([list(prompt)])
    steps = decode(target, tokens_BT, sampling=sampling, speculative=speculative, stats=stats)
    return [emitted[0] for emitted in steps]


def first_difference(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(left), len(right)))
