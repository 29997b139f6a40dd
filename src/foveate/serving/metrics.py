"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's figures, in a registry of its own."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "foveate_requests", "Answered requests.", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "foveate_request_seconds", "From request to end of answer, chat completions.",
            registry=registry, buckets=SECONDS,
        )  # fmt: skip
        self.tokens = Counter(
            "foveate_tokens", "Of answered prompts and of answers.", ["kind"], registry=registry
        )
        self.batches = Histogram(
            "foveate_batch_size", "Requests that went through the model together.",
            registry=registry, buckets=SIZES,
        )  # fmt: skip
        self.cancelled = Counter(
            "foveate_cancelled", "Requests whose client went away.", registry=registry
        )
        queue = Gauge("foveate_queue_length", "Requests that wait.", registry=registry)
        queue.set_function(waiting)
