"""The cache in two tiers, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import weakref
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llm_edge_cache.core import Begun, Look
from llm_edge_cache.effects import AsyncWorld, Steps, WaitForFlight, perform_async
from llm_edge_cache.engine import Engine, seconds_to_wait
from llm_edge_cache.errors import ComputeError
from llm_edge_cache.fetch import FetchOptions
from llm_edge_cache.invalidation import Invalidation, key_invalidation, tag_invalidation, tags_of
from llm_edge_cache.keys import tier_key
from llm_edge_cache.lookup import CacheHealthStatus, L1Hit, LookupResult, Served
from llm_edge_cache.manager_base import ManagerBase
from llm_edge_cache.model import CacheableRequest, CachedResponse
from llm_edge_cache.redis_client import AsyncRedisClient, Call, RedisTrouble
from llm_edge_cache.regions import Counter, Word

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CacheManager"]

AsyncCompute = Callable[[], Awaitable[CachedResponse | None] | CachedResponse | None]


class _LocalFlight:
    """A key that this process fetches, for all its callers on one event loop."""

    __slots__ = ("begun", "tags", "task")

    def __init__(self, task: asyncio.Task[Served], begun: Begun, tags: tuple[str, ...]) -> None:
        self.task = task
        self.begun = begun
        self.tags = tags


class _Loop:
    """What belongs to one event loop."""

    def __init__(self, redis: AsyncRedisClient | None) -> None:
        self.redis: Final = redis
        self.flights: Final[dict[bytes, _LocalFlight]] = {}
        self.tasks: Final[set[asyncio.Task[Any]]] = set()


class CacheManager(ManagerBase):
    """L1 in shared memory, L2 in Redis, and one computation per key across all workers and hosts.

    Use it with ``async with``, or ``await open()`` and ``await aclose()``. Trouble with Redis is never raised from
    lookup, store or get_or_compute: the cache goes on with what it has, and counts.

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
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Loop] = weakref.WeakKeyDictionary()

    # ---- life ----

    async def open(self) -> Self:
        """Reach Redis if there is one; returns at the latest after its connection timeout. Optional."""
        await asyncio.get_running_loop().run_in_executor(None, self._engine.open)
        return self

    async def aclose(self) -> None:
        """Send deferred writes, and let go of everything. The slab stays for the other processes, and the next ones."""
        state = self._state()
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        await asyncio.get_running_loop().run_in_executor(None, self._engine.close)
        if state.redis is not None:
            await state.redis.close()

    async def __aenter__(self) -> Self:
        """Open."""
        return await self.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()

    # ---- the cache ----

    async def lookup(self, request: CacheableRequest) -> LookupResult:
        """Look a request up in L1, then in L2.

        Returns:
            L1Hit, L2Hit (its response is in L1 from now on), or Miss; each has ``is_hit`` and ``response``.
        """
        look = self._look
        found = look(tier_key(request))
        if isinstance(found, L1Hit):
            return found
        await self._open_once()
        missed = self._engine.missed(request, found)
        if not isinstance(missed, Look):
            return missed
        world = AsyncWorld(self._state().redis, self._wait, None, self._engine.end_of_operation())
        return await perform_async(self._core.lookup_l2(missed), world)

    async def store(
        self,
        request: CacheableRequest,
        response: CachedResponse,
        *,
        l1_ttl: float | None = None,
        l2_ttl: float | None = None,
        tags: Iterable[str] = (),
    ) -> bool:
        """Store a response: in L1 at once, in Redis without waiting for it.

        A response to a request that lookup() missed is refused if the request, or a tag, was invalidated since.

        Args:
            request: What was asked.
            response: What was answered.
            l1_ttl: Seconds in L1; None: the configured ones, at most as long as it is valid.
            l2_ttl: Seconds in Redis; None: the configured ones.
            tags: What invalidate_tag() may make it void by.

        Returns:
            Whether it is in L1 now.
        """
        await self._open_once()
        return self._engine.store(request, response, l1_ttl, l2_ttl, tags_of(tags))

    async def store_with_ttl(self, request: CacheableRequest, response: CachedResponse, ttl: float) -> bool:
        """Store a response for so many seconds in both tiers."""
        await self._open_once()
        return self._engine.store(request, response, ttl, ttl, ())

    async def get_or_compute(
        self,
        request: CacheableRequest,
        compute: AsyncCompute,
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
        """Return the cached response, or have it computed: once, whoever asks for it meanwhile on any worker or host.

        A caller that is cancelled, or whose time is up, stops waiting; the computation goes on for the others.

        Args:
            request: What is asked.
            compute: Computes the response; called on this event loop, without arguments, if this caller is the one.
            l1_ttl: As for store().
            l2_ttl: As for store().
            tags: As for store().
            timeout: Seconds to wait at most; None: as long as it takes.
            stale_while_revalidate: Seconds after its expiry for which the old response is returned at once while it is
                computed anew in the background.
            stale_if_error: Seconds after its expiry for which the old response is returned if the computation fails.
            ttl_jitter: Share of the ttls, 0 to 1, of which up to all is taken off at random: what was stored together
                does not expire together.
            negative_ttl: Seconds for which it is remembered that `compute` returned None; without it None is refused.

        Returns:
            The response; None only with negative_ttl.

        Raises:
            TimeoutError: The time is up.
            ComputeError: The computation failed in another process or on another event loop, or was cancelled.
            Whatever `compute` raised, to every caller of this event loop that waited for it; nothing is stored then.
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
        return (await self.fetch(found, compute, options, seconds_to_wait(timeout))).response

    async def invalidate(self, request: CacheableRequest) -> None:
        """Make a request's response void: on this host when this returns, on the others within moments."""
        await self._invalidate(key_invalidation(request))

    async def invalidate_tag(self, tag: str) -> None:
        """Make every response that was stored under a tag void."""
        await self._invalidate(tag_invalidation(tag))

    async def clear_all(self) -> None:
        """Make everything void, in Redis too; what costs the same however much that is."""
        await self._invalidate(Invalidation("all"))

    # ---- looking in ----

    async def health_check(self) -> CacheHealthStatus:
        """Ask both tiers whether they work; Redis has its operation timeout to answer."""
        redis = self._state().redis
        is_healthy = False
        if redis is not None:
            with contextlib.suppress(RedisTrouble):
                await redis.run(Call((b"PING",)))
                is_healthy = True
        return self._engine.health(is_healthy)

    async def l2_approximate_size(self) -> int:
        """Estimate how many responses Redis holds, exactly while they are few; the last estimate when it is away."""
        if self._engine.tier is None:
            return 0
        with contextlib.suppress(RedisTrouble):
            await self.perform(self._engine.measure_l2())
        return self._engine.slab._word(Word.L2_ENTRIES)

    # ---- beneath ----

    async def fetch(self, look: Look, compute: AsyncCompute, options: FetchOptions, timeout: float | None) -> Served:
        """Go on with get_or_compute() where L1 had no answer, for what is built on it."""
        stale = self._engine.fetching.stale_while_revalidating(look, options)
        if stale is not None:
            self._begin_revalidation(look, compute, options)
            return stale
        flight = self._share(look, compute, options)
        # Neither a caller that is cancelled nor one whose time is up takes the task with it.
        await asyncio.wait((flight.task,), timeout=timeout)
        if not flight.task.done():
            raise TimeoutError(f"no response within {timeout} s")
        if flight.task.cancelled():
            # Not CancelledError: nobody has cancelled this caller, and it would seem so to a task group around it.
            raise ComputeError("the computation was cancelled: by itself, or because the cache was closed")
        served = flight.task.result()
        if served.is_due:
            self._begin_revalidation(look, compute, options)
        return served

    def _begin_revalidation(self, look: Look, compute: AsyncCompute, options: FetchOptions) -> None:
        self._share(look, compute, msgspec.structs.replace(options, revalidates=True))

    def _share(self, look: Look, compute: AsyncCompute, options: FetchOptions) -> _LocalFlight:
        """Return this loop's flight of the key, started if there is none that may still be joined."""
        state = self._state()
        flight = state.flights.get(look.key)
        # 1 A computes K  2 invalidate(K) returns  3 B asks for K: what A computes is too old for B.
        if flight is not None and not self._core.has_overtaken(flight.begun, look.key, flight.tags):
            if not options.revalidates:
                self._engine.slab._count(Counter.COALESCED)
            return flight
        loop = asyncio.get_running_loop()
        # A loop that is not run, between two run_until_complete() or for ever, must not hold up other processes.
        steps = self._engine.fetching.fetch(look.key, options, is_driven=loop.is_running)
        task = loop.create_task(self.perform(steps, compute))
        flight = _LocalFlight(task, look.begun, options.tags)
        state.flights[look.key] = flight
        state.tasks.add(task)

        def forget(done: asyncio.Task[Served]) -> None:
            state.tasks.discard(done)
            if state.flights.get(look.key) is flight:
                del state.flights[look.key]
            if not done.cancelled():
                done.exception()  # whoever still waits gets it; nobody else is to be told

        task.add_done_callback(forget)
        return flight

    async def _invalidate(self, what: Invalidation) -> None:
        await self.perform(self._engine.invalidator.invalidate(what))

    async def perform(self, steps: Steps[Any], compute: AsyncCompute | None = None) -> Any:
        """Run an operation of the engine on this event loop."""
        await self._open_once()
        call = None if compute is None else _awaiting(compute)
        return await perform_async(steps, AsyncWorld(self._state().redis, self._wait, call))

    async def _open_once(self) -> None:
        """Open, unless that was done in this process: what begins before Redis was reached would be void there."""
        if not self._engine.is_open:
            await self.open()

    async def _wait(self, flight: WaitForFlight) -> None:
        await self._engine.waiters.wait(flight.record, flight.token, flight.seconds)

    def _state(self) -> _Loop:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            self._loops[loop] = state = _Loop(self._engine.new_client(AsyncRedisClient))
        return state


def _awaiting(compute: AsyncCompute) -> Callable[[], Awaitable[object]]:
    async def call() -> object:
        outcome = compute()
        return await outcome if inspect.isawaitable(outcome) else outcome

    return call
