"""The cache of one process, whole: slab, Redis, flights, queue and upkeep, and the operations on them as steps.

The two faces (`manager`, `sync_manager`) differ only in who performs the steps and in how callers of one process wait
for each other.

A look-up, in order:

1. L1. Fresh: that is the answer.
2. get_or_compute only: join or lead the key's flight. Who joins waits, looks in L1 again, and is served.
3. The leader looks in L1 again: 1 A misses  2 the leader before stores and ends its flight  3 A leads: it is there.
4. L2: the value, which fills L1 for the rest of its life; or another host's lease, which is waited for; or a lease.
5. The caller's computation. L1 at once, L2 from a queue.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llm_edge_cache.codec import Entry, EntryCodec
from llm_edge_cache.core import Begun, Core, Look, negative_entry
from llm_edge_cache.deferred import DeferredWrites, Item, Release, write_all
from llm_edge_cache.effects import Compute, Pause, Steps, WaitForFlight, World, perform
from llm_edge_cache.errors import ComputeError, SlabClosedError
from llm_edge_cache.flight import Flights, Lead, Running
from llm_edge_cache.invalidation import Invalidator
from llm_edge_cache.keys import tier_key
from llm_edge_cache.lookup import CacheHealthStatus, MetricsSnapshot, Miss, Served, Source
from llm_edge_cache.model import CacheableRequest, CachedResponse
from llm_edge_cache.redis_client import RedisClient, parse_redis_url
from llm_edge_cache.redis_tier import LEASE_MS, Busy, Found, Leased, RedisTier, Unanswered
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.settings import L1Config, L2Config
from llm_edge_cache.sizing import Sizer
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.upkeep import Upkeep
from llm_edge_cache.waiting import FlightWaiters

if TYPE_CHECKING:
    from llm_edge_cache.redis_target import RedisTarget

__all__ = [
    "DEFAULT_L1",
    "NEVER",
    "Engine",
    "FetchOptions",
    "OutOfTimeError",
    "require_response",
    "require_ttl",
    "seconds_to_wait",
]

_log = logging.getLogger("llm_edge_cache")

DEFAULT_L1: Final = L1Config()
"""The configuration of who says nothing of it: then whatever slab is live under its name is right."""
_WAIT_SECONDS: Final = 1.0  # between two looks at a flight whose wake-up was lost
_POLL_SECONDS: Final = 0.02  # between two looks at another host's lease
_CLOSE_SECONDS: Final = 5.0
_WAITING: Final = 0.95  # part of the operation timeout; the rest is for what a caller does beside, and late timers
NEVER: Final = 1 << 63
"""A moment of CLOCK_MONOTONIC that does not come."""

_MISS: Final = Miss()
_TOTAL: Final = "total_requests"
_engines: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()


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


class Engine:
    """One process's part of the cache. Any thread may use it; a forked child goes on with threads of its own."""

    def __init__(self, l1: L1Config, l2: L2Config | None, slab: SharedSlab | None) -> None:
        """Open the slab, or use the one given; nothing is sent to Redis yet.

        Raises:
            RedisConfigError: the URL is not usable.
            SlabError: the slab cannot be had.
        """
        self._target: Final[RedisTarget | None] = None if l2 is None else parse_redis_url(l2.redis_url)
        self._owns_slab = slab is None
        self.slab: Final = _open_slab(l1) if slab is None else slab
        self.l2: Final = l2
        self.redis: Final = None if l2 is None or self._target is None else _client(RedisClient, self._target, l2)
        if l2 is not None and self._target is not None:
            self._follow_this(self._target, l2)
        codec = EntryCodec(compress_above=None if l2 is None else l2.compress_above)
        self.tier: Final = None if l2 is None else RedisTier(self.slab, l2, codec)
        self.core: Final = Core(self.slab, l1, l2, self.tier, codec)
        self.invalidator: Final = Invalidator(self.slab, self.tier)
        self.fork_hooks: Final[list[Callable[[], None]]] = []
        self._start_over()
        _engines.add(self)

    def _start_over(self) -> None:
        """Make what belongs to one process: what has threads, or is under way."""
        self.flights = Flights(self.slab)
        self.waiters = FlightWaiters(self.slab)
        self.upkeep = Upkeep(self.slab, self.flights, self.redis, self.tier, self.invalidator)
        self.queue = None if self.l2 is None else DeferredWrites(self.slab, self.l2.queue_limit, self._send)
        self._is_open = False

    def after_fork(self) -> None:
        """The parent's threads, flights and deferred writes are the parent's."""
        self._start_over()
        for hook in self.fork_hooks:
            hook()

    def _follow_this(self, target: RedisTarget, l2: L2Config) -> None:
        """What the slab's words say must be of this Redis: one that was used with another starts anew."""
        fingerprint = fingerprint_of(target, l2)
        followed = self.slab._word(Word.FOLLOWED)
        if followed == fingerprint or not self.slab._word_exchange(Word.FOLLOWED, followed, fingerprint):
            return
        if followed != 0:
            # The cursor last: whoever finds none learns all the others anew.
            for word in (Word.BEGIN, Word.CLEARED, Word.CONTACT, Word.BREAKER, Word.READER, Word.CURSOR):
                self.slab._word_set(word, 0)

    def new_client(self, kind: Callable[..., Any]) -> Any:
        """Return a client of this Redis; None without one."""
        return None if self._target is None or self.l2 is None else _client(kind, self._target, self.l2)

    # ---- life ----

    def open(self) -> None:
        """Start what runs beside requests, and wait until Redis was reached once or turned out to be away."""
        if self.l2 is not None and not self._is_open:
            self.upkeep.start()
            self.upkeep.wait_established(self.l2.connection_timeout_ms / 1000 + 2 * self.l2.operation_timeout_ms / 1000)
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Tell whether this process's open() has returned."""
        return self._is_open

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Send what is queued, for at most so many seconds, and let go of everything. The slab stays for others.

        Computations under way, in other threads or on other event loops, answer their callers; others compute anew.
        """
        for lead in self.flights.abandon():
            self._put_release(lead)
        if self.queue is not None and not self.queue.close(seconds):
            _log.warning("deferred writes to Redis were dropped at close")
        self.upkeep.stop(seconds)
        if self.redis is not None:
            self.redis.close()
        if self._owns_slab:
            self.slab.close()

    # ---- operations, as steps ----

    def missed(self, request: CacheableRequest, found: Look | None) -> Miss | Look:
        """Say how a look-up goes on that had no hit in L1 (`Core.look`): with `lookup_l2`, if this is a Look."""
        if found is None:
            return _MISS
        if self.tier is not None and found.begun.begin == 0:
            # It looked before the cache was opened. What begins at no id of the stream is void for every host.
            found = found._replace(begun=self.core.begin(found.key))
        # For the store() that follows: 1 lookup misses  2 the caller computes  3 another invalidates  4 store() of what
        # was computed before must be refused.
        request.__dict__["_begun"] = (self.core, found.begun)
        return found if self.tier is not None else _MISS

    def store(
        self,
        request: CacheableRequest,
        response: CachedResponse,
        l1_ttl: float | None,
        l2_ttl: float | None,
        tags: tuple[str, ...],
    ) -> bool:
        """Store a response: in L1 now, in Redis from the queue. Returns whether it is in L1."""
        require_response(response)
        require_ttl("l1_ttl", l1_ttl)
        require_ttl("l2_ttl", l2_ttl)
        key = tier_key(request)
        begun = self._begun_at_lookup(request) or self.core.begin(key)
        lives = self.core.lives(l1_ttl, l2_ttl)
        is_kept, write = self.core.keep(key, begun, Entry(response), lives, tags)
        if write is not None and self.queue is not None:
            self.queue.put(write)
        return is_kept

    def _begun_at_lookup(self, request: CacheableRequest) -> Begun | None:
        core, begun = request.__dict__.pop("_begun", (None, None))
        return begun if core is self.core else None

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
            flight = self.flights.join(key, is_driven)
            if isinstance(flight, Lead):
                return (yield from self._lead(flight, options, until_ns))
            served = yield from self._follow(flight, key, options, until_ns)
            if served is not None:
                return served

    def _follow(self, flight: Running, key: bytes, options: FetchOptions, until_ns: int) -> Steps[Served | None]:
        """Wait for another's flight. Returns None when it left nothing, and the next is to be joined or led."""
        start = time.monotonic_ns()
        while self.flights.is_running(flight):
            yield WaitForFlight(flight.record, flight.token, _at_most(_WAIT_SECONDS, until_ns))
        self.slab._observe(Histogram.WAIT, time.monotonic_ns() - start)
        entry, look = self.core.peek(key)
        if entry is not None:
            self.slab._count(Counter.COALESCED)
            return self._served(entry, "coalesced")
        stale = self.stale_while_revalidating(look, options)
        if stale is not None:
            return stale
        try:
            if self.flights.left_nothing(flight):
                return (yield from self._compute(Lead(key, -1, 0), self.core.begin(key), options))
        except ComputeError:
            excuse = self._stale_for_error(look.entry, options)
            if excuse is None:
                raise
            return excuse
        return None

    def _lead(self, lead: Lead, options: FetchOptions, until_ns: int) -> Steps[Served]:
        self.upkeep.start()
        try:
            return (yield from self._find_or_compute(lead, options, until_ns))
        finally:
            self.flights.end(lead)

    def _find_or_compute(self, lead: Lead, options: FetchOptions, until_ns: int) -> Steps[Served]:
        entry, look = self.core.peek(lead.key)
        if entry is not None:
            self.slab._count(Counter.COALESCED)
            return self._served(entry, "coalesced")
        found = yield from self.claim(lead, options, until_ns)
        if isinstance(found, Found):
            # A stale one too: the others on this host have a use for it as well.
            self.core.promote(look, found, stale=options.stale_seconds)
            if not found.is_stale:
                return self._served(found.entry, "l2")
            look = look._replace(entry=found.entry, is_unverified=False)
            stale = self.stale_while_revalidating(look, options)
            if stale is not None:
                return stale
        elif isinstance(found, Unanswered) and look.is_unverified and look.entry is not None:
            return self._served(look.entry, "l1")
        begun = self.core.begin(lead.key)
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
            if not self.core.has_overtaken(begun, lead.key, options.tags):
                self.flights.tell_failure(lead, error)

    def claim(self, lead: Lead, options: FetchOptions, until_ns: int = NEVER) -> Steps[Found | Unanswered | None]:
        """Look in L2, and take the lease there. Waits while another host computes the value.

        Returns:
            A value, fresh or stale (then the lease is held, unless the stale one will do for now); UNANSWERED; None:
            the lease is held.
        """
        if self.tier is None:
            return None
        token = secrets.token_hex(16).encode()
        stale: Found | None = None
        start = time.monotonic_ns()
        histogram: int = Histogram.L2
        while True:
            asked_ns = time.monotonic_ns()
            outcome = yield from self.tier.claim(lead.key, token, b"" if stale is None else stale.identity)
            if isinstance(outcome, Unanswered):
                return outcome
            if isinstance(outcome, Leased):
                lead.lease_until_ns = asked_ns + LEASE_MS * 1_000_000
                lead.lease = token
                self.slab._record(Counter.L2_MISSES, histogram, start)
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
            self.slab._record(Counter.L2_HITS, histogram, start)
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
                self.slab._count(Counter.COMPUTE_ERRORS, int(isinstance(error, Exception)))
            raise
        with contextlib.suppress(SlabClosedError):  # closed meanwhile: the answer is its caller's all the same
            self.slab._record(Counter.COMPUTATIONS, Histogram.COMPUTE, start)
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
        if self.tier is None or lead.lease is None or time.monotonic_ns() < lead.lease_until_ns:
            return True
        state = yield from self.tier.check_lease(lead.key, lead.lease)
        if state == "held":
            return True
        lead.lease = None
        if state == "taken":
            lead.lost = True
            self.slab._count(Counter.L1_FENCED)
            self.slab._count(Counter.DROPPED_FENCED)
        return state != "taken"

    def keep(self, lead: Lead, begun: Begun, entry: Entry, options: FetchOptions) -> bool:
        """Store what a flight computed. Returns whether it is in L1 or on its way to L2."""
        l1_ttl, l2_ttl = options.l1_ttl, options.l2_ttl
        if entry.is_negative:
            l1_ttl = l2_ttl = options.negative_ttl
        jitter = 1.0 - options.ttl_jitter * secrets.randbelow(1 << 20) / (1 << 20)
        lives = self.core.lives(l1_ttl, l2_ttl, jitter=jitter, stale=options.stale_seconds)
        is_kept, write = self.core.keep(lead.key, begun, entry, lives, options.tags, lease=lead.lease or b"")
        if not is_kept and self.core.has_overtaken(begun, lead.key, options.tags):
            self.slab._count(Counter.DROPPED_FENCED, int(self.l2 is not None))
            self.release(lead)
            return False
        is_sent = write is not None and self.queue is not None and self.queue.put(write)
        # Who waits will find it in Redis, if that gave us a lease a moment ago.
        if not is_kept and not (is_sent and lead.lease is not None):
            self.flights.tell_uncacheable(lead)
        return is_kept or is_sent

    def release(self, lead: Lead) -> None:
        """Give the lease up, if there is one, so that another host computes at once."""
        if self.flights.holds(lead):
            self._put_release(lead)

    def _put_release(self, lead: Lead) -> None:
        if lead.lease is not None and self.queue is not None:
            self.queue.put(Release(lead.key, lead.lease))
            lead.lease = None

    def _stale_for_error(self, entry: Entry | None, options: FetchOptions) -> Served | None:
        if entry is None or not _is_within(entry, options.stale_if_error):
            return None
        self.slab._count(Counter.STALE_ERROR)
        return self._served(entry, "stale")

    def _served(self, entry: Entry, source: Source) -> Served:
        self.core.count_saved(entry)
        return Served(None if entry.is_negative else entry.response, source)

    def stale_while_revalidating(self, look: Look, options: FetchOptions) -> Served | None:
        """Return the stale value that may be served while it is computed anew; None where there is none."""
        entry = None if look.is_unverified else look.entry
        if entry is None or not _may_serve(entry, options):
            return None
        self.slab._count(Counter.STALE_REVALIDATE)
        return msgspec.structs.replace(self._served(entry, "stale"), is_due=True)

    # ---- looking in from outside ----

    def l1_is_healthy(self) -> bool:
        """Tell whether the slab is live."""
        return not self.slab.closed and self.slab._follow()

    def health(self, l2_healthy: bool) -> CacheHealthStatus:
        """Return the state of both tiers."""
        return CacheHealthStatus(self.l1_is_healthy(), l2_healthy, self.l2 is not None)

    def snapshot(self) -> MetricsSnapshot:
        """Return the host's counts."""
        sums = self.slab._counter_sums()
        counts = {field: sums[Counter[field.upper()]] for field in MetricsSnapshot.__struct_fields__ if field != _TOTAL}
        return MetricsSnapshot(**counts, total_requests=counts["l1_hits"] + counts["l1_misses"])

    def measure_l2(self) -> Steps[None]:
        """Estimate what is kept in Redis (`sizing`), unless it is known to be away."""
        assert self.tier is not None
        if not self.tier.breaker.is_closed():
            return
        yield from Sizer(self.slab, self.tier).sample(time.monotonic_ns())

    def _send(self, items: list[Item]) -> None:
        assert self.tier is not None
        perform(write_all(self.tier, self.slab, items), self.world())

    def world(self, compute: Callable[[], object] | None = None, until: float | None = None) -> World:
        """Return what performs steps in a thread."""
        return World(self.redis, self._wait, compute, until)

    def end_of_operation(self) -> float:
        """Return when a look-up that begins now stops waiting for Redis, however many commands it takes."""
        return time.monotonic() + (0.0 if self.l2 is None else _seconds_of_operation(self.l2))

    def _wait(self, flight: WaitForFlight) -> None:
        self.flights.wait(Running(flight.record, flight.token), flight.seconds)


def _after_fork() -> None:
    for engine in list(_engines):
        engine.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _open_slab(l1: L1Config) -> SharedSlab:
    """Open the slab of a configuration; where one of the same size is live, that one.

    What lives how long is this process's own business: every value is stored with its lives. And who says nothing of
    the size takes what is there, as a worker does whose master made the slab.
    """
    wanted = l1.slab_config()
    if SharedSlab.exists(l1.name):
        slab = SharedSlab(l1.name)
        is_default = (l1.max_capacity, l1.memory_bytes) == (DEFAULT_L1.max_capacity, DEFAULT_L1.memory_bytes)
        live = slab.config
        if is_default or (live.max_entries, live.memory_bytes) == (wanted.max_entries, wanted.memory_bytes):
            return slab
        slab.close()
    return SharedSlab(l1.name, wanted)


def _client(kind: Callable[..., Any], target: RedisTarget, l2: L2Config) -> Any:
    seconds = {
        "operation_timeout": _seconds_of_operation(l2),
        "connection_timeout": l2.connection_timeout_ms / 1000,
    }
    return kind(target, **seconds)


def _seconds_of_operation(l2: L2Config) -> float:
    return _WAITING * l2.operation_timeout_ms / 1000


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


def fingerprint_of(target: RedisTarget, l2: L2Config) -> int:
    """Return what a slab's word knows the Redis behind it by: 63 bits, never 0, equal in all processes."""
    described = f"{target!r} {l2.key_prefix}"
    return int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "little") >> 1 | 1


def require_response(response: object) -> None:
    """Refuse what is no response."""
    if not isinstance(response, CachedResponse):
        raise TypeError(f"a response must be a CachedResponse, not {type(response).__name__}")


def seconds_to_wait(timeout: object) -> float | None:
    """Return a caller's timeout, 0 for one that has passed, None for one that never will; refuse what is none."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if timeout != timeout:  # noqa: PLR0124 - NaN
        raise ValueError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return None if timeout > threading.TIMEOUT_MAX else max(0.0, timeout)


def require_ttl(field: str, seconds: object) -> None:
    """Refuse what is no life of seconds; None is the configured one."""
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"{field} must be a number of seconds or None, not {type(seconds).__name__}")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{field} must be a finite number of seconds above 0, or None, not {seconds!r}")
