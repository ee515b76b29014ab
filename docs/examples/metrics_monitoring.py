"""What the cache counts: a day's traffic in a second, the snapshot, and what Prometheus would scrape.

python docs/examples/metrics_monitoring.py
"""

from __future__ import annotations

import os
import random
import time

from prometheus_client import CollectorRegistry, generate_latest

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, SyncCacheManager, TokenUsage, metrics

QUESTIONS = 200
REQUESTS = 2_000
SHOWN = ("llm_edge_requests", "llm_edge_cache_hits", "llm_edge_cache_tokens_saved", "llm_edge_cache_seconds_saved")


def ask_the_provider() -> CachedResponse:
    time.sleep(0.0005)
    return CachedResponse("An answer.", "gpt-4o-mini", TokenUsage(20, 60, 80))


def main() -> None:
    with SyncCacheManager(L1Config(name=f"metrics-{os.getpid()}", memory_bytes=8 << 20)) as cache:
        registry = CollectorRegistry()  # an application's own, or prometheus_client's default
        metrics.register(cache, registry)

        popularity = [1 / (rank + 1) for rank in range(QUESTIONS)]
        for rank in random.Random(1).choices(range(QUESTIONS), popularity, k=REQUESTS):
            cache.get_or_compute(CacheableRequest("gpt-4o-mini", f"Question {rank}?"), ask_the_provider)

        counts = cache.metrics_snapshot()
        print(f"requests        {counts.total_requests:>8,}")
        print(f"L1 hits         {counts.l1_hits:>8,}")
        print(f"L1 misses       {counts.l1_misses:>8,}")
        print(f"L1 writes       {counts.l1_writes:>8,}")
        print(f"hit rate        {counts.overall_hit_rate:>8.1%}")
        print(f"entries         {cache.l1_entry_count():>8,}")

        print("\nsome of what a scrape shows:")
        for line in generate_latest(registry).decode().splitlines():
            if line.startswith(
                ("llm_edge_requests", "llm_edge_cache_hits", "llm_edge_cache_tokens_saved", "llm_edge_cache_seconds")
            ):
                print(f"  {line}")
        cache.slab.unlink()


if __name__ == "__main__":
    main()
