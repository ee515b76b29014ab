"""How long the slowest sets at capacity take, and how much of that is the machine's doing."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from rivals import Slab
from workload import hex_key, payload

CAPACITY = 10_000
CHUNK = 50_000
MILLISECOND = 1_000_000  # ns


def _gaps_of_sets(store: Callable[[bytes, bytes], object], keys: list[bytes], value: bytes) -> array[int]:
    """Time from one set's end to the next one's: nothing that delays a caller falls between two readings."""
    gaps = array("q", bytes(8 * len(keys)))
    before = perf_counter_ns()
    for number, key in enumerate(keys):
        store(key, value)
        now = perf_counter_ns()
        gaps[number] = now - before
        before = now
    return gaps


def _slow_turns_of_an_empty_loop(nanoseconds: int) -> int:
    """The same readings with nothing between them, for as long: what only the scheduler and other tenants do."""
    slow = 0
    before = perf_counter_ns()
    end = before + nanoseconds
    while before < end:
        now = perf_counter_ns()
        if now - before > MILLISECOND:
            slow += 1
        before = now
    return slow


def measure_tail(sets: int, value_bytes: int = 1024) -> dict[str, Any]:
    """`sets` sets of new keys into a full slab, in chunks that alternate with the empty loop."""
    contestant = Slab(CAPACITY, value_bytes)
    value = payload(value_bytes, 0)
    gaps: array[int] = array("q")
    slow_empty = 0
    try:
        contestant.fill((hex_key(-i), value) for i in range(1, 2 * CAPACITY))
        for begin in range(0, sets, CHUNK):
            keys = [hex_key(i) for i in range(begin, min(begin + CHUNK, sets))]
            chunk = _gaps_of_sets(contestant.store, keys, value)
            slow_empty += _slow_turns_of_an_empty_loop(sum(chunk))
            gaps.extend(chunk)
        evictions = contestant.slab.stats().evictions
    finally:
        contestant.close()
    ordered = sorted(gaps)
    return {
        "sets": sets,
        "evictions": evictions,
        "median_us": ordered[sets // 2] / 1000,
        "p99_us": ordered[int(sets * 0.99)] / 1000,
        "p9999_us": ordered[int(sets * 0.9999)] / 1000,
        "longest_us": ordered[-1] / 1000,
        "over_1_ms": sum(gap > MILLISECOND for gap in gaps),
        "empty_loop_over_1_ms": slow_empty,
    }
