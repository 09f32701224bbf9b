"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lory.metrics.repetition import seq_rep_n

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SPEEDS = (1, 2.5, 5, 10, 20, 30, 50, 75, 100, 200, 500)
_SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)


class ServerMetrics:
    """The counters of one server; methods may be called from any thread."""

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        self.requests = Counter("lory_requests", "Requests by status.", ["path", "status"], registry=own)
        self.waiting = Gauge("lory_queue_length", "Requests that wait for a place.", registry=own)
        self.running = Gauge("lory_running", "Answers that are being decoded.", registry=own)
        self.tokens_in = Counter("lory_prompt_tokens", "Prompt tokens of the requests begun.", registry=own)
        self.tokens_kept = Counter("lory_kept_tokens", "Those of them known from before.", registry=own)
        self.tokens_out = Counter("lory_answer_tokens", "Tokens of answers.", registry=own)
        self.first_token = Histogram(
            "lory_first_token_seconds", "From a request to its first token.", registry=own, buckets=_SECONDS
        )
        self.speed = Histogram(
            "lory_tokens_per_second", "Speed of each answer after its first token.", registry=own, buckets=_SPEEDS
        )
        self.repetition = Histogram(
            "lory_answer_repetition",
            "Share of 4-grams of an answer's tokens that occurred before in it (seq-rep-4).",
            registry=own,
            buckets=_SHARES,
        )

    def note_answer(self, tokens: Sequence[int], seconds: float) -> None:
        """Count an answer that has ended, with the time since its first token."""
        if len(tokens) > 1 and seconds > 0:
            self.speed.observe((len(tokens) - 1) / seconds)
        if len(tokens) >= 4:
            self.repetition.observe(seq_rep_n(tokens, 4))

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)
