"""The first tier alone: ask, miss, store, ask again.

python docs/examples/basic_cache.py
"""

from __future__ import annotations

import asyncio
import os

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheManager,
    L1Config,
    TokenUsage,
    generate_cache_key,
    generate_short_key,
)


async def main() -> None:
    # A slab of this example's own; leave the name out and all workers of this host share one.
    async with CacheManager(L1Config(name=f"basic-cache-{os.getpid()}", memory_bytes=8 << 20)) as cache:
        request = CacheableRequest(
            "gpt-4o",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0.7,
            max_tokens=100,
        )
        print(f"key: {generate_cache_key(request)}")
        print(f"     {generate_short_key(request)} in logs")

        found = await cache.lookup(request)
        print(f"1st look-up: {type(found).__name__}")

        response = CachedResponse("Paris.", "gpt-4o", TokenUsage(14, 2, 16), finish_reason="stop")
        await cache.store(request, response)

        found = await cache.lookup(request)
        assert found.is_hit
        print(f"2nd look-up: {type(found).__name__}, {found.response.content!r}, {found.response.tokens}")

        warmer = request.with_temperature(0.9)
        print(f"at another temperature: {type(await cache.lookup(warmer)).__name__}")

        calls = 0

        async def ask_the_provider() -> CachedResponse:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0.05)
            return CachedResponse("Paris, the city of light.", "gpt-4o")

        answers = await asyncio.gather(*(cache.get_or_compute(warmer, ask_the_provider) for _ in range(20)))
        print(f"20 callers at once: {len(answers)} answers, {calls} call of the provider")

        await cache.invalidate(request)
        print(f"after invalidate: {type(await cache.lookup(request)).__name__}")

        health = await cache.health_check()
        print(f"healthy: {health.is_fully_healthy}; entries in L1: {cache.l1_entry_count()}")
        cache.slab.unlink()  # an example's memory is not to stay; yours is the warm cache of the next process


if __name__ == "__main__":
    asyncio.run(main())
