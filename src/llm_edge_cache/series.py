"""What is exported to Prometheus: every series, as data. `metrics` reads the slab for them.

Counters come from the records that all processes of the host keep in the slab, the dead ones too, so any one process
tells the host's truth.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

from llm_edge_cache.native import native
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["BUCKET_BOUNDS_NS", "HISTOGRAMS", "SERIES", "VERSION", "HistogramSeries", "Reading", "Series"]

_NS_PER_SECOND: Final = 1_000_000_000
_NS_PER_MS: Final = 1_000_000
_BREAKER_OPEN: Final = 1024
"""Word.BREAKER counts failures below this, and is a time from here on."""

BUCKET_BOUNDS_NS: Final = tuple(250 << bucket for bucket in range(30))
"""Upper bounds of a histogram's buckets; one more bucket holds what is longer."""


class Reading(NamedTuple):
    """All that one scrape reads."""

    is_bare: bool
    """The slab is used by itself, without a manager."""
    counters: tuple[int, ...]
    """Sums by `Counter`."""
    histograms: tuple[tuple[int, ...], ...]
    """By `Histogram`: counts of the buckets, not cumulative, and at the end the sum in ns."""
    words: Mapping[Word, int]
    totals: Mapping[str, int]
    """The slab's own sums."""
    config: SlabConfig
    now_ns: int
    """CLOCK_MONOTONIC, after the words were read."""


Source = Callable[[Reading], "float | None"]
"""Takes a sample's value; None: there is none yet, so no sample."""


class Series(NamedTuple):
    """One family of counters or gauges."""

    name: str
    kind: Literal["counter", "gauge"]
    text: str
    labels: tuple[str, ...]
    samples: tuple[tuple[tuple[str, ...], Source], ...]
    """Values of the labels, and where the sample's value comes from."""


class HistogramSeries(NamedTuple):
    """One family of histograms."""

    name: str
    text: str
    labels: tuple[str, ...]
    samples: tuple[tuple[tuple[str, ...], Histogram], ...]
    unit_ns: int
    """What the name says the bounds and the sum are in."""


def _count(counter: Counter) -> Source:
    return lambda reading: reading.counters[counter]


def _total(field: str) -> Source:
    return lambda reading: reading.totals[field]


def _l1(counter: Counter, field: str) -> Source:
    """What the manager counted; without one, what the slab did."""
    return lambda reading: reading.totals[field] if reading.is_bare else reading.counters[counter]


def _requests(reading: Reading) -> float:
    """Every request looks into L1 first, and once."""
    totals, counters = reading.totals, reading.counters
    if reading.is_bare:
        return totals["hits"] + totals["misses"]
    return counters[Counter.L1_HITS] + counters[Counter.L1_MISSES]


def _l2_size(word: Word) -> Source:
    return lambda reading: reading.words[word] if reading.words[Word.L2_SIZED_AT] else None


def _age(word: Word) -> Source:
    """Seconds since a time that a word holds."""
    return lambda reading: (
        max(reading.now_ns - reading.words[word], 0) / _NS_PER_SECOND if reading.words[word] else None
    )


def _version() -> str:
    try:
        return importlib.metadata.version("llm-edge-cache")
    except importlib.metadata.PackageNotFoundError:  # run from sources that were never installed
        return "unknown"


VERSION: Final = _version()
"""Of this package."""


def _counter(name: str, text: str, source: Source) -> Series:
    return Series(name, "counter", text, (), (((), source),))


def _counters(name: str, text: str, label: str, counters: Mapping[str, Counter]) -> Series:
    return Series(name, "counter", text, (label,), tuple(((value,), _count(c)) for value, c in counters.items()))


def _gauge(name: str, text: str, source: Source) -> Series:
    return Series(name, "gauge", text, (), (((), source),))


def _tiers(name: str, kind: Literal["counter", "gauge"], text: str, l1: Source, l2: Source) -> Series:
    return Series(name, kind, text, ("tier",), ((("l1",), l1), (("l2",), l2)))


_L2_ERRORS: Final = {
    "timeout": Counter.L2_ERROR_TIMEOUT,
    "connection": Counter.L2_ERROR_CONNECTION,
    "auth": Counter.L2_ERROR_AUTH,
    "oom": Counter.L2_ERROR_OOM,
    "readonly": Counter.L2_ERROR_READONLY,
    "loading": Counter.L2_ERROR_LOADING,
    "cluster": Counter.L2_ERROR_CLUSTER,
    "response": Counter.L2_ERROR_RESPONSE,
}

_TRAFFIC: Final = (
    _counter("llm_edge_requests_total", "Requests looked up in the cache.", _requests),
    _tiers(
        "llm_edge_cache_hits_total",
        "counter",
        "Look-ups that the tier answered.",
        _l1(Counter.L1_HITS, "hits"),
        _count(Counter.L2_HITS),
    ),
    _tiers(
        "llm_edge_cache_misses_total",
        "counter",
        "Look-ups that the tier could not answer; errors are counted apart.",
        _l1(Counter.L1_MISSES, "misses"),
        _count(Counter.L2_MISSES),
    ),
    _tiers(
        "llm_edge_cache_writes_total",
        "counter",
        "Values stored in the tier.",
        _l1(Counter.L1_WRITES, "sets"),
        _count(Counter.L2_WRITES),
    ),
    Series(
        "llm_edge_cache_errors_total",
        "counter",
        "Operations that failed, by reason; busy: a lock's holder was stopped.",
        ("tier", "reason"),
        (
            (("l1", "busy"), _total("busy")),
            *((("l2", reason), _count(counter)) for reason, counter in _L2_ERRORS.items()),
        ),
    ),
    _counters(
        "llm_edge_cache_bad_values_total",
        "Stored bytes that did not decode; each was a miss, and was deleted.",
        "reason",
        {
            "truncated": Counter.BAD_TRUNCATED,
            "format": Counter.BAD_FORMAT,
            "checksum": Counter.BAD_CHECKSUM,
            "compression": Counter.BAD_COMPRESSION,
            "content": Counter.BAD_CONTENT,
        },
    ),
)

_SLAB: Final = (
    _tiers(
        "llm_edge_cache_size_entries",
        "gauge",
        "Entries in the tier; of L2 an estimate.",
        _total("entries"),
        _l2_size(Word.L2_ENTRIES),
    ),
    _tiers(
        "llm_edge_cache_memory_bytes",
        "gauge",
        "Memory that the tier's entries occupy; of L2 an estimate.",
        _total("used_bytes"),
        _l2_size(Word.L2_BYTES),
    ),
    _gauge(
        "llm_edge_cache_limit_entries", "Entries that L1 holds at most.", lambda reading: reading.config.max_entries
    ),
    _gauge(
        "llm_edge_cache_limit_bytes",
        "Size of L1's segment, tables included.",
        lambda reading: reading.config.memory_bytes,
    ),
    _counter("llm_edge_cache_evictions_total", "L1 entries evicted to make room.", _total("evictions")),
    _counter("llm_edge_cache_expirations_total", "L1 entries whose life was over.", _total("expirations")),
    _counter(
        "llm_edge_cache_admission_rejections_total",
        "L1 newcomers that were asked for less than what they would have displaced.",
        _total("admission_rejections"),
    ),
    _counter(
        "llm_edge_cache_refusals_total", "Values that the slab found too large or no memory for.", _total("refusals")
    ),
    _counters(
        "llm_edge_cache_l1_writes_refused_total",
        "Values of the manager that L1 did not keep; fenced: an invalidation had overtaken them.",
        "reason",
        {"slab": Counter.L1_REFUSED, "fenced": Counter.L1_FENCED},
    ),
    _counter(
        "llm_edge_cache_recoveries_total",
        "Shards rebuilt after a process died holding their lock.",
        _total("recoveries"),
    ),
    _counter(
        "llm_edge_cache_shards_cleared_total",
        "Shards emptied because a rebuild was not safe.",
        _total("shards_cleared"),
    ),
    _gauge("llm_edge_cache_attached_processes", "Live processes attached to the slab.", _total("attached_processes")),
    _gauge(
        "llm_edge_cache_window_share",
        "Share of L1 that the admission window has, 0 to 1, the mean of the shards.",
        lambda reading: reading.totals["window_ppm"] / 1e6,
    ),
)

_FLIGHTS: Final = (
    _counter("llm_edge_cache_computations_total", "Calls of the provider.", _count(Counter.COMPUTATIONS)),
    _counter(
        "llm_edge_cache_compute_errors_total", "Calls of the provider that failed.", _count(Counter.COMPUTE_ERRORS)
    ),
    _counter(
        "llm_edge_cache_coalesced_total",
        "Callers served by a computation they did not start.",
        _count(Counter.COALESCED),
    ),
    _counter(
        "llm_edge_cache_takeovers_total",
        "Computations taken over from a process that died or was stopped.",
        _count(Counter.TAKEOVERS),
    ),
    _counter(
        "llm_edge_cache_flights_lost_total",
        "Computations that were taken over before they ended; their values were not stored.",
        _count(Counter.FLIGHTS_LOST),
    ),
    _counter(
        "llm_edge_cache_uncoordinated_total",
        "Computations that nobody else could wait for: no flight record was free.",
        _count(Counter.UNCOORDINATED),
    ),
    _counters(
        "llm_edge_cache_stale_served_total",
        "Expired values served: while revalidated, or because the provider failed.",
        "reason",
        {"revalidate": Counter.STALE_REVALIDATE, "error": Counter.STALE_ERROR},
    ),
    _counters(
        "llm_edge_cache_tokens_saved_total",
        "Tokens of answers that came from the cache.",
        "kind",
        {"prompt": Counter.PROMPT_TOKENS_SAVED, "completion": Counter.COMPLETION_TOKENS_SAVED},
    ),
    _counter(
        "llm_edge_cache_seconds_saved_total",
        "Time that the computations of served values had taken.",
        lambda reading: reading.counters[Counter.MICROSECONDS_SAVED] / 1e6,
    ),
)

_INVALIDATION: Final = (
    _counters(
        "llm_edge_cache_invalidations_total",
        "Invalidations by kind; remote: other hosts', applied here.",
        "kind",
        {
            "key": Counter.INVALIDATED_KEYS,
            "tag": Counter.INVALIDATED_TAGS,
            "all": Counter.INVALIDATED_ALL,
            "remote": Counter.INVALIDATED_REMOTE,
        },
    ),
    _counter(
        "llm_edge_cache_tag_expired_total",
        "L1 entries found whose tag had been invalidated.",
        _count(Counter.L1_EXPIRED_TAGS),
    ),
    _counter(
        "llm_edge_cache_stream_flushes_total",
        "L1 cleared because invalidations may have been missed.",
        _count(Counter.STREAM_FLUSHES),
    ),
    _counter(
        "llm_edge_cache_unverified_total",
        "L1 entries checked against L2 because the invalidation stream was out of contact.",
        _count(Counter.UNVERIFIED),
    ),
    _gauge(
        "llm_edge_cache_stream_contact_age_seconds",
        "Time since all invalidations up to then had been applied.",
        _age(Word.CONTACT),
    ),
)

_REDIS: Final = (
    _counter(
        "llm_edge_cache_l2_skipped_total",
        "Look-ups that did not ask Redis, out of caution.",
        _count(Counter.L2_SKIPPED),
    ),
    _counters(
        "llm_edge_cache_writes_dropped_total",
        "Deferred writes to Redis that were given up.",
        "reason",
        {
            "queue_full": Counter.DROPPED_QUEUE_FULL,
            "unavailable": Counter.DROPPED_UNAVAILABLE,
            "fenced": Counter.DROPPED_FENCED,
            "late": Counter.DROPPED_LATE,
        },
    ),
    _gauge(
        "llm_edge_cache_breaker_open",
        "1 while Redis is left alone after failures, else 0.",
        lambda reading: float(reading.words[Word.BREAKER] >= _BREAKER_OPEN),
    ),
    _counter(
        "llm_edge_cache_breaker_opened_total", "How often Redis began to be left alone.", _count(Counter.BREAKER_OPENED)
    ),
    _gauge("llm_edge_cache_l2_size_age_seconds", "Time since L2's size was sampled.", _age(Word.L2_SIZED_AT)),
)

_BUILD: Final = Series(
    "llm_edge_cache_build_info",
    "gauge",
    "1; its labels tell the version and that of the segment's layout.",
    ("version", "layout"),
    (((VERSION, str(native.LAYOUT_VERSION)), lambda _: 1),),
)

SERIES: Final[tuple[Series, ...]] = (*_TRAFFIC, *_SLAB, *_FLIGHTS, *_INVALIDATION, *_REDIS, _BUILD)
"""All counters and gauges."""

HISTOGRAMS: Final = (
    HistogramSeries(
        "llm_edge_cache_latency_ms",
        "Duration of look-ups in milliseconds.",
        ("tier",),
        ((("l1",), Histogram.L1), (("l2",), Histogram.L2)),
        _NS_PER_MS,
    ),
    HistogramSeries(
        "llm_edge_cache_compute_seconds", "Duration of computations.", (), (((), Histogram.COMPUTE),), _NS_PER_SECOND
    ),
    HistogramSeries(
        "llm_edge_cache_wait_seconds", "Waits for another's computation.", (), (((), Histogram.WAIT),), _NS_PER_SECOND
    ),
)
"""All histograms."""
