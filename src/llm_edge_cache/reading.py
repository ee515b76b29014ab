"""One look at a slab's figures, and what those who watch it (`stats`, `top`, the gateway's dashboard) make of them."""

from __future__ import annotations

import heapq
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llm_edge_cache.breaker import OPEN_FROM
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.series import BUCKET_BOUNDS_NS
from llm_edge_cache.slabconfig import SlabConfig

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = [
    "SCAN_END",
    "Look",
    "Process",
    "breaker_text",
    "largest",
    "latency",
    "look",
    "quantile",
    "ratio",
    "scan_frequencies",
]

SCAN_END: Final = (1 << 64) - 1
"""Where a scan has seen the whole slab."""

_NS: Final = 1e9
_SCAN_SECONDS: Final = 0.01
_SCAN_BUCKETS: Final = 64


class Process(NamedTuple):
    """What one process asked the slab for."""

    pid: int
    """0: processes that had no record of their own."""
    is_alive: bool
    hits: int
    misses: int


class Look(NamedTuple):
    """All figures, read one after another."""

    at: float
    """time.monotonic()"""
    totals: dict[str, int]
    counters: tuple[int, ...]
    histograms: tuple[tuple[int, ...], ...]
    words: dict[Word, int]
    processes: tuple[Process, ...]
    config: SlabConfig

    @property
    def is_bare(self) -> bool:
        """The slab is used by itself: no manager ever counted a look-up on it."""
        return not (self.counters[Counter.L1_HITS] or self.counters[Counter.L1_MISSES])

    @property
    def lookups(self) -> tuple[int, int]:
        """L1's hits and misses: the manager's, or, without one, the slab's."""
        if self.is_bare:
            return self.totals["hits"], self.totals["misses"]
        return self.counters[Counter.L1_HITS], self.counters[Counter.L1_MISSES]

    @property
    def writes(self) -> int:
        """Values stored in L1."""
        return self.totals["sets"] if self.is_bare else self.counters[Counter.L1_WRITES]


def look(slab: SharedSlab, *, guests: int = 0) -> Look:
    """Read all figures of a slab.

    Args:
        slab: which.
        guests: how many of the attached processes only watch, and are not to be counted.
    """
    config, mapping = slab.config, slab._mapping
    totals = mapping.totals()
    totals["attached_processes"] = max(totals["attached_processes"] - guests, 0)
    return Look(
        time.monotonic(),
        totals,
        slab._counter_sums(),
        slab._histogram_sums(),
        {word: slab._word(word) for word in Word},
        tuple(Process(*row) for row in mapping.processes()),
        config,
    )


def scan_frequencies(slab: SharedSlab, cursor: int) -> tuple[int, dict[bytes, int]]:
    """Look at the next piece of a slab for how often its keys were asked for, for 10 ms of one core.

    Args:
        slab: which.
        cursor: 0 to begin, then what the last call returned; any number of 64 bits is harmless.

    Returns:
        The next cursor, `SCAN_END` once all was seen, and estimates by key. Small slabs are seen whole each time.
    """
    deadline = time.monotonic() + _SCAN_SECONDS
    found: dict[bytes, int] = {}
    while True:
        cursor, rows = slab._scan_step(cursor, _SCAN_BUCKETS, b"")
        found.update((key, frequency) for key, _, _, _, frequency in rows)
        if cursor == SCAN_END or time.monotonic() >= deadline:
            return cursor, found


def largest(frequencies: dict[bytes, int], count: int) -> list[tuple[bytes, int]]:
    """Return the keys that were asked for most, the hottest first."""
    return heapq.nsmallest(count, frequencies.items(), key=lambda pair: (-pair[1], pair[0]))


def ratio(hits: int, misses: int) -> float | None:
    """Return hits out of all; None where there were none."""
    return hits / (hits + misses) if hits + misses else None


def quantile(counts: tuple[int, ...], share: float) -> float | None:
    """Return the bound, in seconds, of the bucket in which a share of the observations is reached; None without any.

    Args:
        counts: of the buckets, and at the end the sum in ns.
        share: 0 to 1.
    """
    *buckets, _ = counts
    wanted, seen = share * sum(buckets), 0
    if not wanted:
        return None
    for at, count in enumerate(buckets):
        seen += count
        if seen >= wanted:
            return BUCKET_BOUNDS_NS[min(at, len(BUCKET_BOUNDS_NS) - 1)] / _NS
    return None


def latency(counts: tuple[int, ...]) -> dict[str, Any] | None:
    """Return count, mean and quantiles of a histogram, in seconds; None where it is empty."""
    *buckets, sum_ns = counts
    total = sum(buckets)
    if not total:
        return None
    return {
        "count": total,
        "mean": sum_ns / total / _NS,
        **{name: quantile(counts, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))},
    }


def breaker_text(words: dict[Word, int]) -> str:
    """Return the state of the breaker for Redis."""
    if not words[Word.FOLLOWED] and not words[Word.BREAKER]:
        return "no Redis in use"
    return "open: Redis is left alone" if words[Word.BREAKER] >= OPEN_FROM else "closed"


HISTOGRAM_NAMES: Final = {
    Histogram.L1: "l1 look-up",
    Histogram.L2: "l2 look-up",
    Histogram.COMPUTE: "computation",
    Histogram.WAIT: "wait for another's",
}
