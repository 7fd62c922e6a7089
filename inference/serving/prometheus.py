"""What the server tells Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .openai_api import Usage

LENGTHS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12)
SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """Counts requests and tokens. waiting, running: how many requests do so now."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]):
        self.registry = CollectorRegistry()

        def gauge(name: str, told: str, value: Callable[[], int]) -> None:
            Gauge(f"headstart_{name}", told, registry=self.registry).set_function(value)

        def counter(name: str, told: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"headstart_{name}", told, labels, registry=self.registry)

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"headstart_{name}", told, buckets=buckets, registry=self.registry)

        gauge("queue_length", "Requests that wait for their turn.", waiting)
        gauge("running", "Requests that are being answered.", running)
        self.requests = counter("requests", "Requests by HTTP status.", ("status",))
        self.disconnects = counter("disconnects", "Requests whose client left before the end.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens read in prompts.")
        self.tokens = counter("completion_tokens", "Tokens of answers.")
        self.passes = counter("passes", "Passes of the target behind the prompts.")
        self.accepted = counter("accepted_tokens", "Guesses that became part of an answer.")
        self.rejected = counter("rejected_tokens", "Guesses that were read in vain.")
        self.length = histogram("acceptance_length", "Tokens per pass, by answer.", LENGTHS)
        self.speed = histogram("tokens_per_second", "Decoding speed, by answer.", SPEEDS)
        self.first = histogram(
            "time_to_first_token_seconds", "From a request's arrival, waiting included.", SECONDS
        )
        self.seconds = histogram("decode_seconds", "Time of decoding, by answer.", SECONDS)

    def answered(self, usage: Usage, passes: int, seconds: float) -> None:
        """One answer has ended, or its client has left. passes: behind the prompt's."""
        self.prompt_tokens.inc(usage.prompt)
        self.tokens.inc(usage.completion)
        self.passes.inc(passes)
        self.accepted.inc(usage.accepted)
        self.rejected.inc(usage.rejected)
        self.seconds.observe(seconds)
        if passes:
            self.length.observe((usage.completion - 1) / passes)
        if usage.completion:
            self.speed.observe(usage.completion / seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
