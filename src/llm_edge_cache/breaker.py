"""The circuit breaker for Redis, whose state all processes of the host share.

One word of the slab: while small, the failures in a row; from `OPEN_FROM` on, when the next probe is due
(CLOCK_MONOTONIC, ns). While it is open no request asks Redis. Probing is not the requests' business: whichever
process's upkeep thread sees that a probe is due and moves the word on to the next one makes it, so an unreachable Redis
costs the host one connection attempt an interval and no request anything.

Source of the idea: M. Nygard, "Release It!", 2007, chapter 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from llm_edge_cache.regions import Counter, Word

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["OPEN_FROM", "PROBE_INTERVAL_NS", "Breaker"]

OPEN_FROM: Final = 1024
PROBE_INTERVAL_NS: Final = 500_000_000
_TOLERATED: Final = 2  # failures in a row that leave it closed


class Breaker:
    """The breaker of a slab's Redis; every process has one over the same word."""

    def __init__(self, slab: SharedSlab) -> None:
        """Judge by the word of this slab."""
        self._slab = slab

    def is_closed(self) -> bool:
        """Tell whether requests may ask Redis."""
        return self._slab._word(Word.BREAKER) < OPEN_FROM

    def succeed(self) -> None:
        """Note that Redis answered."""
        if self._slab._word(Word.BREAKER) != 0:
            self._slab._word_set(Word.BREAKER, 0)

    def fail(self, now_ns: int) -> None:
        """Note that Redis could not serve; the third time in a row opens."""
        while (failures := self._slab._word(Word.BREAKER)) < OPEN_FROM:
            opens = failures >= _TOLERATED
            after = now_ns + PROBE_INTERVAL_NS if opens else failures + 1
            # Many callers time out together: each counts once, and one of them opens.
            if self._slab._word_exchange(Word.BREAKER, failures, after):
                if opens:
                    self._slab._count(Counter.BREAKER_OPENED)
                return

    def claim_probe(self, now_ns: int) -> bool:
        """Tell whether the caller is to probe now; at most one process is told so in an interval."""
        due = self._slab._word(Word.BREAKER)
        if due < OPEN_FROM or now_ns < due:
            return False
        return self._slab._word_exchange(Word.BREAKER, due, now_ns + PROBE_INTERVAL_NS)
