"""How one key is fetched: what L1 does not have is found in L2, or computed by one caller of all.

get_or_compute() and all that is built like it, as steps:

1. Join or lead the key's flight. Who joins waits, looks in L1 again, and is served.
2. The leader looks in L1 again: 1 A misses  2 the leader before stores and ends its flight  3 A leads: it is there.
3. L2: the value, which fills L1 for the rest of its life; or another host's lease, which is waited for; or a lease.
4. The caller's computation. L1 at once, L2 from a queue.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from llm_edge_cache.codec import Entry
from llm_edge_cache.core import Begun, Core, Look, negative_entry
from llm_edge_cache.deferred import DeferredWrites, Release
from llm_edge_cache.effects import Compute, Pause, Steps, WaitForFlight
from llm_edge_cache.errors import ComputeError, SlabClosedError
from llm_edge_cache.flight import Flights, Lead, Running
from llm_edge_cache.lookup import Served, Source
from llm_edge_cache.model import CachedResponse
from llm_edge_cache.redis_tier import LEASE_MS, Busy, Found, Leased, RedisTier, Unanswered
from llm_edge_cache.regions import Counter, Histogram

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["NEVER", "FetchOptions", "Fetching", "OutOfTimeError", "require_response", "require_ttl"]

_WAIT_SECONDS: Final = 1.0  # between two looks at a flight whose wake-up was lost
_POLL_SECONDS: Final = 0.02  # between two looks at another host's lease
NEVER: Final = 1 << 63
"""A moment of CLOCK_MONOTONIC that does not come."""


class OutOfTimeError(Exception):
    """Whoever drives a fetch may not wait any longer for another process or host. Others may go on."""


class FetchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What get_or_compute() is told beside the request. Seconds throughout; see there."""

    l1_ttl: float | None = None
    l2_ttl: float | None = None
    tags: tuple[str, ...] = ()
    stale_while_revalidate: float = 0.0
    stale_if_error: float = 0.0
    ttl_jitter: float = 0.0
    negative_ttl: float | None = None
    revalidates: bool = False
    """Nobody waits for this: a stale value is no answer."""

    @property
    def stale_seconds(self) -> float:
        """For how long a value may be of use after its expiry."""
        return max(self.stale_while_revalidate, self.stale_if_error)

    def __post_init__(self) -> None:
        """Refuse what is no life."""
        for field in ("l1_ttl", "l2_ttl", "negative_ttl"):
            require_ttl(field, getattr(self, field))
        for field in ("stale_while_revalidate", "stale_if_error"):
            if not 0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} must be 0 or more seconds, not {getattr(self, field)!r}")
        if not 0 <= self.ttl_jitter <= 1:
            raise ValueError(f"ttl_jitter must be 0 to 1, not {self.ttl_jitter!r}")


class Fetching:
    """Fetches keys, for all callers of one process.

    Args:
        slab, core, tier: the cache. Without a tier there is nothing but this host.
    """

    _flights: Flights
    _queue: DeferredWrites | None
    _start_upkeep: Callable[[], None]

    def __init__(self, slab: SharedSlab, core: Core, tier: RedisTier | None) -> None:
        self._slab = slab
        self._core = core
        self._tier = tier

    def use(self, flights: Flights, queue: DeferredWrites | None, start_upkeep: Callable[[], None]) -> None:
        """Go on with what belongs to this process; called again in a forked child.

        Not another Fetching: 1 P leads K  2 P forks C  3 C drops its copy of the steps, which ends "its" flight. It
        must be C's flights that are asked, which know of none, and not the copy of P's.

        Args:
            flights: the flights of this process.
            queue: where writes to Redis wait; None without a tier.
            start_upkeep: sees to it that what this process leads is renewed.
        """
        self._flights = flights
        self._queue = queue
        self._start_upkeep = start_upkeep

    def fetch(
        self, key: bytes, options: FetchOptions, *, until_ns: int = NEVER, is_driven: Callable[[], bool] = lambda: True
    ) -> Steps[Served]:
        """Return the value of a key that L1 does not have, computed by one caller of all.

        Args:
            key: 64 hexadecimal digits.
            options: as get_or_compute() was told.
            until_ns: when to stop waiting for other processes and hosts; CLOCK_MONOTONIC. A computation is not cut off.
            is_driven: tells whether these steps can get on; while not, others may take the computation over.

        Raises:
            OutOfTimeError: the time was up.
            ComputeError: another's computation failed.
            Whatever the computation raised.
        """
        while True:
            flight = self._flights.join(key, is_driven)
            if isinstance(flight, Lead):
                return (yield from self._lead(flight, options, until_ns))
            served = yield from self._follow(flight, key, options, until_ns)
            if served is not None:
                return served

    def _follow(self, flight: Running, key: bytes, options: FetchOptions, until_ns: int) -> Steps[Served | None]:
        """Wait for another's flight. Returns None when it left nothing, and the next is to be joined or led."""
        start = time.monotonic_ns()
        while self._flights.is_running(flight):
            yield WaitForFlight(flight.record, flight.token, _at_most(_WAIT_SECONDS, until_ns))
        self._slab._observe(Histogram.WAIT, time.monotonic_ns() - start)
        entry, look = self._core.peek(key)
        if entry is not None:
            self._slab._count(Counter.COALESCED)
            return self._served(entry, "coalesced")
        stale = self.stale_while_revalidating(look, options)
        if stale is not None:
            return stale
        try:
            if self._flights.left_nothing(flight):
                return (yield from self._compute(Lead(key, -1, 0), self._core.begin(key), options))
        except ComputeError:
            excuse = self._stale_for_error(look.entry, options)
            if excuse is None:
                raise
            return excuse
        return None

    def _lead(self, lead: Lead, options: FetchOptions, until_ns: int) -> Steps[Served]:
        self._start_upkeep()
        try:
            return (yield from self._find_or_compute(lead, options, until_ns))
        finally:
            self._flights.end(lead)

    def _find_or_compute(self, lead: Lead, options: FetchOptions, until_ns: int) -> Steps[Served]:
        entry, look = self._core.peek(lead.key)
        if entry is not None:
            self._slab._count(Counter.COALESCED)
            return self._served(entry, "coalesced")
        found = yield from self.claim(lead, options, until_ns)
        if isinstance(found, Found):
            # A stale one too: the others on this host have a use for it as well.
            self._core.promote(look, found, stale=options.stale_seconds)
            if not found.is_stale:
                return self._served(found.entry, "l2")
            look = look._replace(entry=found.entry, is_unverified=False)
            stale = self.stale_while_revalidating(look, options)
            if stale is not None:
                return stale
        elif isinstance(found, Unanswered) and look.is_unverified and look.entry is not None:
            return self._served(look.entry, "l1")
        begun = self._core.begin(lead.key)
        try:
            return (yield from self._compute(lead, begun, options))
        except Exception as error:
            self._tell_failure(lead, begun, options, error)
            excuse = self._stale_for_error(look.entry, options)
            if excuse is None:
                raise
            return excuse

    def _tell_failure(self, lead: Lead, begun: Begun, options: FetchOptions, error: Exception) -> None:
        with contextlib.suppress(SlabClosedError):
            # 1 A computes K  2 invalidate(K) returns  3 B asks for K, and waits  4 A fails: it is not B's failure.
            if not self._core.has_overtaken(begun, lead.key, options.tags):
                self._flights.tell_failure(lead, error)

    def claim(self, lead: Lead, options: FetchOptions, until_ns: int = NEVER) -> Steps[Found | Unanswered | None]:
        """Look in L2, and take the lease there. Waits while another host computes the value.

        Returns:
            A value, fresh or stale (then the lease is held, unless the stale one will do for now); UNANSWERED; None:
            the lease is held.
        """
        if self._tier is None:
            return None
        token = secrets.token_hex(16).encode()
        stale: Found | None = None
        start = time.monotonic_ns()
        histogram: int = Histogram.L2
        while True:
            asked_ns = time.monotonic_ns()
            outcome = yield from self._tier.claim(lead.key, token, b"" if stale is None else stale.identity)
            if isinstance(outcome, Unanswered):
                return outcome
            if isinstance(outcome, Leased):
                lead.lease_until_ns = asked_ns + LEASE_MS * 1_000_000
                lead.lease = token
                self._slab._record(Counter.L2_MISSES, histogram, start)
                return stale
            if isinstance(outcome, Busy):
                histogram = -1  # a wait is no latency of Redis
                found = outcome.found
                if found is None or not _may_serve(found.entry, options):
                    stale = found or stale
                    yield Pause(_at_most(min(_POLL_SECONDS, outcome.seconds_left), until_ns))
                    continue
                outcome = found
            elif outcome.is_stale and not _may_serve(outcome.entry, options):
                stale = outcome
                continue
            self._slab._record(Counter.L2_HITS, histogram, start)
            return outcome

    def _compute(self, lead: Lead, begun: Begun, options: FetchOptions) -> Steps[Served]:
        """Have the caller's function compute the value, and store it."""
        start = time.monotonic_ns()
        try:
            response = yield Compute()
            if response is not None or options.negative_ttl is None:
                require_response(response)
        except BaseException as error:
            self.release(lead)
            with contextlib.suppress(SlabClosedError):
                self._slab._count(Counter.COMPUTE_ERRORS, int(isinstance(error, Exception)))
            raise
        with contextlib.suppress(SlabClosedError):  # closed meanwhile: the answer is its caller's all the same
            self._slab._record(Counter.COMPUTATIONS, Histogram.COMPUTE, start)
            microseconds = (time.monotonic_ns() - start) // 1000
            entry = negative_entry(microseconds) if response is None else Entry(response, microseconds=microseconds)
            if (yield from self.has_kept_lease(lead)):
                self.keep(lead, begun, entry, options)
        return Served(response, "computed")

    def has_kept_lease(self, lead: Lead) -> Steps[bool]:
        """Tell whether no other host has taken the computation over; Redis is asked only if one may have.

        1 A is stopped  2 its lease runs out, and host B computes the value  3 A goes on: its L1 must not get an answer
        that is older than all others'. Redis itself refuses A's write, but A's slab knows nothing of B.
        """
        if self._tier is None or lead.lease is None or time.monotonic_ns() < lead.lease_until_ns:
            return True
        state = yield from self._tier.check_lease(lead.key, lead.lease)
        if state == "held":
            return True
        lead.lease = None
        if state == "taken":
            lead.lost = True
            self._slab._count(Counter.L1_FENCED)
            self._slab._count(Counter.DROPPED_FENCED)
        return state != "taken"

    def keep(self, lead: Lead, begun: Begun, entry: Entry, options: FetchOptions) -> bool:
        """Store what a flight computed. Returns whether it is in L1 or on its way to L2."""
        l1_ttl, l2_ttl = options.l1_ttl, options.l2_ttl
        if entry.is_negative:
            l1_ttl = l2_ttl = options.negative_ttl
        jitter = 1.0 - options.ttl_jitter * secrets.randbelow(1 << 20) / (1 << 20)
        lives = self._core.lives(l1_ttl, l2_ttl, jitter=jitter, stale=options.stale_seconds)
        is_kept, write = self._core.keep(lead.key, begun, entry, lives, options.tags, lease=lead.lease or b"")
        if not is_kept and self._core.has_overtaken(begun, lead.key, options.tags):
            self._slab._count(Counter.DROPPED_FENCED, int(self._tier is not None))
            self.release(lead)
            return False
        is_sent = write is not None and self._queue is not None and self._queue.put(write)
        # Who waits will find it in Redis, if that gave us a lease a moment ago.
        if not is_kept and not (is_sent and lead.lease is not None):
            self._flights.tell_uncacheable(lead)
        return is_kept or is_sent

    def release(self, lead: Lead) -> None:
        """Give the lease up, if there is one, so that another host computes at once."""
        if self._flights.holds(lead):
            self.put_release(lead)

    def put_release(self, lead: Lead) -> None:
        """Give the lease up, whoever owns the flight."""
        if lead.lease is not None and self._queue is not None:
            self._queue.put(Release(lead.key, lead.lease))
            lead.lease = None

    def _stale_for_error(self, entry: Entry | None, options: FetchOptions) -> Served | None:
        if entry is None or not _is_within(entry, options.stale_if_error):
            return None
        self._slab._count(Counter.STALE_ERROR)
        return self._served(entry, "stale")

    def _served(self, entry: Entry, source: Source) -> Served:
        self._core.count_saved(entry)
        return Served(None if entry.is_negative else entry.response, source)

    def stale_while_revalidating(self, look: Look, options: FetchOptions) -> Served | None:
        """Return the stale value that may be served while it is computed anew; None where there is none."""
        entry = None if look.is_unverified else look.entry
        if entry is None or not _may_serve(entry, options):
            return None
        self._slab._count(Counter.STALE_REVALIDATE)
        return msgspec.structs.replace(self._served(entry, "stale"), is_due=True)


def _at_most(seconds: float, until_ns: int) -> float:
    """Return how long to wait of so many seconds.

    Raises:
        OutOfTimeError: not at all.
    """
    left = (until_ns - time.monotonic_ns()) / 1e9
    if left <= 0:
        raise OutOfTimeError
    return min(seconds, left)


def _may_serve(entry: Entry, options: FetchOptions) -> bool:
    """Tell whether a stale entry will do for now, while it is computed anew."""
    return not options.revalidates and _is_within(entry, options.stale_while_revalidate)


def _is_within(entry: Entry, seconds: float) -> bool:
    """Tell whether an entry has been stale for less than so many seconds."""
    return entry.expires_at is not None and time.time() < entry.expires_at + seconds


def require_response(response: object) -> None:
    """Refuse what is no response."""
    if not isinstance(response, CachedResponse):
        raise TypeError(f"a response must be a CachedResponse, not {type(response).__name__}")


def require_ttl(field: str, seconds: object) -> None:
    """Refuse what is no life of seconds; None is the configured one."""
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{field} must be a number of seconds or None, not {type(seconds).__name__}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{field} must be a finite number of seconds above 0, or None, not {seconds!r}")
