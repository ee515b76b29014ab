"""The targets that the original cache (the Rust crate llm-edge-cache) set itself, beside what is measured here.

    python bench/targets.py [--quick] [--json FILE]

The workload, stated because a hit rate means nothing without one: 5,000 different chat requests, asked for 50,000 times
by Zipf's law (exponent 0.99); cold start; both tiers with their defaults, so L1 holds 1,000 entries; what is missing
is stored; answers of 1 KiB; Redis on a Unix socket of this machine. Every look-up is timed, making the request and
its key included. The original says nothing of its workload, its machine or its percentile: p99 is held against it.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from local_redis import LocalRedis
from manager import answer, sync_manager
from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from workload import Workload

from llm_edge_cache import CacheableRequest, L2Config, MetricsSnapshot

QUESTIONS = 5_000
REQUESTS = 50_000
Times = dict[str, list[int]]  # by the tier that answered, ns


def run(seed: int, requests: int) -> tuple[Times, MetricsSnapshot]:
    """The workload through a SyncCacheManager with both tiers."""
    asked = Workload.zipf(seed, requests, QUESTIONS).ranks
    times: Times = defaultdict(list)
    server = LocalRedis()
    try:
        with sync_manager(L2Config(server.url)) as cache:
            for question in asked:
                fields = _fields(question)
                begin = perf_counter_ns()
                request = CacheableRequest(**fields)
                found = cache.lookup(request)
                times[found.tier or "miss"].append(perf_counter_ns() - begin)
                if not found.is_hit:
                    cache.store(request, answer())
            return times, cache.metrics_snapshot()
    finally:
        server.close()


def _fields(question: int) -> dict[str, Any]:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"What is the answer to question {question}?"},
    ]
    return {"model": "gpt-4o", "messages": messages, "temperature": 0.7, "max_tokens": 256}


def percentile_ms(times: list[int], share: float) -> float:
    return sorted(times)[min(int(len(times) * share), len(times) - 1)] / 1e6


def bars_of(times: Times, counts: MetricsSnapshot) -> list[Bar]:
    overall = 100 * counts.overall_hit_rate
    return [
        at_most("L1 latency < 1 ms: p99 of L1 hits, ms", percentile_ms(times["l1"], 0.99), 1.0),
        at_most("L1 latency typically < 0.1 ms: median of L1 hits, ms", percentile_ms(times["l1"], 0.5), 0.1),
        at_most("L2 latency 1-2 ms: p99 of L2 hits, ms", percentile_ms(times["l2"], 0.99), 2.0),
        at_least("overall hit rate > 50 % (its MVP)", overall, 50.0),
        at_least("overall hit rate > 70 % (its beta)", overall, 70.0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, default=RESULTS / "targets.json")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    provenance = Provenance(arguments.seed, ("msgspec", "redis", "hiredis"))
    times, counts = run(arguments.seed, 5_000 if arguments.quick else REQUESTS)
    for tier, figures in sorted(times.items()):
        p50, p99 = percentile_ms(figures, 0.5), percentile_ms(figures, 0.99)
        print(f"{tier:<6}{len(figures):>8,} look-ups   median {p50:.4f} ms   p99 {p99:.4f} ms")
    print(f"hit rate: L1 {counts.l1_hit_rate:.1%}, overall {counts.overall_hit_rate:.1%}\n")
    results = {
        "quick": arguments.quick,
        "questions": QUESTIONS,
        "requests": counts.total_requests,
        "l1_hit_rate": counts.l1_hit_rate,
        "overall_hit_rate": counts.overall_hit_rate,
        "latency_ms": {t: {p: percentile_ms(f, p) for p in (0.5, 0.9, 0.99, 0.999)} for t, f in sorted(times.items())},
    }
    met = write_results(arguments.json, provenance, results, bars_of(times, counts))
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
