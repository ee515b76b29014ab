"""Prometheus: the host's truth from any one of its processes, with no multiprocess directory.

    from llm_edge_cache import metrics

    collector = metrics.register(manager)        # or a SharedSlab; in every worker that may be scraped
    ...
    collector.unregister()

Nothing is kept here: each scrape reads the slab, whose sums span all processes that ever attached to it. `series` has
the table of what is exported.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from typing import Final, Protocol

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from llm_edge_cache.errors import SlabClosedError
from llm_edge_cache.regions import Word
from llm_edge_cache.series import BUCKET_BOUNDS_NS, HISTOGRAMS, SERIES, HistogramSeries, Reading, Series
from llm_edge_cache.slab import SharedSlab

__all__ = ["HasSlab", "SlabCollector", "register"]

_log = logging.getLogger("llm_edge_cache")
_FAMILIES: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily}


class HasSlab(Protocol):
    """What the managers are to this module."""

    @property
    def slab(self) -> SharedSlab:
        """The slab of the first tier."""


class SlabCollector(Collector):
    """What is registered for one slab in one registry. Made by `register`."""

    def __init__(self, source: SharedSlab | HasSlab, registry: CollectorRegistry) -> None:
        slab = source if isinstance(source, SharedSlab) else getattr(source, "slab", None)
        if not isinstance(slab, SharedSlab):
            raise TypeError(f"manager_or_slab must be an open manager or a SharedSlab, not {type(source).__name__}")
        self._is_bare = slab is source
        self._slab = slab
        self._registry = weakref.ref(registry)

    @property
    def slab_name(self) -> str:
        """The name of the slab that it reads."""
        return self._slab.name

    def unregister(self) -> None:
        """Export no longer. Does nothing when that has been done, or another registration replaced this one."""
        registry = self._registry()
        if registry is not None:
            _remove(registry, self)

    def describe(self) -> list[Metric]:
        """Return the families without samples, so that registering reads nothing and finds clashes of names."""
        counted: list[Metric] = [_FAMILIES[series.kind](series.name, series.text) for series in SERIES]
        return counted + [HistogramMetricFamily(series.name, series.text) for series in HISTOGRAMS]

    def collect(self) -> list[Metric]:
        """Read the slab. Never raises: a closed or unlinked slab has no samples."""
        try:
            reading = self._read()
        except SlabClosedError:
            reading = None
        except Exception as error:  # the application's other metrics are not to go with it
            _log.warning("slab %r cannot be read for metrics: %r", self.slab_name, error)
            reading = None
        return [] if reading is None else _families(reading)

    def _read(self) -> Reading | None:
        """Everything once; None where no slab is live. Sums never fall, though they need not be of one instant."""
        slab = self._slab
        counters, histograms = slab._counter_sums(), slab._histogram_sums()
        words = {word: slab._word(word) for word in Word}
        mapping = slab._mapping
        # 1. The slab is unlinked: all that was read above is 0. 2. That is shown: every counter seems to be reset.
        # Hence this look afterwards: a mapping that is retired still has no successor.
        if mapping.retired:
            return None
        return Reading(
            is_bare=self._is_bare,
            counters=counters,
            histograms=histograms,
            words=words,
            totals=mapping.totals(),
            config=slab.config,
            now_ns=time.monotonic_ns(),
        )


def register(manager_or_slab: SharedSlab | HasSlab, registry: CollectorRegistry = REGISTRY) -> SlabCollector:
    """Export a cache to Prometheus.

    Args:
        manager_or_slab: a manager that is open, or a slab that is used by itself. With a slab, the hits, misses and
            writes of L1 and the requests are what the slab counted; else, what the managers on it did.
        registry: where. One that exports this slab already takes the new registration for the old.

    Returns:
        The collector; its ``unregister()`` takes it out again.

    Raises:
        TypeError: it is neither.
        ValueError: the registry exports another slab, or another's series of the same names: give this one a registry
            of its own.
    """
    collector = SlabCollector(manager_or_slab, registry)
    with _lock:
        present = _registered.get(registry)
        if present is not None and present.slab_name == collector.slab_name:
            _remove(registry, present)
        try:
            registry.register(collector)
        except ValueError as error:
            raise ValueError(
                f"slab {collector.slab_name!r} cannot be exported here: the registry has series of these names already"
                f"{f', of slab {present.slab_name!r}' if present else ''}; pass a CollectorRegistry of its own"
            ) from error
        _registered[registry] = collector
    return collector


_lock = threading.Lock()
_registered: Final[weakref.WeakKeyDictionary[CollectorRegistry, SlabCollector]] = weakref.WeakKeyDictionary()


def _remove(registry: CollectorRegistry, collector: SlabCollector) -> None:
    try:
        registry.unregister(collector)
    except KeyError:
        _log.debug("the metrics of slab %r had been unregistered", collector.slab_name)


def _families(reading: Reading) -> list[Metric]:
    counted = [_family(series, reading) for series in SERIES]
    return counted + [_histogram_family(series, reading) for series in HISTOGRAMS]


def _family(series: Series, reading: Reading) -> Metric:
    family: CounterMetricFamily | GaugeMetricFamily = _FAMILIES[series.kind](
        series.name, series.text, labels=series.labels
    )
    for labels, source in series.samples:
        value = source(reading)
        if value is not None:
            family.add_metric(labels, value)
    return family


def _histogram_family(series: HistogramSeries, reading: Reading) -> Metric:
    family = HistogramMetricFamily(series.name, series.text, labels=series.labels)
    bounds = [*(repr(bound / series.unit_ns) for bound in BUCKET_BOUNDS_NS), "+Inf"]
    for labels, histogram in series.samples:
        *counts, sum_ns = reading.histograms[histogram]
        buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
        family.add_metric(labels, buckets, sum_ns / series.unit_ns)
    return family
