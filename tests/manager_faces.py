"""Both managers behind one blocking face, so that one suite judges both; and what such suites look at."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine
from typing import Any

from redis_servers import wait_for

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheManager,
    L1Config,
    L2Config,
    SharedSlab,
    SyncCacheManager,
)
from llm_edge_cache.breaker import OPEN_FROM
from llm_edge_cache.engine import Engine
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter, Word

MiB = 1 << 20
AMPLE = {"operation_timeout_ms": 10_000, "connection_timeout_ms": 10_000}
"""Timeouts that do not pass, however slow the machine."""
HASTY = {"operation_timeout_ms": 200, "connection_timeout_ms": 1000}
"""Timeouts of tests in which they pass."""
KINDS = ("threads", "asyncio")


class _AsyncFace:
    """A CacheManager on an event loop of its own, in a thread of its own; its methods block."""

    def __init__(self, manager: CacheManager, *, debug: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(debug)
        self._thread = threading.Thread(target=self.loop.run_forever, name="async face", daemon=True)
        self._thread.start()
        self.manager = manager

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.manager, name)
        if not inspect.iscoroutinefunction(found):
            return found
        return lambda *args, **options: self._do(found(*args, **options))

    def close(self) -> None:
        self._do(self.manager.aclose())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(60)
        self.loop.close()


class Face:
    """A manager of either kind with SyncCacheManager's methods, and a view into it. A context manager.

    Args:
        kind: "threads" or "asyncio".
        name: The slab's.
        url: Redis's; None: there is none.
        l1: The first tier, in place of a small one of that name.
        slab: A slab for it.
        debug: Run the event loop in asyncio's debug mode.
        options: Further fields of L2Config; without them, Redis has ample time for everything.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        url: str | None = None,
        *,
        l1: L1Config | None = None,
        slab: SharedSlab | None = None,
        debug: bool = False,
        **options: Any,
    ) -> None:
        l1 = l1 or L1Config(name=name, memory_bytes=4 * MiB)
        l2 = None if url is None else L2Config(url, **{**AMPLE, **options})
        self.prefix = b"" if l2 is None else l2.key_prefix.encode()
        self.cache: Any = (
            SyncCacheManager(l1, l2, slab=slab)
            if kind == "threads"
            else _AsyncFace(CacheManager(l1, l2, slab=slab), debug=debug)
        )
        self.engine: Engine = self.cache._engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def __enter__(self) -> Face:
        self.cache.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.cache.close()

    # ---- what there is ----

    def count(self, *counters: Counter) -> int:
        sums = self.engine.slab._counter_sums()
        return sum(sums[counter] for counter in counters)

    def counts(self) -> dict[Counter, int]:
        sums = self.engine.slab._counter_sums()
        return {counter: sums[counter] for counter in Counter}

    def is_open(self) -> bool:
        """Whether the circuit breaker is."""
        return self.engine.slab._word(Word.BREAKER) >= OPEN_FROM

    def redis_name(self, request: CacheableRequest) -> bytes:
        return self.prefix + tier_key(request)

    # ---- steps that tests are made of ----

    def forget(self, request: CacheableRequest) -> None:
        """Let L1 lose what it has, as it does when an entry is evicted."""
        self.engine.slab.delete(tier_key(request))

    def put_in_redis(self, request: CacheableRequest, **options: Any) -> None:
        """Store the answer in Redis alone."""

        def is_written() -> bool:
            written = self.count(Counter.L2_WRITES)
            self.cache.store(request, answer(request), **options)
            self.flush()
            return self.count(Counter.L2_WRITES) > written

        wait_for(is_written, "the deferred write has arrived")
        self.forget(request)

    def flush(self) -> None:
        assert self.engine.queue is not None
        assert self.engine.queue.flush(20)

    def wait_usable(self) -> None:
        assert self.engine.tier is not None
        wait_for(self.engine.tier.is_usable, "Redis is in service")


def ask(prompt: str) -> CacheableRequest:
    return CacheableRequest("model", prompt)


def answer(request: CacheableRequest) -> CachedResponse:
    """The one right answer to a request."""
    return CachedResponse(f"answer to {request.prompt}", "model")


def judge(request: CacheableRequest, response: CachedResponse | None) -> bool:
    """Whether there is a response; that it is the right one is asserted."""
    assert response is None or response.content == answer(request).content
    return response is not None
