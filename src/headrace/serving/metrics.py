"""Prometheus metrics (docs/metrics.md names them all). Counting a token costs well under a microsecond.

prometheus_client writes the exposition; the counting is done on plain numbers of the event loop's thread,
without its locks.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.errors import RequestTimeout, http_status
from headrace.llm import AsyncEngine, Delta, Generation
from headrace.types import Usage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = ["Counts", "Histogram", "Metrics", "ModelMetrics", "Record"]

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Histogram(msgspec.Struct):
    """Counts by bucket; for one thread."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative counts with their upper bounds, as Prometheus wants them."""
        total, rows = 0, []
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            total += count
            rows.append(("+Inf" if bound is None else f"{float(bound):g}", float(total)))
        return rows


def _seconds() -> Histogram:
    return Histogram(_SECONDS)


def _lengths() -> Histogram:
    return Histogram(_TOKENS)


class ModelMetrics(msgspec.Struct):
    """Everything that is counted for one model."""

    ttft: Histogram = msgspec.field(default_factory=_seconds)
    inter_token: Histogram = msgspec.field(default_factory=_seconds)
    request_seconds: Histogram = msgspec.field(default_factory=_seconds)
    prompt_length: Histogram = msgspec.field(default_factory=_lengths)
    output_length: Histogram = msgspec.field(default_factory=_lengths)
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    aborted_tokens: int = 0
    in_flight: int = 0
    rejected: int = 0
    outcomes: dict[str, int] = {}


class Counts(msgspec.Struct):
    """What one process has counted, or several together.

    Attributes:
        models: by canonical name.
        responses: replies by route and status.
    """

    models: dict[str, ModelMetrics] = {}
    responses: dict[tuple[str, int], int] = {}

    def add(self, other: Counts) -> None:
        """Take another process's counts on top of these."""
        for name, counts in other.models.items():
            mine = self.models.setdefault(name, ModelMetrics())
            for field in msgspec.structs.fields(ModelMetrics):
                setattr(mine, field.name, _sum(getattr(mine, field.name), getattr(counts, field.name)))
        self.responses = _sum(self.responses, other.responses)

    def ended(self) -> None:
        """The process is gone: what it had in flight is no more."""
        for counts in self.models.values():
            counts.in_flight = 0


def _sum(a: Any, b: Any) -> Any:
    """Of two numbers, tallies or histograms."""
    if isinstance(a, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in a | b}
    if isinstance(a, Histogram):
        return Histogram(a.bounds, [x + y for x, y in zip(a.counts, b.counts, strict=True)], a.sum + b.sum)
    return a + b


class Record:
    """One request's way through the counters. Close it exactly once, whatever happened."""

    __slots__ = ("_counted", "_generation", "_last", "_metrics", "_start", "outcome", "ttft", "usage")

    def __init__(self, metrics: ModelMetrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last = 0.0
        self._generation: Generation | None = None
        self.outcome = ""
        self.ttft: float | None = None
        self.usage = Usage()
        metrics.in_flight += 1

    def follow(self, generation: Generation) -> None:
        """Usage comes from this call, also when it ends early."""
        self._generation = generation

    def tokens(self, deltas: Sequence[Delta]) -> None:
        """Something came: the first time it is the time to first token, later a gap between tokens."""
        now = time.perf_counter()
        if self.ttft is None:
            self.ttft = now - self._start
            self._metrics.ttft.observe(self.ttft)
        else:
            self._metrics.inter_token.observe(now - self._last)
        self._last = now
        for delta in deltas:
            if delta.finish_reason is not None:
                self.outcome = delta.finish_reason.value

    def fail(self, error: BaseException) -> None:
        """It ended with an error; a foreign exception (a cancellation) means that the client left."""
        if isinstance(error, (RequestTimeout, TimeoutError)):
            self.outcome = "timeout"
        elif isinstance(error, Exception):
            self.outcome = "invalid" if http_status(error) < 500 else "error"
        else:
            self.outcome = "abort"

    def close(self) -> None:
        """Add this request to the model's counters, partial work included."""
        metrics = self._metrics
        if self._generation is not None:
            self.usage = self._generation.usage
        usage = self.usage
        outcome = self.outcome or "stop"
        metrics.in_flight -= 1
        metrics.outcomes[outcome] = metrics.outcomes.get(outcome, 0) + 1
        metrics.input_tokens += usage.prompt_tokens
        metrics.cached_tokens += usage.cached_tokens
        metrics.output_tokens += usage.completion_tokens
        if outcome in ("abort", "timeout", "error"):
            metrics.aborted_tokens += usage.completion_tokens
        if usage.prompt_tokens:
            metrics.prompt_length.observe(usage.prompt_tokens)
            metrics.output_length.observe(usage.completion_tokens)
        metrics.request_seconds.observe(time.perf_counter() - self._start)


_HISTOGRAMS = (
    ("headrace_time_to_first_token_seconds", "From the request's arrival to its first token.", "ttft"),
    ("headrace_inter_token_seconds", "Between two writes of one request.", "inter_token"),
    ("headrace_request_seconds", "From the request's arrival to its end.", "request_seconds"),
    ("headrace_request_input_tokens", "Prompt tokens of one request.", "prompt_length"),
    ("headrace_request_output_tokens", "Output tokens of one request.", "output_length"),
)
_COUNTERS = (
    ("headrace_input_tokens", "Prompt tokens of requests that reached the engine.", "input_tokens"),
    ("headrace_cached_input_tokens", "Prompt tokens found in the prefix cache.", "cached_tokens"),
    ("headrace_output_tokens", "Tokens sampled, partial work of aborted requests included.", "output_tokens"),
    (
        "headrace_aborted_output_tokens",
        "The part of it that belongs to requests that did not finish.",
        "aborted_tokens",
    ),
    ("headrace_rejected_requests", "Requests refused with 429 because the queue was full.", "rejected"),
)
_ENGINE_COUNTERS = (
    ("headrace_engine_steps", "Forward passes.", "steps"),
    ("headrace_engine_preemptions", "Sequences put back because KV blocks ran out.", "num_preemptions"),
    ("headrace_engine_prefix_queries", "Prompt tokens looked up in the prefix cache.", "prefix_queries"),
    ("headrace_engine_prefix_hits", "Prompt tokens found there.", "prefix_hits"),
    ("headrace_engine_prompt_tokens", "Prompt tokens taken by the core.", "prompt_tokens"),
    ("headrace_engine_output_tokens", "Tokens sampled by the core.", "output_tokens"),
    ("headrace_engine_aborted_tokens", "Tokens sampled for sequences that were aborted.", "aborted_tokens"),
)
_ENGINE_GAUGES = (
    ("headrace_engine_running", "Sequences in the batch.", "num_running"),
    ("headrace_engine_waiting", "Sequences waiting for a place.", "num_waiting"),
    ("headrace_kv_blocks", "KV blocks in all.", "blocks_total"),
    ("headrace_kv_blocks_used", "KV blocks owned by sequences.", "blocks_used"),
    ("headrace_kv_blocks_cached", "KV blocks kept for prefix reuse.", "blocks_cached"),
    ("headrace_engine_step_milliseconds", "Moving average of a whole step.", "step_ms"),
    ("headrace_engine_host_milliseconds", "Moving average of a step's share on the host.", "host_ms"),
)


class Metrics:
    """All counters of one server, and the text that Prometheus reads.

    Args:
        engines: the engines that are loaded now, by canonical name.
    """

    def __init__(self, engines: Callable[[], dict[str, AsyncEngine]]) -> None:
        self.own = Counts()
        self._shown = self.own
        self._engines = engines
        self._registry: CollectorRegistry | None = None

    def model(self, name: str) -> ModelMetrics:
        """Counters of a model, by canonical name."""
        return self.own.models.setdefault(name, ModelMetrics())

    def count_response(self, route: str, status: int) -> None:
        key = (route, status)
        self.own.responses[key] = self.own.responses.get(key, 0) + 1

    def text(self, others: Iterable[Counts] = ()) -> bytes:
        """The exposition in Prometheus' text format; ``others`` have counted in processes beside this one."""
        from prometheus_client import CollectorRegistry, generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(_Source(self))
        self._shown = Counts()
        for counts in (self.own, *others):
            self._shown.add(counts)
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family with its samples."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        shown = self._shown
        for name, text, field in _HISTOGRAMS:
            family: Any = HistogramMetricFamily(name, text, labels=["model"])
            for model, counts in shown.models.items():
                histogram: Histogram = getattr(counts, field)
                family.add_metric([model], histogram.buckets(), histogram.sum)
            yield family
        for name, text, field in _COUNTERS:
            family = CounterMetricFamily(name, text, labels=["model"])
            yield _fill(family, ((m, getattr(counts, field)) for m, counts in shown.models.items()))
        family = GaugeMetricFamily(
            "headrace_requests_in_flight", "Admitted and not answered.", labels=["model"]
        )
        yield _fill(family, ((m, counts.in_flight) for m, counts in shown.models.items()))
        family = CounterMetricFamily(
            "headrace_requests", "Requests by how they ended.", labels=["model", "outcome"]
        )
        for model, counts in shown.models.items():
            for outcome, count in counts.outcomes.items():
                family.add_metric([model, outcome], count)
        yield family
        family = CounterMetricFamily(
            "headrace_http_responses", "Replies by route and status.", labels=["route", "status"]
        )
        for (route, status), count in shown.responses.items():
            family.add_metric([route, str(status)], count)
        yield family
        yield from self._collect_engines(CounterMetricFamily, GaugeMetricFamily)

    def _collect_engines(self, counter: Any, gauge: Any) -> Iterator[Metric]:
        engines = self._engines()
        stats = {name: engine.client.stats for name, engine in engines.items()}
        for kind, rows in ((counter, _ENGINE_COUNTERS), (gauge, _ENGINE_GAUGES)):
            for name, text, field in rows:
                family = kind(name, text, labels=["model"])
                yield _fill(family, ((model, getattr(one, field)) for model, one in stats.items()))
        family = gauge("headrace_kv_usage_ratio", "Share of KV blocks owned by sequences.", labels=["model"])
        yield _fill(
            family, ((m, s.blocks_used / s.blocks_total if s.blocks_total else 0.0) for m, s in stats.items())
        )
        family = gauge("headrace_engine_healthy", "1 while the step loop makes progress.", labels=["model"])
        yield _fill(
            family, ((m, engine.health().status in ("ok", "draining")) for m, engine in engines.items())
        )


def _fill(family: Any, rows: Iterable[tuple[str, float]]) -> Any:
    for model, value in rows:
        family.add_metric([model], float(value))
    return family


class _Source:
    """prometheus_client's idea of a collector."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Metric]:
        return self._metrics.collect()
