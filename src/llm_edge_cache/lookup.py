"""What the cache answers: where a response was found, or that it was not."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec

from llm_edge_cache.model import CachedResponse

__all__ = ["CacheHealthStatus", "L1Hit", "L2Hit", "LookupResult", "MetricsSnapshot", "Miss", "Served", "Source"]


class L1Hit(msgspec.Struct, frozen=True, gc=False):
    """Found in shared memory."""

    response: CachedResponse
    is_hit: ClassVar[bool] = True
    tier: ClassVar[str | None] = "l1"


class L2Hit(msgspec.Struct, frozen=True, gc=False):
    """Found in Redis; it is in shared memory now."""

    response: CachedResponse
    is_hit: ClassVar[bool] = True
    tier: ClassVar[str | None] = "l2"


class Miss(msgspec.Struct, frozen=True):
    """Found nowhere, or Redis could not be asked."""

    is_hit: ClassVar[bool] = False
    tier: ClassVar[str | None] = None

    @property
    def response(self) -> None:
        """There is none."""
        return


LookupResult = L1Hit | L2Hit | Miss

Source = Literal["l1", "l2", "computed", "coalesced", "stale"]


class Served(msgspec.Struct, frozen=True):
    """What get_or_compute() returns, and where it came from."""

    response: CachedResponse | None
    """None: a negative result."""
    source: Source
    is_due: bool = False
    """It is stale, and to be computed anew in the background."""


class CacheHealthStatus(msgspec.Struct, frozen=True):
    """Whether the tiers can be used now."""

    l1_healthy: bool
    l2_healthy: bool
    """False too where no L2 is configured."""
    l2_configured: bool

    @property
    def is_fully_healthy(self) -> bool:
        """Tell whether everything that is configured works."""
        return self.l1_healthy and (self.l2_healthy or not self.l2_configured)


class MetricsSnapshot(msgspec.Struct, frozen=True):
    """Counts of all processes of the host since the slab was made."""

    l1_hits: int
    l1_misses: int
    l1_writes: int
    l2_hits: int
    l2_misses: int
    l2_writes: int
    total_requests: int

    @property
    def l1_hit_rate(self) -> float:
        """Hits of all look-ups in L1; 0 to 1, 0 where there were none."""
        return _share(self.l1_hits, self.l1_hits + self.l1_misses)

    @property
    def l2_hit_rate(self) -> float:
        """Hits of all look-ups that L2 answered."""
        return _share(self.l2_hits, self.l2_hits + self.l2_misses)

    @property
    def overall_hit_rate(self) -> float:
        """Hits of either tier over all look-ups."""
        return _share(self.l1_hits + self.l2_hits, self.l1_hits + self.l1_misses)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
