"""The server's Prometheus metrics, named as vLLM's. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .openai_api import Usage

ACCEPTANCE_LENGTHS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12)
TOKENS_PER_SECOND = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """Counts requests and tokens.

    num_waiting, num_running: return the number of requests in that state now.
    """

    def __init__(self, num_waiting: Callable[[], int], num_running: Callable[[], int]):
        self.registry = CollectorRegistry()

        def gauge(name: str, help: str, value: Callable[[], int]) -> None:
            Gauge(f"headstart_{name}", help, registry=self.registry).set_function(value)

        def counter(name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"headstart_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"headstart_{name}", help, buckets=buckets, registry=self.registry)

        gauge("num_requests_waiting", "Requests in the queue.", num_waiting)
        gauge("num_requests_running", "Requests being decoded.", num_running)
        self.http_requests = counter("http_requests", "HTTP requests by status.", ("status",))
        self.client_disconnects = counter(
            "client_disconnects", "Requests whose client disconnected before the end."
        )
        self.prompt_tokens = counter("prompt_tokens", "Prefilled prompt tokens.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.decode_steps = counter("decode_steps", "Target forward passes after the prefill.")
        self.num_draft_tokens = counter("spec_decode_num_draft_tokens", "Verified draft tokens.")
        self.num_accepted_tokens = counter(
            "spec_decode_num_accepted_tokens", "Accepted draft tokens."
        )
        self.acceptance_length = histogram(
            "spec_decode_acceptance_length",
            "Tokens per decode step, per request.",
            ACCEPTANCE_LENGTHS,
        )
        self.tokens_per_second = histogram(
            "request_tokens_per_second",
            "Generated tokens per second of inference, per request.",
            TOKENS_PER_SECOND,
        )
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to its first token, queueing included.",
            SECONDS,
        )
        self.inference_time = histogram(
            "request_inference_time_seconds", "Prefill and decoding time per request.", SECONDS
        )

    def observe_request(self, usage: Usage, decode_steps: int, seconds: float) -> None:
        """Add a request that finished, or whose client disconnected.

        decode_steps: target forward passes after the prefill. seconds: prefill and decoding.
        """
        self.prompt_tokens.inc(usage.prompt)
        self.generation_tokens.inc(usage.completion)
        self.decode_steps.inc(decode_steps)
        self.num_draft_tokens.inc(usage.accepted + usage.rejected)
        self.num_accepted_tokens.inc(usage.accepted)
        self.inference_time.observe(seconds)
        if decode_steps:
            self.acceptance_length.observe((usage.completion - 1) / decode_steps)
        if usage.completion:
            self.tokens_per_second.observe(usage.completion / seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
