"""The slab's speed beside the copy floor and beside other caches: ratios, measured in one run, on one pinned core.

    python bench/slab.py [--quick] [--json FILE]

Every figure is the median over rounds in which the contestants take turns; a ratio is the median of the rounds' ratios,
so that a slow spell of the machine meets both sides of it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from copyfloor import CopyFloor
from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from rivals import DISTRIBUTIONS, Contestant, Slab, contestants
from scaling import measure_scaling
from tail import measure_tail
from workload import KEYS, Workload, hex_key, nanoseconds_per_call, payload, pin

SIZES = (256, 1024, 4096, 16384)
MANY = 32
FLOOR = "copy floor"
GET_MANY = f"get_many({MANY})"
GATHERED = f"{{key: get(key) for {MANY} keys}}"  # what get_many() takes the place of
Rounds = dict[str, list[float]]  # ns a call (a key, for get_many), one figure a round


def _strings(contestant: Contestant, keys: Sequence[bytes]) -> Sequence[Any]:
    return [key.decode() for key in keys] if contestant.str_keys else keys


Pass = Callable[[], float]  # one timed pass: ns a call


def _floor_pass(floor: CopyFloor, sequence: Sequence[bytes]) -> float:
    floor.rewind()
    return nanoseconds_per_call(floor.copy, sequence)


def _many_pass(slab: Slab, batches: list[list[bytes]]) -> float:
    get_many = slab.slab.get_many
    begin = perf_counter_ns()
    for batch in batches:
        get_many(batch)
    return (perf_counter_ns() - begin) / (MANY * len(batches))


def _gathering_pass(slab: Slab, batches: list[list[bytes]]) -> float:
    get = slab.slab.get
    begin = perf_counter_ns()
    for batch in batches:
        {key: get(key) for key in batch}
    return (perf_counter_ns() - begin) / (MANY * len(batches))


def _take_turns(passes: dict[str, Pass], rounds: int) -> Rounds:
    """Each round begins with another contestant. Each runs once untimed just before: nobody pays for the caches that
    the one before it has used up, or lives on what another pass over the same data has loaded.
    """
    results: Rounds = {name: [] for name in passes}
    names = list(passes)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            passes[name]()
            results[name].append(passes[name]())
    return results


def _check_that_all_hit(contestant: Contestant, keys: Sequence[Any], size: int) -> None:
    get = contestant.get
    for key in keys:
        value = get(key)
        if not isinstance(value, bytes) or len(value) != size:
            raise SystemExit(f"{contestant.name} lost a key of the workload: the comparison would be void")


def measure_gets(workload: Workload, size: int, rounds: int) -> tuple[Rounds, list[str]]:
    floor = CopyFloor(workload, size)
    present, absent = contestants(2 * KEYS, size)
    slab = present[0]
    assert isinstance(slab, Slab)
    batches = [workload.sequence[i : i + MANY] for i in range(0, len(workload.sequence) - MANY, MANY)]
    passes: dict[str, Pass] = {
        FLOOR: partial(_floor_pass, floor, workload.sequence),
        GET_MANY: partial(_many_pass, slab, batches),
        GATHERED: partial(_gathering_pass, slab, batches),
    }
    keys: dict[bool, Sequence[Any]] = {True: [key.decode() for key in workload.keys], False: workload.keys}
    try:
        for one in present:
            mine = keys[one.str_keys]
            one.fill((key, payload(size, number)) for number, key in enumerate(mine))
            _check_that_all_hit(one, mine, size)
            asked = [mine[rank] for rank in workload.ranks[: one.calls]]
            passes[one.name] = partial(nanoseconds_per_call, one.get, asked)
        return _take_turns(passes, rounds), absent
    finally:
        for one in present:
            one.close()


def measure_sets(size: int, rounds: int, calls: int) -> Rounds:
    """New keys into full caches: each set evicts, where the cache evicts. LMDB, Redis and diskcache, which would only
    grow, overwrite the keys that they have."""
    present, _ = contestants(KEYS, size)
    value = payload(size, 0)
    evicting = {"slab", "warp_cache", "cachebox"}
    results: Rounds = {one.name: [] for one in present}
    first = [hex_key(i) for i in range(KEYS)]
    try:
        for one in present:
            one.fill((key, value) for key in _strings(one, first))
        for number in range(rounds + 1):
            fresh = [hex_key(KEYS + number * calls + i) for i in range(calls)]
            for one in present[number % len(present) :] + present[: number % len(present)]:
                keys = fresh if one.name in evicting else first
                results[one.name].append(one.time_stores(_strings(one, keys[: one.calls]), value))
        _require_evictions(present[0], (rounds + 1) * calls)
    finally:
        for one in present:
            one.close()
    return {name: figures[1:] for name, figures in results.items()}


def _require_evictions(slab: Contestant, sets: int) -> None:
    assert isinstance(slab, Slab)
    stats = slab.slab.stats()
    if stats.evictions < sets * 0.95:
        raise SystemExit(f"only {stats.evictions} evictions in {sets} sets: the slab was not at capacity")


def ratio(results: Rounds, above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(results[above], results[below], strict=True))


def get_bars(results: Rounds) -> list[Bar]:
    bars = [at_most("get of 1 KiB / copy floor", ratio(results, "slab", FLOOR), 1.7)]
    for rival, times in (("lmdb", 3.0), ("warp_cache", 1.7), ("diskcache", 25.0), ("redis-py", 80.0)):
        if rival in results:
            bars.append(at_least(f"get of 1 KiB: times faster than {rival}", ratio(results, rival, "slab"), times))
    if "cachebox" in results:
        bars.append(at_most("get of 1 KiB / cachebox", ratio(results, "slab", "cachebox"), 2.5))
    bars.append(
        at_most(f"{GET_MANY} a key / get, its values gathered in a dict", ratio(results, GET_MANY, GATHERED), 1.0)
    )
    bars.append(at_most(f"{GET_MANY} a key / get, its values thrown away", ratio(results, GET_MANY, "slab"), 1.0))
    return bars


def set_bars(sets: Rounds, gets: Rounds) -> list[Bar]:
    both = {**sets, "get": gets["slab"]}
    bars = [at_most("set of 1 KiB at capacity / get", ratio(both, "slab", "get"), 4.0)]
    for rival, times in (("lmdb", 4.0), ("warp_cache", 1.0)):
        if rival in sets:
            bars.append(
                at_least(f"set of 1 KiB at capacity: times faster than {rival}", ratio(sets, rival, "slab"), times)
            )
    return bars


def scaling_bars(scaling: dict[str, Any]) -> list[Bar]:
    return [
        at_least("scaling to two readers / the floor's", scaling["slab_over_floor"], 0.95),
        at_least("the same while one sets 1,000 other keys a second", scaling["writing_over_floor"], 0.90),
    ]


def tail_bars(tail: dict[str, Any]) -> list[Bar]:
    surplus = tail["over_1_ms"] - tail["empty_loop_over_1_ms"]
    return [
        at_most("p99.99 of sets at capacity, us", tail["p9999_us"], 1000.0),
        at_most("sets over 1 ms beyond those of an empty loop", float(surplus), 20.0),
    ]


def _medians(results: Rounds) -> dict[str, float]:
    return {name: round(statistics.median(figures), 1) for name, figures in results.items()}


def _print_table(title: str, columns: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(columns.values())))
    print(f"\n{title}\n{'':<14}" + "".join(f"{column:>12}" for column in columns))
    for name in names:
        print(f"{name:<14}" + "".join(f"{figures[name]:>12,.0f}" for figures in columns.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: shows that it runs, not how fast")
    parser.add_argument("--json", type=Path, default=RESULTS / "slab.json", help="result file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--core", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quick = arguments.quick
    provenance = Provenance(arguments.seed, DISTRIBUTIONS)
    everywhere = os.sched_getaffinity(0)
    pin(arguments.core)
    rounds = 2 if quick else max(arguments.rounds, 7)
    workload = Workload.zipf(arguments.seed, 10_000 if quick else 100_000)
    measured = {size: measure_gets(workload, size, rounds) for size in ((1024,) if quick else SIZES)}
    gets = {size: results for size, (results, _) in measured.items()}
    sets = measure_sets(1024, rounds, 15_000 if quick else 50_000)
    tail = measure_tail(20_000 if quick else 1_000_000)
    os.sched_setaffinity(0, everywhere)
    scaling = measure_scaling(workload, 1024, rounds, 0.05 if quick else 0.2, rounds if quick else 24)

    _print_table("get, ns", {f"{size} B": _medians(results) for size, results in gets.items()})
    _print_table("set at capacity, ns", {"1024 B": _medians(sets)})
    for title, figures in (("two processes", scaling), ("tail of sets at capacity", tail)):
        print(f"\n{title}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))
    bars = get_bars(gets[1024]) + set_bars(sets, gets[1024]) + scaling_bars(scaling) + tail_bars(tail)
    absent = measured[1024][1]
    print(*(f"left out: {line}" for line in absent), "", sep="\n")
    results = {
        "quick": quick, "rounds": rounds, "absent": absent, "scaling": scaling, "tail": tail,
        "get_ns": {str(size): _medians(one) for size, one in gets.items()},
        "set_ns": {"1024": _medians(sets)},
        "get_rounds_ns": {str(size): one for size, one in gets.items()}, "set_rounds_ns": {"1024": sets},
    }  # fmt: skip
    met = write_results(arguments.json, provenance, results, bars)
    return 0 if met or quick else 1


if __name__ == "__main__":
    sys.exit(main())
