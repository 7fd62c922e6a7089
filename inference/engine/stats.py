"""What a decoding run did: tokens, passes, acceptance per depth, and where the time went."""

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
    """Counted to the end of each answer only: what follows a stop inside a path does not count.

    timing: whether time is measured; off, it costs nothing. On, the device is waited for at the
    end of every phase, which slows a GPU down a little. rows: prompts. tokens: tokens emitted,
    end-of-text included. rounds: target forward passes after the prompt, summed over the rows that
    took part. accepted[d]: rows and rounds in which a guess of depth d + 1 was accepted; tried[d]:
    in which the path had come that far and the tree could go on. guessed: guesses that the target
    read, over all rows and rounds. seconds: time by phase.
    reliability: of the guesses that were read, by how likely the draft held their paths: how many,
    the sum of their probabilities, how many were accepted. Only with timing.
    """

    timing: bool = False
    rows: int = 0
    tokens: int = 0
    rounds: int = 0
    accepted: list[int] = field(default_factory=list)
    tried: list[int] = field(default_factory=list)
    drafted: int = 0
    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    reliability: list[tuple[int, float, int]] = field(default_factory=lambda: [(0, 0.0, 0)] * BINS)
    _device: torch.device | None = None
    _since: float = 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per target forward pass, the free one included; 1 for plain decoding.

        The prompt's pass and the first token, which it gives, are left out of both.
        """
        return (self.tokens - self.rows) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """For each depth, how often a guess was right when all before it were."""
        return [hits / max(tries, 1) for hits, tries in zip(self.accepted, self.tried, strict=True)]

    @property
    def wall(self) -> float:
        """Seconds in all phases together."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second, the prompt's time included; 0 without timing."""
        return self.tokens / self.wall if self.wall else 0.0

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error: how far stated and true shares lie apart, on average."""
        total = sum(count for count, _, _ in self.reliability)
        apart = sum(abs(said - hits) for _, said, hits in self.reliability)
        return round(apart / total, 4) if total else None

    def record_reliability(self, chances: Sequence[float], came: Sequence[bool]) -> None:
        """Guesses that were read: the probability of each path, and whether it was accepted."""
        for chance, true in zip(chances, came, strict=True):
            place = min(int(chance * BINS), BINS - 1)
            count, said, hits = self.reliability[place]
            self.reliability[place] = count + 1, said + chance, hits + true

    def add(self, other: Stats) -> None:
        """Take over what another run did."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.accepted = _added(self.accepted, other.accepted)
        self.tried = _added(self.tried, other.tried)
        self.drafted += other.drafted
        for phase, seconds in other.seconds.items():
            self.seconds[phase] += seconds
        pairs = zip(self.reliability, other.reliability, strict=True)
        self.reliability = [(a + d, b + e, c + f) for (a, b, c), (d, e, f) in pairs]

    def begin(self, rows: int, device: torch.device) -> None:
        """A batch starts."""
        self.rows += rows
        self._device = device
        self._since = time.perf_counter()

    def lap(self, phase: Phase) -> None:
        """What happened since the last lap was `phase`."""
        if not self.timing:
            return
        if self._device is not None and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now

    def pause(self) -> None:
        """The time since the last lap was the caller's, not ours."""
        if self.timing:
            self._since = time.perf_counter()

    def count(
        self, emitted: Sequence[int], drawn: Sequence[int], depth: int | None, drafted: int = 0
    ) -> None:
        """One pass: tokens emitted per row after cutting at a stop, and before; the tree's depth;
        guesses in the trees of all rows.

        depth is None for the prompt's pass.
        """
        self.tokens += sum(emitted)
        self.drafted += drafted
        if depth is None:
            return
        self.rounds += len(emitted)
        missing = depth - len(self.tried)
        self.tried += [0] * missing
        self.accepted += [0] * missing
        for kept, full in zip(emitted, drawn, strict=True):
            drafted = min(kept, full - 1)
            # A path that was cut short says nothing about the depths behind the cut.
            reached = min(drafted + 1, depth) if kept == full else drafted
            for level in range(drafted):
                self.accepted[level] += 1
            for level in range(reached):
                self.tried[level] += 1


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]
