"""What Prometheus reads: the requests that were answered, and what the scheduler does now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from dfssm.runtime import Scheduler

_SECONDS = 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300


class Metrics:
    """The metrics of one application."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler, self._registry = scheduler, CollectorRegistry()
        self._requests = Counter("dfssm_requests", "Answers by status", ["status"], registry=self._registry)
        self._seconds, self._first = (
            Histogram(name, about, buckets=_SECONDS, registry=self._registry)
            for name, about in (
                ("dfssm_request_seconds", "Time of a request for texts, to its end"),
                ("dfssm_first_token_seconds", "Time to the first token of a text"),
            )
        )
        self._registry.register(self)

    def record(self, fields: Mapping[str, Any]) -> None:
        """Count an answer, by the fields of its line in the log."""
        self._requests.labels(fields["status"]).inc()
        if "generated_tokens" in fields:
            self._seconds.observe(fields["seconds"])
            if fields["first_token_seconds"] is not None:
                self._first.observe(fields["first_token_seconds"])

    def collect(self) -> Iterator[Metric]:
        """What the scheduler says, when it is asked."""
        scheduler = self._scheduler
        for name, about, value in (
            ("dfssm_prompt_tokens", "Tokens of prompts that were read", scheduler.read),
            ("dfssm_cached_tokens", "Tokens of prompts that the prefix cache had", scheduler.reused),
            ("dfssm_generated_tokens", "Tokens that were chosen", scheduler.written),
        ):
            yield CounterMetricFamily(name, about, value)
        for name, about, value in (
            ("dfssm_running", "Texts that have a slot", scheduler.running),
            ("dfssm_waiting", "Texts that wait for a slot", scheduler.waiting),
            ("dfssm_prefix_cache_bytes", "Bytes of the states in the prefix cache", scheduler.cache.nbytes),
        ):
            yield GaugeMetricFamily(name, about, value)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)
