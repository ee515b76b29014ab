"""How soon an invalidation is heard of on another host: two processes, two slabs, one real Redis.

    python bench/invalidation.py [--quick] [--trials N] [--json FILE]

The other host's process stores a value in its L1 and looks at it without pause; this one invalidates. From the moment
at which the call begins, until the entry is gone there (one clock for both: they are on one machine). Beside it: how
long the call takes, and the round trip of a PING.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # redis_servers.py

from provenance import RESULTS, Provenance, at_most, write_results
from redis_servers import RedisServer

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, L2Config, SharedSlab, SyncCacheManager
from llm_edge_cache.keys import tier_key
from llm_edge_cache.redis_client import Call, RedisClient, parse_redis_url

CONTEXT = multiprocessing.get_context("spawn")
MILLISECOND = 1_000_000  # ns
NEVER = 5.0  # s


def _manager(name: str, url: str) -> SyncCacheManager:
    l1 = L1Config(memory_bytes=4 << 20, max_capacity=500, name=name)
    return SyncCacheManager(l1, L2Config(url, operation_timeout_ms=1000)).open()


def _watch(pipe: Connection, name: str, url: str) -> None:
    """The other host: for each request, when its entry was gone."""
    manager = _manager(name, url)
    while (text := pipe.recv()) is not None:
        request = CacheableRequest("model", text)
        manager.store(request, CachedResponse("x" * 1024, "model"))
        key, slab = tier_key(request), manager.slab
        pipe.send(key in slab)
        give_up = time.monotonic_ns() + int(NEVER * 1e9)
        while key in slab and time.monotonic_ns() < give_up:
            time.sleep(0.0001)  # the reader's thread needs the interpreter, too
        pipe.send(time.monotonic_ns())
    manager.close()


def measure(url: str, trials: int) -> dict[str, Any]:
    """Milliseconds over `trials` invalidations."""
    names = [f"bench-invalidation-{os.getpid()}-{host}" for host in "ab"]
    ours, theirs = CONTEXT.Pipe()
    other = CONTEXT.Process(target=_watch, args=(theirs, names[1], url), daemon=True)
    other.start()
    heard: list[float] = []
    calls: list[float] = []
    try:
        with _manager(names[0], url) as manager:
            for trial in range(trials + 5):
                ours.send(f"request {trial}")
                assert ours.recv(), "the other host did not store the value"
                time.sleep(0.001 * (trial % 50))  # at any moment of the reader's wait
                begin = time.monotonic_ns()
                manager.invalidate(CacheableRequest("model", f"request {trial}"))
                end = time.monotonic_ns()
                heard.append((ours.recv() - begin) / MILLISECOND)
                calls.append((end - begin) / MILLISECOND)
            ours.send(None)
            other.join(NEVER)
    finally:
        for name in names:
            if SharedSlab.exists(name):
                SharedSlab.attach(name).unlink()
    return {"trials": trials, "heard": _summary(heard[5:]), "call": _summary(calls[5:]), "ping": _ping(url)}


def _ping(url: str) -> dict[str, float]:
    milliseconds = []
    with RedisClient(parse_redis_url(url), operation_timeout=1.0) as client:
        for _ in range(500):
            begin = time.monotonic_ns()
            client.run(Call((b"PING",)))
            milliseconds.append((time.monotonic_ns() - begin) / MILLISECOND)
    return _summary(milliseconds)


def _summary(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "longest_ms": round(ordered[-1], 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--json", type=Path, default=RESULTS / "invalidation.json", help="default: %(default)s")
    arguments = parser.parse_args()
    provenance = Provenance(None, ("redis",))
    with RedisServer() as server:
        results = measure(server.url, 30 if arguments.quick else arguments.trials)
    for name in ("heard", "call", "ping"):
        print(f"{name:>6}: {results[name]}")
    bars = [
        at_most("heard of on the other host, median ms", results["heard"]["median_ms"], 100),
        at_most("heard of on the other host, p99 ms", results["heard"]["p99_ms"], 100),
    ]
    met = write_results(arguments.json, provenance, results, bars)
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
