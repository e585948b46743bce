"""What /metrics shows, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from teal_cli.inference.generate import Stats
from teal_cli.serve.engine import Engine

_FIRST_TOKEN_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_TOKENS_PER_S = (1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500)


class Metrics:
    """Counts of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        """Start at nothing; queue and memory are the engine's own to say."""
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "teal_requests", "Requests by route and status", ("route", "status"), registry=registry
        )
        self._prompt = Counter("teal_prompt_tokens", "Tokens of prompts", registry=registry)
        self._reused = Counter(
            "teal_prompt_tokens_reused", "Of these, found in the cache", registry=registry
        )
        self._new = Counter("teal_new_tokens", "Tokens of answers", registry=registry)
        self._first = Histogram(
            "teal_first_token_seconds",
            "From the beginning of the prompt to the first token",
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._speed = Histogram(
            "teal_tokens_per_second",
            "Speed of decoding, an answer",
            buckets=_TOKENS_PER_S,
            registry=registry,
        )
        self._sparsity = Gauge(
            "teal_realised_sparsity", "Share of weights that the last answer skipped",
            registry=registry,
        )  # fmt: skip
        for name, text, value in (
            ("teal_requests_waiting", "Requests in the queue", lambda: engine.waiting),
            ("teal_requests_running", "Requests being answered", lambda: int(engine.running)),
            (
                "teal_prefix_cache_bytes",
                "Keys and values of conversations beside the present one",
                lambda: engine.prefix_bytes,
            ),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def count(self, route: str, status: int, stats: Stats | None) -> None:
        """Count a request that was answered, with what its answer cost."""
        self._requests.labels(route, str(status)).inc()
        if stats is None:
            return
        self._prompt.inc(stats.prompt_tokens)
        self._reused.inc(stats.reused_tokens)
        self._new.inc(stats.new_tokens)
        self._sparsity.set(stats.realised_sparsity or 0.0)
        if stats.new_tokens:
            self._first.observe(stats.time_to_first_token_s)
        if stats.tokens_per_s is not None:
            self._speed.observe(stats.tokens_per_s)

    def page(self) -> bytes:
        """The text of the page."""
        return generate_latest(self._registry)
