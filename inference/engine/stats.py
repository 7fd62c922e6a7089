"""Statistics of decoding: tokens, forward passes, acceptance per position, and time by phase."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import torch

Phase = Literal["prefill", "draft", "verify", "host"]
BINS = 10  # of equal width, for calibration
PHASES: tuple[Phase, ...] = ("prefill", "draft", "verify", "host")


@dataclass
class Stats:
    """Sums over decoding runs. Tokens after a stop inside an accepted path do not count.

    timing: measure time and reliability. The device is then waited for at the end of every phase,
        which slows a GPU down a little.
    num_sequences: prompts.
    num_tokens: emitted, end-of-sequence tokens included.
    num_steps: forward passes of the target after the prefill, for each sequence in them.
    num_draft_tokens: verified by the target.
    accepted_per_position[k]: accepted draft tokens at position k + 1 of a draft.
    tried_per_position[k]: steps in which the tree was that deep and all positions before were
        accepted.
    seconds: by phase.
    reliability: for each bin of the draft's path probabilities: how many verified draft tokens,
        the sum of their probabilities, and how many were accepted.
    """

    timing: bool = False
    num_sequences: int = 0
    num_tokens: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    tried_per_position: list[int] = field(default_factory=list)
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    reliability: list[tuple[int, float, int]] = field(default_factory=lambda: [(0, 0.0, 0)] * BINS)
    _device: torch.device | None = None
    _since: float = 0.0

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_per_position)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens per verify pass, the bonus token included; 1 for autoregressive decoding.

        The prefill and the first token, which it emits, are left out of both.
        """
        return (self.num_tokens - self.num_sequences) / self.num_steps if self.num_steps else 0.0

    @property
    def acceptance_rates(self) -> list[float]:
        """Acceptance rate per position, given that all positions before were accepted."""
        pairs = zip(self.accepted_per_position, self.tried_per_position, strict=True)
        return [accepted / max(tried, 1) for accepted, tried in pairs]

    @property
    def total_seconds(self) -> float:
        """Seconds in all phases together."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second, the prefill included; 0 without timing."""
        return self.num_tokens / self.total_seconds if self.total_seconds else 0.0

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error of the draft's path probabilities; None: nothing recorded."""
        total = sum(count for count, _, _ in self.reliability)
        apart = sum(abs(stated - accepted) for _, stated, accepted in self.reliability)
        return round(apart / total, 4) if total else None

    def record_reliability(self, probabilities: Sequence[float], accepted: Sequence[bool]) -> None:
        """Record the path probability of verified draft tokens, and whether each was accepted."""
        for probability, was_accepted in zip(probabilities, accepted, strict=True):
            place = min(int(probability * BINS), BINS - 1)
            count, stated, number = self.reliability[place]
            self.reliability[place] = count + 1, stated + probability, number + was_accepted

    def add(self, other: Stats) -> None:
        """Add the sums of another run."""
        self.num_sequences += other.num_sequences
        self.num_tokens += other.num_tokens
        self.num_steps += other.num_steps
        self.num_draft_tokens += other.num_draft_tokens
        self.accepted_per_position = _sum(self.accepted_per_position, other.accepted_per_position)
        self.tried_per_position = _sum(self.tried_per_position, other.tried_per_position)
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        pairs = zip(self.reliability, other.reliability, strict=True)
        self.reliability = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in pairs]

    def begin(self, sequences: int, device: torch.device) -> None:
        """A batch starts."""
        self.num_sequences += sequences
        self._device = device
        self._since = time.perf_counter()

    def lap(self, phase: Phase) -> None:
        """Add the time since the last lap to a phase."""
        if not self.timing:
            return
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now

    def pause(self) -> None:
        """Leave out the time since the last lap, which was the caller's."""
        if self.timing:
            self._since = time.perf_counter()

    def count(
        self, kept: Sequence[int], sampled: Sequence[int], depth: int | None, draft_tokens: int = 0
    ) -> None:
        """Count a forward pass.

        kept, sampled: tokens per sequence, after and before cutting at a stop.
        depth: of the verified trees; None: this was the prefill.
        draft_tokens: verified over all sequences.
        """
        self.num_tokens += sum(kept)
        self.num_draft_tokens += draft_tokens
        if depth is None:
            return
        self.num_steps += len(kept)
        missing = depth - len(self.tried_per_position)
        self.tried_per_position += [0] * missing
        self.accepted_per_position += [0] * missing
        for count, full in zip(kept, sampled, strict=True):
            accepted = min(count, full - 1)
            # A path that was cut short tells nothing about positions after the cut.
            tried = min(accepted + 1, depth) if count == full else accepted
            for position in range(accepted):
                self.accepted_per_position[position] += 1
            for position in range(tried):
                self.tried_per_position[position] += 1


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]
