"""The cache in two tiers, for threads: CacheManager's names without await."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import msgspec

from llm_edge_cache.core import Begun, Look
from llm_edge_cache.effects import Steps, perform
from llm_edge_cache.engine import Engine, seconds_to_wait
from llm_edge_cache.fetch import NEVER, FetchOptions, OutOfTimeError
from llm_edge_cache.invalidation import Invalidation, key_invalidation, tag_invalidation, tags_of
from llm_edge_cache.keys import tier_key
from llm_edge_cache.lookup import CacheHealthStatus, L1Hit, LookupResult, Served
from llm_edge_cache.manager_base import ManagerBase
from llm_edge_cache.model import CacheableRequest, CachedResponse
from llm_edge_cache.redis_client import Call, RedisTrouble
from llm_edge_cache.regions import Counter, Word

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["SyncCacheManager"]

_T = TypeVar("_T")
Compute = Callable[[], CachedResponse | None]


class _LocalFlight:
    """A key that one thread of this process fetches, for all its threads."""

    def __init__(self, begun: Begun, tags: tuple[str, ...]) -> None:
        self.begun = begun
        self.tags = tags
        self.is_done = threading.Event()
        self.served: Served | None = None
        self.error: Exception | None = None

    def outcome(self) -> Served | None:
        """Return what the leader got, or raise what it raised. Only once it is done.

        None: it gave up for itself alone. Its time was up, or its thread was interrupted.
        """
        if self.error is not None:
            raise self.error
        return self.served


class _LocalFlights:
    """The keys that this process is fetching."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.flights: dict[bytes, _LocalFlight] = {}


class SyncCacheManager(ManagerBase):
    """CacheManager for threads; see there. Use it with ``with``, or ``open()`` and ``close()``.

    Args:
        l1: The tier in shared memory. Left out, whatever slab is live under the default name is used.
        l2: The tier in Redis; None: there is none.
        slab: A slab to use in place of the one that l1 names; it stays open at the end.

    Raises:
        RedisConfigError: l2's URL is not usable.
        SlabError: The slab cannot be had; see SharedSlab.
    """

    def _use(self, engine: Engine) -> None:
        super()._use(engine)
        self._start_over()
        engine.fork_hooks.append(self._start_over)

    def _start_over(self) -> None:
        self._local = _LocalFlights()

    # ---- life ----

    def open(self) -> Self:
        """Reach Redis if there is one; returns at the latest after its connection timeout. Optional."""
        self._engine.open()
        return self

    def close(self) -> None:
        """Send deferred writes, and let go of everything. The slab stays for the other processes, and the next ones."""
        self._engine.close()

    def __enter__(self) -> Self:
        """Open."""
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # ---- the cache ----

    def lookup(self, request: CacheableRequest) -> LookupResult:
        """Look a request up in L1, then in L2; as CacheManager.lookup."""
        look = self._look
        found = look(tier_key(request))
        if isinstance(found, L1Hit):
            return found
        self._open_once()
        missed = self._engine.missed(request, found)
        if not isinstance(missed, Look):
            return missed
        return perform(self._core.lookup_l2(missed), self._engine.world(until=self._engine.end_of_operation()))

    def store(
        self,
        request: CacheableRequest,
        response: CachedResponse,
        *,
        l1_ttl: float | None = None,
        l2_ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store a response: in L1 at once, in Redis without waiting for it; as CacheManager.store."""
        self._open_once()
        return self._engine.store(request, response, l1_ttl, l2_ttl, tags_of(tags))

    def store_with_ttl(self, request: CacheableRequest, response: CachedResponse, ttl: float) -> bool:
        """Store a response for so many seconds in both tiers."""
        self._open_once()
        return self._engine.store(request, response, ttl, ttl, ())

    def get_or_compute(
        self,
        request: CacheableRequest,
        compute: Compute,
        *,
        l1_ttl: float | None = None,
        l2_ttl: float | None = None,
        tags: Iterable[str] = (),
        timeout: float | None = None,
        stale_while_revalidate: float = 0.0,
        stale_if_error: float = 0.0,
        ttl_jitter: float = 0.0,
        negative_ttl: float | None = None,
    ) -> CachedResponse | None:
        """Return the cached response, or have it computed once; as CacheManager.get_or_compute.

        The computation runs in the thread of the caller that leads, which `timeout` does not interrupt; it bounds the
        wait for that of another thread, process or host. A revalidation runs in a thread of its own.
        """
        key = tier_key(request)
        found = self._look(key)
        if isinstance(found, L1Hit):
            return found.response
        if not isinstance(found, Look):
            return None
        options = FetchOptions(
            l1_ttl=l1_ttl,
            l2_ttl=l2_ttl,
            tags=tags_of(tags),
            stale_while_revalidate=stale_while_revalidate,
            stale_if_error=stale_if_error,
            ttl_jitter=ttl_jitter,
            negative_ttl=negative_ttl,
        )
        return self.fetch(found, compute, options, seconds_to_wait(timeout)).response

    def invalidate(self, request: CacheableRequest) -> None:
        """Make a request's response void: on this host when this returns, on the others within moments."""
        self._invalidate(key_invalidation(request))

    def invalidate_tag(self, tag: str) -> None:
        """Make every response that was stored under a tag void."""
        self._invalidate(tag_invalidation(tag))

    def clear_all(self) -> None:
        """Make everything void, in Redis too; what costs the same however much that is."""
        self._invalidate(Invalidation("all"))

    # ---- looking in ----

    def health_check(self) -> CacheHealthStatus:
        """Ask both tiers whether they work; Redis has its operation timeout to answer."""
        redis = self._engine.redis
        is_healthy = False
        if redis is not None:
            with contextlib.suppress(RedisTrouble):
                redis.run(Call((b"PING",)))
                is_healthy = True
        return self._engine.health(is_healthy)

    def l2_approximate_size(self) -> int:
        """Estimate how many responses Redis holds, exactly while they are few; the last estimate when it is away."""
        if self._engine.tier is None:
            return 0
        with contextlib.suppress(RedisTrouble):
            self.perform(self._engine.measure_l2())
        return self._engine.slab._word(Word.L2_ENTRIES)

    # ---- beneath ----

    def fetch(self, look: Look, compute: Compute, options: FetchOptions, timeout: float | None) -> Served:
        """Go on with get_or_compute() where L1 had no answer, for what is built on it."""
        stale = self._engine.fetching.stale_while_revalidating(look, options)
        if stale is not None:
            self._begin_revalidation(look, compute, options)
            return stale
        until_ns = NEVER if timeout is None else time.monotonic_ns() + round(timeout * 1e9)
        try:
            while True:
                served = self._lead_or_wait(look, compute, options, until_ns)
                if served is not None:
                    break
        except OutOfTimeError:
            raise TimeoutError(f"no response within {timeout} s") from None
        if served.is_due:
            self._begin_revalidation(look, compute, options)
        return served

    def _lead_or_wait(self, look: Look, compute: Compute, options: FetchOptions, until_ns: int) -> Served | None:
        """Return the value; None where this process's leader gave up, and the next one has to lead."""
        flight, leads = self._join(look, options)
        if leads:
            return self._lead(flight, look.key, compute, options, until_ns)
        self._engine.slab._count(Counter.COALESCED)
        seconds = None if until_ns == NEVER else (until_ns - time.monotonic_ns()) / 1e9
        if not flight.is_done.wait(seconds):
            raise OutOfTimeError
        return flight.outcome()

    def _begin_revalidation(self, look: Look, compute: Compute, options: FetchOptions) -> None:
        flight, leads = self._join(look, options)
        if leads:
            lead = (flight, look.key, compute, msgspec.structs.replace(options, revalidates=True))
            threading.Thread(target=self._revalidate, args=lead, name="llm-edge-cache-revalidate", daemon=True).start()

    def _join(self, look: Look, options: FetchOptions) -> tuple[_LocalFlight, bool]:
        """Return this process's flight of the key, and whether this thread is to lead it."""
        local = self._local
        with local.lock:
            flight = local.flights.get(look.key)
            # 1 A computes K  2 invalidate(K) returns  3 B asks for K: what A computes is too old for B.
            if flight is not None and not self._core.has_overtaken(flight.begun, look.key, flight.tags):
                return flight, False
            flight = _LocalFlight(look.begun, options.tags)
            local.flights[look.key] = flight
            return flight, True

    def _lead(
        self, flight: _LocalFlight, key: bytes, compute: Compute, options: FetchOptions, until_ns: int = NEVER
    ) -> Served:
        local = self._local
        try:
            flight.served = self.perform(self._engine.fetching.fetch(key, options, until_ns=until_ns), compute)
        except OutOfTimeError:  # as what is no Exception, a matter of this thread alone
            raise
        except Exception as error:
            flight.error = error
            raise
        finally:
            with local.lock:
                if local.flights.get(key) is flight:
                    del local.flights[key]
            flight.is_done.set()
        return flight.served

    def _revalidate(self, flight: _LocalFlight, key: bytes, compute: Compute, options: FetchOptions) -> None:
        with contextlib.suppress(Exception):  # counted; the next caller tries again
            self._lead(flight, key, compute, options)

    def _invalidate(self, what: Invalidation) -> None:
        self.perform(self._engine.invalidator.invalidate(what))

    def _open_once(self) -> None:
        if not self._engine.is_open:
            self._engine.open()

    def perform(self, steps: Steps[_T], compute: Compute | None = None) -> _T:
        """Run an operation of the engine in this thread."""
        self._open_once()
        return perform(steps, self._engine.world(compute))
