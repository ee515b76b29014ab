"""The cache of one process, whole: slab, Redis, flights, queue and upkeep, and the operations on them as steps.

The two faces (`manager`, `sync_manager`) differ only in who performs the steps and in how callers of one process wait
for each other.

A look-up asks L1, then L2 (`core`). get_or_compute() goes on from there as `fetch` says.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.codec import Entry, EntryCodec
from llm_edge_cache.core import Begun, Core, Look
from llm_edge_cache.deferred import DeferredWrites, Item, write_all
from llm_edge_cache.effects import Steps, WaitForFlight, World, perform
from llm_edge_cache.fetch import Fetching, require_response, require_ttl
from llm_edge_cache.flight import Flights, Running
from llm_edge_cache.invalidation import Invalidator
from llm_edge_cache.keys import tier_key
from llm_edge_cache.lookup import CacheHealthStatus, MetricsSnapshot, Miss
from llm_edge_cache.model import CacheableRequest, CachedResponse
from llm_edge_cache.redis_client import RedisClient, parse_redis_url
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Counter, Word
from llm_edge_cache.settings import L1Config, L2Config
from llm_edge_cache.sizing import Sizer
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.upkeep import Upkeep
from llm_edge_cache.waiting import FlightWaiters

if TYPE_CHECKING:
    from llm_edge_cache.redis_target import RedisTarget

__all__ = ["DEFAULT_L1", "Engine", "fingerprint_of", "seconds_to_wait"]

_log = logging.getLogger("llm_edge_cache")

DEFAULT_L1: Final = L1Config()
"""The configuration of who says nothing of it: then whatever slab is live under its name is right."""
_CLOSE_SECONDS: Final = 5.0
_WAITING: Final = 0.9  # part of the operation timeout; the rest is for what a caller does beside, and late timers
_MISS: Final = Miss()
_TOTAL: Final = "total_requests"
_engines: Final[weakref.WeakSet[Engine]] = weakref.WeakSet()


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
        self.fetching: Final = Fetching(self.slab, self.core, self.tier)
        self.fork_hooks: Final[list[Callable[[], None]]] = []
        self._start_over()
        _engines.add(self)

    def _start_over(self) -> None:
        """Make what belongs to one process: what has threads, or is under way."""
        self.flights = Flights(self.slab)
        self.waiters = FlightWaiters(self.slab)
        self.upkeep = Upkeep(self.slab, self.flights, self.redis, self.tier, self.invalidator)
        self.queue = None if self.l2 is None else DeferredWrites(self.slab, self.l2.queue_limit, self._send)
        self.fetching.use(self.flights, self.queue, self.upkeep.start)
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
            self.fetching.put_release(lead)
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


def fingerprint_of(target: RedisTarget, l2: L2Config) -> int:
    """Return what a slab's word knows the Redis behind it by: 63 bits, never 0, equal in all processes."""
    described = f"{target!r} {l2.key_prefix}"
    return int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "little") >> 1 | 1


def seconds_to_wait(timeout: object) -> float | None:
    """Return a caller's timeout, 0 for one that has passed, None for one that never will; refuse what is none."""
    if timeout is None:
        return None
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be a number of seconds or None, not {type(timeout).__name__}")
    if timeout != timeout:  # noqa: PLR0124 - NaN
        raise ValueError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return None if timeout > threading.TIMEOUT_MAX else max(0.0, timeout)
