"""Both tiers: two hosts, one Redis. What one stored the other finds, and what one invalidates is gone from both.

LLM_EDGE_CACHE_REDIS_URL=redis://127.0.0.1:6379 python docs/examples/distributed_cache.py

Both "hosts" are slabs of this machine; the cache cannot tell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

from llm_edge_cache import CacheableRequest, CachedResponse, CacheManager, L1Config, L2Config, load_settings


def host(name: str, l2: L2Config) -> CacheManager:
    return CacheManager(L1Config(name=f"distributed-cache-{os.getpid()}-{name}", memory_bytes=8 << 20), l2)


async def in_redis(cache: CacheManager, count: int) -> None:
    """Stores do not wait for Redis; this does."""
    while await cache.l2_approximate_size() < count:
        await asyncio.sleep(0.01)


async def gone(cache: CacheManager, request: CacheableRequest) -> None:
    """The other host hears of it within 100 ms."""
    while (await cache.lookup(request)).is_hit:
        await asyncio.sleep(0.005)


async def show(l2: L2Config) -> None:
    async with contextlib.AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(host(name, l2)) for name in ("one", "other")]
        health = await one.health_check()
        print(f"L1 healthy: {health.l1_healthy}, L2 healthy: {health.l2_healthy}")
        await one.clear_all()

        request = CacheableRequest("claude-sonnet", "What is shared memory?", namespace="example")
        await one.store(request, CachedResponse("Memory of several processes.", "claude-sonnet"), tags=["glossary"])
        await in_redis(one, 1)
        print(f"one stores; one finds it in {(await one.lookup(request)).tier}")
        print(f"other finds it in {(await other.lookup(request)).tier}, then in {(await other.lookup(request)).tier}")

        await one.invalidate_tag("glossary")
        await asyncio.wait_for(gone(other, request), 10)
        print("one invalidates the tag; it is gone from other as well")

        counts = other.metrics_snapshot()
        print(f"other: {counts.l1_hits} L1 hits, {counts.l2_hits} L2 hits, overall {counts.overall_hit_rate:.0%}")
        for cache in (one, other):
            cache.slab.unlink()


def main() -> int:
    l2 = load_settings().l2
    if l2 is None:
        print("set LLM_EDGE_CACHE_REDIS_URL to a Redis, e.g. redis://127.0.0.1:6379", file=sys.stderr)
        return 2
    asyncio.run(show(l2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
