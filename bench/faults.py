"""What a Redis in trouble costs a look-up, and how soon it serves again when the trouble is over.

    python bench/faults.py [--quick] [--trials N] [--json FILE]

For each fault and both managers, some times over: a cache in health is struck; look-ups of absent keys are timed until
the circuit breaker opens (the first calls), then while it is open; the fault is healed, and the clock runs until a
look-up is answered by Redis again, which is asked every millisecond. Beside each block of look-ups as many are timed in
a cache without Redis: the figure that is subtracted. A plain sleep of the same length tells how late timers are on this
machine. The fault ends at a random moment between two probes. The servers are real, the faults those of the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the servers, and the faults

from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from redis_troubles import OUTAGES, REFUSALS, Trouble

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheManager,
    L1Config,
    L2Config,
    SyncCacheManager,
    generate_cache_key,
)
from llm_edge_cache.breaker import OPEN_FROM, PROBE_INTERVAL_NS
from llm_edge_cache.regions import Counter, Word

MiB = 1 << 20
TIMEOUT_MS = 100.0  # L2Config's default operation timeout
CALLS = 300  # of each trial while the breaker is open
SLEEPS = 3  # of each trial, about as many as first calls
REFUSED = 30  # of each trial where it stays closed
GIVE_UP = 20.0  # seconds without service
KNOWN = CacheableRequest("model", "known")
RESTARTS = ("killed", "stopped")  # the faults whose return to service is the figure
DISTRIBUTIONS = ("redis", "hiredis")

_numbers = itertools.count()
_random = random.Random(0)


class Samples:
    """Durations of look-ups in ms, and of the same in a cache without Redis, by phase; seconds until service.

    And by how many ms a sleep as long as the first calls ended late, which is the machine's doing.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.later: list[float] = []
        self.alone: list[float] = []
        self.late: list[float] = []
        self.back: list[float] = []


def _absent() -> CacheableRequest:
    return CacheableRequest("model", f"absent {next(_numbers)}")


def _names(kind: str) -> tuple[L1Config, L1Config]:
    name = f"bench-faults-{os.getpid()}-{kind}-{next(_numbers)}"
    return L1Config(name=name, memory_bytes=4 * MiB), L1Config(name=f"{name}-alone", memory_bytes=4 * MiB)


def _is_open(cache: Any) -> bool:
    return bool(cache.slab._word(Word.BREAKER) >= OPEN_FROM)


def _forget(cache: Any) -> None:
    cache.slab.delete(generate_cache_key(KNOWN).encode())


# The two faces of one trial. What is timed is one call as a user makes it, on the event loop where there is one.


async def _timed(lookup: Callable[[CacheableRequest], Any]) -> float:
    request = _absent()
    start = time.perf_counter()
    found = lookup(request)
    if isinstance(found, Awaitable):
        await found
    return (time.perf_counter() - start) * 1000


async def _done(outcome: Any) -> Any:
    return await outcome if isinstance(outcome, Awaitable) else outcome


async def _trial(cache: Any, alone: Any, trouble: Trouble, is_outage: bool, samples: Samples) -> None:
    await _settled(cache._engine.tier.is_usable)
    await _done(cache.store(KNOWN, CachedResponse("x" * 1024, "model")))
    await _settled(lambda: cache._engine.queue.flush(0) and cache.slab._counter_sums()[Counter.L2_WRITES] > 0)
    for _ in range(20):
        await _timed(cache.lookup)
    trouble.strike()
    if not is_outage:
        for _ in range(REFUSED):
            samples.first.append(await _timed(cache.lookup))
            samples.alone.append(await _timed(alone.lookup))
        trouble.heal()
        return
    while not _is_open(cache):
        samples.first.append(await _timed(cache.lookup))
    for _ in range(SLEEPS):
        start = time.perf_counter()
        time.sleep(TIMEOUT_MS / 1000)
        samples.late.append((time.perf_counter() - start) * 1000 - TIMEOUT_MS)
    for _ in range(CALLS):
        samples.later.append(await _timed(cache.lookup))
        samples.alone.append(await _timed(alone.lookup))
    await asyncio.sleep(_random.uniform(0, PROBE_INTERVAL_NS / 1e9))  # at any moment between two probes
    trouble.heal()
    start = time.monotonic()
    while True:
        _forget(cache)
        if (await _done(cache.lookup(KNOWN))).is_hit or time.monotonic() - start > GIVE_UP:
            break
        await asyncio.sleep(0.001)
    samples.back.append(time.monotonic() - start)


async def _settled(is_so: Callable[[], Any]) -> None:
    end = time.monotonic() + GIVE_UP
    while not is_so():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


async def _async_trial(trouble: Trouble, is_outage: bool, samples: Samples) -> None:
    l1, l1_alone = _names("asyncio")
    async with CacheManager(l1, L2Config(trouble.url)) as cache, CacheManager(l1_alone) as alone:
        try:
            await _trial(cache, alone, trouble, is_outage, samples)
        finally:
            cache.slab.unlink()
            alone.slab.unlink()


def _sync_trial(trouble: Trouble, is_outage: bool, samples: Samples) -> None:
    l1, l1_alone = _names("threads")
    with SyncCacheManager(l1, L2Config(trouble.url)) as cache, SyncCacheManager(l1_alone) as alone:
        try:
            asyncio.run(_trial(cache, alone, trouble, is_outage, samples))
        finally:
            cache.slab.unlink()
            alone.slab.unlink()


def measure(fault: str, kind: str, trials: int) -> dict[str, Any]:
    """Strike, sit out and heal `trials` times."""
    samples = Samples()
    for _ in range(trials):
        with {**OUTAGES, **REFUSALS}[fault]() as trouble:
            if kind == "threads":
                _sync_trial(trouble, fault in OUTAGES, samples)
            else:
                asyncio.run(_async_trial(trouble, fault in OUTAGES, samples))
    alone = _quantile(samples.alone, 0.99)
    result: dict[str, Any] = {"fault": fault, "kind": kind, "trials": trials, "alone_p99_ms": round(alone, 4)}
    result |= _over("first", samples.first, alone) | _over("open", samples.later, alone)
    if samples.back:
        result |= {
            "sleep_late_p99_ms": round(_quantile(samples.late, 0.99), 3),
            "back_median_s": round(statistics.median(samples.back), 3),
            "back_p99_s": round(_quantile(samples.back, 0.99), 3),
            "back_s": [round(second, 3) for second in samples.back],
        }
    return result


def _over(phase: str, milliseconds: list[float], alone: float) -> dict[str, Any]:
    if not milliseconds:
        return {}
    return {
        f"{phase}_calls": len(milliseconds),
        f"{phase}_median_ms": round(statistics.median(milliseconds), 3),
        f"{phase}_p99_over_ms": round(_quantile(milliseconds, 0.99) - alone, 3),
    }


def _quantile(figures: list[float], share: float) -> float:
    """The smallest figure that at least this share of them is not above."""
    return sorted(figures)[math.ceil(len(figures) * share) - 1]


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    bars = []
    for row in rows:
        what = f"{row['fault']}, {row['kind']}"
        bars.append(at_most(f"{what}: p99 of first calls over L1 alone, ms", row["first_p99_over_ms"], TIMEOUT_MS))
        if "open_p99_over_ms" in row:
            bars.append(at_most(f"{what}: p99 with the breaker open over L1 alone, ms", row["open_p99_over_ms"], 1.0))
            bars.append(at_most(f"{what}: p99 until back in service, s", row["back_p99_s"], 2.0))
    bars.append(at_least("faults measured", len({row["fault"] for row in rows}), len(OUTAGES) + len(REFUSALS)))
    return bars


COLUMNS = {
    "L1 p99": "alone_p99_ms",
    "first": "first_median_ms",
    "first +": "first_p99_over_ms",
    "late": "sleep_late_p99_ms",
    "open +": "open_p99_over_ms",
    "back": "back_median_s",
    "back p99": "back_p99_s",
}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<22}{'':<10}" + "".join(f"{column:>10}" for column in COLUMNS))
    for row in rows:
        cells = ["-" if row.get(name) is None else f"{row[name]:.3f}" for name in COLUMNS.values()]
        print(f"{row['fault']:<22}{row['kind']:<10}" + "".join(f"{cell:>10}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one trial of two faults: shows that it runs")
    parser.add_argument("--trials", type=int, default=20, help="of a kill and of a stop; a quarter of the others")
    parser.add_argument("--json", type=Path, default=RESULTS / "faults.json", help="result file (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", help="this fault alone; may be repeated", choices=[*OUTAGES, *REFUSALS]
    )
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    _random.seed(arguments.seed)
    provenance = Provenance(arguments.seed, DISTRIBUTIONS)
    trials = 1 if arguments.quick else arguments.trials
    faults = arguments.only or (("killed", "full") if arguments.quick else (*OUTAGES, *REFUSALS))
    rows = [
        measure(fault, kind, trials if fault in RESTARTS else math.ceil(trials / 4))
        for fault in faults
        for kind in ("threads", "asyncio")
    ]
    print_table(rows)
    met = write_results(arguments.json, provenance, {"quick": arguments.quick, "rows": rows}, bars_of(rows))
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
