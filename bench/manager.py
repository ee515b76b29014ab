"""The cache manager's speed beside its floors and beside litellm's cache: ratios in one run, on one pinned core.

    python bench/manager.py [--quick] [--json FILE]

Contestants take turns within a round; a ratio is the median over the rounds of the round's ratio, so that a slow spell
of the machine meets both sides of it. Needs the `bench` extra; what is not installed is left out and named.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import msgspec
from local_redis import LocalRedis
from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from workload import nanoseconds_per_call, pin

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheManager,
    L1Config,
    L1Hit,
    L2Config,
    L2Hit,
    SyncCacheManager,
    TokenUsage,
    generate_cache_key,
)
from llm_edge_cache.codec import Entry

FLOOR, SYNC, ASYNC, LITELLM = "sum of floors", "lookup, sync", "lookup, async", "litellm, local cache"
LOOKUP_L2, GET = "lookup, L2 hit", "redis-py GET"
DISTRIBUTIONS = ("msgspec", "redis", "hiredis", "litellm")
ANSWER = "x" * 1024
REQUESTS = 64
TIMEOUT_SECONDS = 2.0  # of a command to Redis, for both sides: a busy machine is to void no run
Fields = dict[str, Any]
Rounds = dict[str, list[float]]  # ns a call, one figure a round


def requests_of(seed: int) -> list[Fields]:
    """Chat requests with different questions, as fields: what a caller has in hand before there is a request."""
    generator = random.Random(seed)
    return [
        {
            "model": "gpt-4o",
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": f"What is {generator.random()} of the distance between two cities, in km?"},
            ],
            "temperature": 0.7,
            "max_tokens": 256,
        }
        for _ in range(REQUESTS)
    ]


def answer() -> CachedResponse:
    return CachedResponse(ANSWER, "gpt-4o", TokenUsage(40, 250, 290), finish_reason="stop")


def slab_name() -> str:
    return f"bench-manager-{os.getpid()}"


@contextmanager
def sync_manager(l2: L2Config | None = None) -> Iterator[SyncCacheManager]:
    with SyncCacheManager(L1Config(name=slab_name()), l2) as manager:
        try:
            yield manager
        finally:
            manager.slab.unlink()


# ---- an L1 hit ----


def floor_of(manager: SyncCacheManager, requests: list[Fields]) -> Callable[[Fields], object]:
    """The least that a hit is made of: encode the fields, hash them, get the bytes, decode them."""
    encode = msgspec.json.Encoder(order="sorted").encode
    decode = msgspec.msgpack.Decoder(Entry).decode
    get, sha256 = manager.slab.get, hashlib.sha256
    key = generate_cache_key(CacheableRequest(**requests[0])).encode()
    body = get(key) or b""

    def floor(fields: Fields) -> object:
        sha256(encode(fields)).hexdigest()
        get(key)
        return decode(body)

    return floor


def sync_hit(manager: SyncCacheManager) -> Callable[[Fields], object]:
    lookup, request = manager.lookup, CacheableRequest

    def hit(fields: Fields) -> object:
        return lookup(request(**fields))

    return hit


def async_pass(manager: CacheManager, asked: list[Fields]) -> Callable[[], float]:
    async def hits() -> float:
        lookup, request = manager.lookup, CacheableRequest

        async def hit(fields: Fields) -> object:
            return await lookup(request(**fields))

        begin = perf_counter_ns()
        for fields in asked:
            await hit(fields)
        return (perf_counter_ns() - begin) / len(asked)

    return lambda: asyncio.run(hits())


def litellm_hit() -> Callable[[Fields], object]:
    """litellm's completion with its in-process cache, as its documentation shows; the provider is its own mock.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # no network
    litellm: Any = importlib.import_module("litellm")
    caching: Any = importlib.import_module("litellm.caching.caching")
    litellm.cache = caching.Cache(type="local")

    def hit(fields: Fields) -> object:
        return litellm.completion(**fields, mock_response=ANSWER, caching=True)

    return hit


def _require_litellm_hits(hit: Callable[[Fields], Any], fields: Fields) -> None:
    first, second = hit(fields), hit(fields)
    if second.id != first.id or second.choices[0].message.content != ANSWER:
        raise SystemExit("litellm answered from its mock in place of its cache: the comparison would be void")


def measure_l1(requests: list[Fields], rounds: int, calls: int) -> tuple[Rounds, list[str]]:
    asked = [requests[number % len(requests)] for number in range(calls)]
    absent: list[str] = []
    with sync_manager() as manager:
        for fields in requests:
            manager.store(CacheableRequest(**fields), answer())
            assert isinstance(manager.lookup(CacheableRequest(**fields)), L1Hit)
        floor, hit = floor_of(manager, requests), sync_hit(manager)
        other = CacheManager(slab=manager.slab)
        passes: dict[str, Callable[[], float]] = {
            FLOOR: lambda: nanoseconds_per_call(floor, asked),
            SYNC: lambda: nanoseconds_per_call(hit, asked),
            ASYNC: async_pass(other, asked),
        }
        try:
            rival = litellm_hit()
        except ImportError as error:
            absent.append(f"litellm: {error}")
        else:
            for fields in requests:
                _require_litellm_hits(rival, fields)
            passes[LITELLM] = lambda: nanoseconds_per_call(rival, asked[: max(len(asked) // 100, 10)])
        before = manager.metrics_snapshot()
        results = take_turns(passes, rounds)
        after = manager.metrics_snapshot()
        expected = 2 * rounds * 2 * calls  # both faces; each pass once for the caches, once timed
        if (after.l1_hits - before.l1_hits, after.l1_misses - before.l1_misses) != (expected, 0):
            raise SystemExit("not every look-up was a counted hit: the comparison would be void")
    return results, absent


def take_turns(passes: dict[str, Callable[[], float]], rounds: int) -> Rounds:
    """Each round begins with another contestant; each runs once untimed just before it is timed."""
    results: Rounds = {name: [] for name in passes}
    names = list(passes)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            passes[name]()
            results[name].append(passes[name]())
    return results


# ---- an L2 hit ----


def measure_l2(requests: list[Fields], rounds: int, calls: int) -> Rounds:
    """Call by call in turns: an L2 hit, with L1 emptied of the key before, and a GET of the same record.

    A round's figure is the median of its calls: a call that was interrupted for a millisecond says nothing of either.
    """
    redis: Any = importlib.import_module("redis")
    no_retry = importlib.import_module("redis.retry").Retry(importlib.import_module("redis.backoff").NoBackoff(), 0)
    server = LocalRedis()
    try:
        l2 = L2Config(server.url, operation_timeout_ms=1000 * TIMEOUT_SECONDS)
        with sync_manager(l2) as manager:
            bare = redis.Redis(
                unix_socket_path=server.socket, protocol=2, retry=no_retry, socket_timeout=TIMEOUT_SECONDS
            )
            names = _fill_redis(manager, requests, l2.key_prefix)
            results: Rounds = {LOOKUP_L2: [], GET: []}
            for number in range(rounds + 1):
                figures = _l2_round(manager, bare.get, requests, names, calls)
                if number:  # the first is for the caches
                    for name, times in figures.items():
                        results[name].append(statistics.median(times))
            bare.close()
    finally:
        server.close()
    return results


def _fill_redis(manager: SyncCacheManager, requests: list[Fields], prefix: str) -> list[str]:
    for fields in requests:
        manager.store(CacheableRequest(**fields), answer())
    queue = manager._engine.queue
    assert queue is not None
    assert queue.flush(10)
    return [prefix + generate_cache_key(CacheableRequest(**fields)) for fields in requests]


def _l2_round(
    manager: SyncCacheManager, get: Callable[[str], bytes], requests: list[Fields], names: list[str], calls: int
) -> Rounds:
    lookup, delete, clock = manager.lookup, manager.slab.delete, perf_counter_ns
    keys = [generate_cache_key(CacheableRequest(**fields)).encode() for fields in requests]
    times: Rounds = {LOOKUP_L2: [], GET: []}
    for number in range(calls):
        place = number % len(requests)
        fields, name = requests[place], names[place]
        delete(keys[place])
        begin = clock()
        found = lookup(CacheableRequest(**fields))
        times[LOOKUP_L2].append(clock() - begin)
        begin = clock()
        record = get(name)
        times[GET].append(clock() - begin)
        if type(found) is not L2Hit or len(record) < len(ANSWER):
            raise SystemExit("a look-up was no L2 hit: the comparison would be void")
    return times


# ---- judging ----


def ratio(results: Rounds, above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(results[above], results[below], strict=True))


def bars_of(l1: Rounds, l2: Rounds) -> list[Bar]:
    more_us = statistics.median(a - b for a, b in zip(l1[ASYNC], l1[SYNC], strict=True)) / 1000
    bars = [
        at_most("L1 hit, sync / sum of its floors", ratio(l1, SYNC, FLOOR), 2.0),
        at_most("L1 hit, async: more than sync, us", more_us, 1.0),
        at_most("L2 hit, sync / bare redis-py GET of the same bytes", ratio(l2, LOOKUP_L2, GET), 1.5),
    ]
    if LITELLM in l1:
        bars.append(
            at_least("L1 hit, sync: times faster than litellm's cached completion", ratio(l1, LITELLM, SYNC), 100)
        )
    return bars


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "manager.json", help="result file (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=300, help="at least 7; short ones, so that most are not interrupted"
    )
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quick: bool = arguments.quick
    provenance = Provenance(arguments.seed, DISTRIBUTIONS)
    pin(arguments.core)
    rounds = 2 if quick else max(arguments.rounds, 7)
    requests = requests_of(arguments.seed)
    l1, absent = measure_l1(requests, rounds, 300)
    l2 = measure_l2(requests, rounds, 100)

    print("ns a call, median of the rounds")
    for name, figures in {**l1, **l2}.items():
        print(f"{name:<24}{statistics.median(figures):>12,.0f}")
    print(*(f"left out: {line}" for line in absent), "", sep="\n")
    results = {"quick": quick, "rounds": rounds, "absent": absent, "l1_rounds_ns": l1, "l2_rounds_ns": l2}
    met = write_results(arguments.json, provenance, results, bars_of(l1, l2))
    return 0 if met or quick else 1


if __name__ == "__main__":
    sys.exit(main())
