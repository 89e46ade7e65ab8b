"""Families of samples for Prometheus, read from a state that exists already (hence no registry of counters)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from ditrelay.runtime.meters import BOUNDS, HistogramReading

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Family:
    """One metric with all its samples. ``name`` has the unit as its end, and ``_total`` where it is a counter."""

    def __init__(self, name: str, kind: Literal["counter", "gauge", "histogram"], help: str) -> None:
        self.name = name
        self.metric = Metric(name.removesuffix("_total"), help, kind)

    def add(self, value: float, **labels: object) -> Family:
        """One sample. Returns itself."""
        self._sample("", value, labels)
        return self

    def add_histogram(self, reading: HistogramReading, **labels: object) -> Family:
        """The cumulative buckets, the sum and the count of one histogram. Returns itself."""
        ends = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
        counts = list(accumulate(reading.counts))
        for end, count in zip(ends, counts, strict=True):
            self._sample("_bucket", count, {**labels, "le": end})
        self._sample("_sum", reading.total, labels)
        self._sample("_count", counts[-1], labels)
        return self

    def _sample(self, suffix: str, value: float, labels: dict[str, object]) -> None:
        self.metric.add_sample(self.name + suffix, {name: str(each) for name, each in labels.items()}, value)


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield family.metric


def render(families: Iterable[Family]) -> str:
    """The text that is scraped."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(families)))
    return generate_latest(registry).decode()
