"""What `/metrics` tells Prometheus. Counters grow on the engine's thread; reading them needs no lock."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from shoal.engine import LLM, Stats

if TYPE_CHECKING:
    from shoal.server.errors import ApiError
    from shoal.server.worker import EngineWorker

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """A bucket's bound belongs to it, as Prometheus has it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        out, reached = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            reached += count
            out.append(("+Inf" if bound == float("inf") else str(bound), float(reached)))
        return out


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.queue_seconds = Histogram(SECONDS)
        self.first_token_seconds = Histogram(SECONDS)
        self.inter_token_seconds = Histogram(TOKEN_SECONDS)
        self.request_seconds = Histogram(SECONDS)
        self.ended: Counter[str] = Counter()  # by finish reason, of each answer
        self.refused: Counter[str] = Counter()  # by error code, of each request
        self.cancelled = 0
        self.counts: Counter[str] = Counter()
        self.machine_seconds = 0.0

    def count_refused(self, error: ApiError) -> None:
        self.refused[error.code or str(error.status)] += 1

    def add_whole(self, stats: Stats, *, waited: float) -> None:
        """The times of an answer's tokens, from what the engine measured of all of them together."""
        if stats.completion_tokens:
            self.first_token_seconds.add(waited + stats.prompt_seconds)
            others = stats.completion_tokens - 1
            if others:
                self.inter_token_seconds.add(stats.decode_seconds / others, others)

    def add_answer(self, stats: Stats, reason: str, *, waited: float, seconds: float) -> None:
        """An answer is complete. `waited`: for a place in front of the engine; `seconds`: since it was asked for."""
        self.ended[reason] += 1
        self.queue_seconds.add(waited + stats.queue_seconds)
        self.request_seconds.add(seconds)
        self.counts["prompt"] += stats.prompt_tokens
        self.counts["cached"] += stats.cached_tokens
        self.counts["generated"] += stats.completion_tokens
        self.counts["drafted"] += stats.drafted
        self.counts["accepted"] += stats.accepted
        self.machine_seconds += stats.machine_seconds

    def text(self, worker: EngineWorker, price_per_hour: float | None) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Families(self, worker, price_per_hour))
        return generate_latest(registry)


class _Families:
    """One reading, as prometheus_client wants it."""

    def __init__(self, metrics: Metrics, worker: EngineWorker, price_per_hour: float | None) -> None:
        self._metrics = metrics
        self._worker = worker
        self._price = price_per_hour

    def collect(self) -> Iterator[Any]:
        worker, metrics = self._worker, self._metrics
        yield _gauge("requests_running", "Requests whose answers are being written.", worker.num_running)
        yield _gauge("requests_waiting", "Requests that wait for a place.", worker.num_waiting)
        if worker.state == "ready":
            yield from _engine(worker.engine())
        yield from self._counters()
        for name, text in (
            ("queue_seconds", "From a request's arrival to its first step."),
            ("first_token_seconds", "From a request's arrival to its first token."),
            ("inter_token_seconds", "Between neighbouring tokens of an answer."),
            ("request_seconds", "From a request's arrival to the end of its answer."),
        ):
            histogram: Histogram = getattr(metrics, name)
            yield HistogramMetricFamily(f"shoal_{name}", text, buckets=histogram.buckets(), sum_value=histogram.total)

    def _counters(self) -> Iterator[Any]:
        metrics = self._metrics
        for name, text, label, counts in (
            ("answers", "Complete answers by finish reason.", "reason", metrics.ended),
            ("requests_refused", "Requests that ended in an error, by its code.", "code", metrics.refused),
        ):
            family = CounterMetricFamily(f"shoal_{name}", text, labels=[label])
            for value, count in list(counts.items()):
                family.add_metric([value], count)
            yield family
        counted = metrics.counts
        numbers: tuple[tuple[str, str, float], ...] = (
            ("requests_cancelled", "Requests whose client left before the end.", metrics.cancelled),
            ("prompt_tokens", "Tokens of prompts.", counted["prompt"]),
            ("generation_tokens", "Tokens written.", counted["generated"]),
            ("prefix_cache_queries", "Tokens of prompts that were looked up in the cache.", counted["prompt"]),
            ("prefix_cache_hits", "Tokens of prompts that the cache had.", counted["cached"]),
            ("draft_tokens", "Tokens guessed ahead.", counted["drafted"]),
            ("draft_tokens_accepted", "Guessed tokens that the model confirmed.", counted["accepted"]),
            ("machine_seconds", "Time of the engine's steps that complete answers took.", metrics.machine_seconds),
        )
        for title, text, number in numbers:
            yield CounterMetricFamily(f"shoal_{title}", text, value=number)
        if self._price is not None:
            cost = metrics.machine_seconds * self._price / 3600
            yield CounterMetricFamily("shoal_cost_usd", "What those seconds cost at the machine's price.", value=cost)


def _engine(llm: LLM) -> Iterator[Any]:
    load = llm.load
    yield _gauge("cache_usage_ratio", "Share of the cache's pages in use.", load.pages_in_use / load.pages)
    if llm.expert_load is not None:
        family = GaugeMetricFamily(
            "shoal_expert_load_imbalance",
            "Busiest expert over the mean one, by a sample.",
            labels=["layer"],
        )
        for layer, ratio in llm.expert_load.imbalance().items():
            family.add_metric([str(layer)], ratio)
        yield family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"shoal_{name}", text, value=value)
