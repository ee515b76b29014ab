"""Replays the recorded traces through the real slab and sets its hit ratios beside those of other policies.

    python bench/hitratio.py [--trace NAME] [--size N] [--jobs N] [--json FILE]

Each entry counts 1, the memory never limits, and a miss is followed by a set, as in the tables that come with the
traces. A second table has the same traces where the memory limits, as it does with the default `max_entries` and values
over 1 KiB: once all values are alike, and once they are of 100 B to 100 KiB, beside an LRU of as many bytes. Where the
traces are absent, a small synthetic one is replayed and no bar applies.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, SHARED, Bar, Provenance, at_least, at_most, write_results
from traces import SYNTHETIC, SYNTHETIC_ROWS, Row, read_keys, read_tables, synthetic_keys

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
BASELINE = "WTLFU climb"
LOOK_EVERY = 256  # requests between two looks at the number of residents
SMALLEST, LARGEST = 100, 100 * 1024
ALIKE_BYTES = 2048
MEMORY_SIZES = range(500, 6001)  # entries; fewer fit the smallest slab, more take long and tell the same
_POOL = random.Random(0).randbytes(LARGEST)
SizeOf = Callable[[int], int]


def _keys(folder: Path, trace: str) -> Sequence[int]:
    return synthetic_keys() if trace == SYNTHETIC else read_keys(folder / f"{trace}.trace.gz")


def _request(
    slab: SharedSlab, keys: Sequence[int], value_of: Callable[[int], bytes], look: Callable[[], int]
) -> tuple[int, int]:
    """Looks up each key and sets what misses; how many were hits, and the most that `look` saw now and then."""
    get, store = slab.get, slab.set
    hits = most = 0
    for number, key in enumerate(keys):
        name_of_key = b"%d" % key
        if get(name_of_key) is not None:
            hits += 1
        else:
            store(name_of_key, value_of(key))
        if number % LOOK_EVERY == 0:
            most = max(most, look())
    return hits, most


def replay(keys: Sequence[int], size: int) -> dict[str, Any]:
    """One trace at one size: percent of hits, and the most entries that were ever seen resident."""
    name = f"hitratio-{os.getpid()}-{time.monotonic_ns()}"
    config = SlabConfig(memory_bytes=16 * MiB + 1024 * size, max_entries=size, ttl=None, max_value_bytes=4096)
    begin = time.monotonic()
    with SharedSlab(name, config) as slab:
        try:
            hits, most = _request(slab, keys, lambda _: b"x", slab.__len__)
            stats = slab.stats()
            problems = slab.check()
        finally:
            slab.unlink()
    return {
        "hit_percent": 100 * hits / len(keys),
        "most_entries": max(most, stats.entries),
        "refusals": stats.refusals,
        "check": problems,
        "seconds": round(time.monotonic() - begin, 2),
    }


def _replay_row(task: tuple[Path, Row]) -> dict[str, Any]:
    folder, row = task
    return replay(_keys(folder, row.trace), row.size)


def alike(_: int) -> int:
    return ALIKE_BYTES


@functools.lru_cache(maxsize=1 << 18)
def log_uniform(key: int) -> int:
    """Always the same for a key."""
    return int(math.exp(random.Random(key).uniform(math.log(SMALLEST), math.log(LARGEST))))


def _slab_config(memory_bytes: int) -> SlabConfig:
    return SlabConfig(memory_bytes=memory_bytes, ttl=None, max_value_bytes=LARGEST)


def _entries_in(memory_bytes: int, size_of: SizeOf) -> int:
    """Residents of a slab that was filled twice over."""
    with SharedSlab(f"hitratio-{os.getpid()}-{time.monotonic_ns()}", _slab_config(memory_bytes)) as slab:
        try:
            written = key = 0
            while written < 2 * memory_bytes:
                slab.set(b"%d" % key, _POOL[: size_of(key)])
                written += size_of(key)
                key += 1
            return len(slab)
        finally:
            slab.unlink()


def memory_for(entries: int, size_of: SizeOf) -> int:
    """So many bytes of memory hold about so many entries, with the default `max_entries`."""
    mean = statistics.mean(size_of(key) for key in range(2000)) + 128
    memory_bytes = int(MiB + entries * mean)
    for _ in range(4):
        memory_bytes = max(MiB, memory_bytes + int((entries - _entries_in(memory_bytes, size_of)) * mean))
    return memory_bytes


def _lru_hits(keys: Sequence[int], size_of: SizeOf, payload_bytes: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = used = 0
    for key in keys:
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        held[key] = None
        used += size_of(key)
        while used > payload_bytes:
            used -= size_of(held.popitem(last=False)[0])
    return hits


def replay_memory(keys: Sequence[int], entries: int, size_of: SizeOf) -> dict[str, Any]:
    """One trace in a slab whose memory limits: percent of hits, and those of an LRU that holds as many bytes."""
    memory_bytes = memory_for(entries, size_of)
    with SharedSlab(f"hitratio-{os.getpid()}-{time.monotonic_ns()}", _slab_config(memory_bytes)) as slab:
        try:
            hits, most_bytes = _request(
                slab, keys, lambda key: _POOL[: size_of(key)], lambda: slab.stats().payload_bytes
            )
            problems = slab.check()
        finally:
            slab.unlink()
    return {
        "memory_bytes": memory_bytes,
        "hit_percent": 100 * hits / len(keys),
        "lru_percent": 100 * _lru_hits(keys, size_of, most_bytes) / len(keys),
        "check": problems,
    }


def _replay_memory_row(task: tuple[Path, Row]) -> dict[str, Any]:
    folder, row = task
    keys = _keys(folder, row.trace)
    return {
        "trace": row.trace,
        "size": row.size,
        "alike": replay_memory(keys, row.size, alike),
        "mixed": replay_memory(keys, row.size, log_uniform),
    }


def replay_all_memory(folder: Path, rows: list[Row], jobs: int) -> list[dict[str, Any]]:
    chosen = [(folder, row) for row in rows if row.size in MEMORY_SIZES]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_replay_memory_row, chosen, chunksize=1)


def _print_memory_table(results: list[dict[str, Any]], by_entries: dict[tuple[str, int], float]) -> None:
    columns = ("by entries", f"{ALIKE_BYTES} B each", "100 B-100 KiB", "LRU, the same")
    print("\nwhere the memory limits\n" + f"{'trace':24}{'size':>8}" + "".join(f"{column:>16}" for column in columns))
    for one in results:
        figures = (
            by_entries[one["trace"], one["size"]],
            one["alike"]["hit_percent"],
            one["mixed"]["hit_percent"],
            one["mixed"]["lru_percent"],
        )
        print(f"{one['trace']:24}{one['size']:>8}" + "".join(f"{figure:>16.1f}" for figure in figures))


def compare_memory(results: list[dict[str, Any]], by_entries: dict[tuple[str, int], float]) -> list[Bar]:
    """Our own bars: that it is the memory that limits must cost next to nothing, and beat LRU where sizes differ."""
    if not results:
        return []
    losses = [one["alike"]["hit_percent"] - by_entries[one["trace"], one["size"]] for one in results]
    gain = statistics.mean(one["mixed"]["hit_percent"] - one["mixed"]["lru_percent"] for one in results)
    return [
        at_least(
            f"memory limits, values alike: points to where entries do, {len(results)} pairs",
            statistics.mean(losses),
            -1.0,
        ),
        at_least("the same, the worst pair", min(losses), -4.0),
        at_least(f"memory limits, sizes mixed: mean gain over LRU, points, {len(results)} pairs", gain, 0.5),
    ]


def replay_all(folder: Path, rows: list[Row], jobs: int) -> list[dict[str, Any]]:
    """In the order of `rows`; the largest ones start first."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].trace != "arc_oltp", -rows[i].size))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        results = pool.map(_replay_row, [(folder, rows[i]) for i in order], chunksize=1)
    by_row = dict(zip(order, results, strict=True))
    return [by_row[i] for i in range(len(rows))]


def _print_tables(rows: list[Row], results: list[dict[str, Any]]) -> None:
    trace = ""
    for row, result in zip(rows, results, strict=True):
        if row.trace != trace:
            trace = row.trace
            print(f"\n{trace}\n{'size':>8}{'slab':>8}" + "".join(f"{column:>13}" for column in row.percent))
        figures = (
            f"{percent:.1f}{'*' if column == row.best_online else ' '}" for column, percent in row.percent.items()
        )
        print(f"{row.size:>8}{result['hit_percent']:>8.1f}" + "".join(f"{figure:>13}" for figure in figures))


def compare(rows: list[Row], results: list[dict[str, Any]]) -> list[Bar]:
    """The bars, over the pairs of at least 100 entries."""
    pairs = [(row, result["hit_percent"]) for row, result in zip(rows, results, strict=True)]
    overfull = max(result["most_entries"] - row.size for row, result in zip(rows, results, strict=True))
    bars = [at_most("residents beyond max_entries, at any moment", overfull, 0)]
    judged = [(row, ours) for row, ours in pairs if row.size >= 100 and BASELINE in row.percent]
    if judged:
        gain = statistics.mean(ours - row.percent[BASELINE] for row, ours in judged)
        bars.append(at_least(f"mean gain over '{BASELINE}', points, {len(judged)} pairs", gain, 0.5))
    rated = [(ours - best, row) for row, ours in pairs if (best := row.best_online_percent) is not None]
    if rated:
        distance, row = min(rated, key=lambda pair: pair[0])
        bars.append(
            at_least(f"worst distance to the best online ({row.trace} {row.size}, {row.best_online})", distance, -6.0)
        )
    for row, ours in pairs:
        if row.trace == "mooncake_conversation" and row.size in (18_279, 36_558):
            bars.append(at_least(f"{row.trace} {row.size}: distance to LRU", ours - row.percent["LRU"], -3.0))
    return bars


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, default=SHARED / "traces", help="folder of *.trace.gz and README.md (%(default)s)"
    )
    parser.add_argument("--trace", help="only this one")
    parser.add_argument("--size", type=int, help="only this size (any one, with --trace)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--json", type=Path, default=None, help="result file (default: docs/results/hitratio.json for a full run)"
    )
    return parser.parse_args()


def _chosen_rows(arguments: argparse.Namespace) -> list[Row]:
    readme = arguments.traces / "README.md"
    rows = read_tables(readme) if readme.exists() else SYNTHETIC_ROWS
    if arguments.trace is not None:
        rows = [row for row in rows if row.trace == arguments.trace]
    if arguments.size is not None:
        in_table = [row for row in rows if row.size == arguments.size]
        rows = in_table or ([Row(arguments.trace, arguments.size, {}, None)] if arguments.trace else [])
    if not rows:
        raise SystemExit("no such trace and size")
    return rows


def main() -> int:
    arguments = _arguments()
    provenance = Provenance()
    rows = _chosen_rows(arguments)
    results = replay_all(arguments.traces, rows, arguments.jobs)
    _print_tables(rows, results)
    print()
    whole = arguments.trace is None and arguments.size is None and rows is not SYNTHETIC_ROWS
    path = arguments.json or (RESULTS / "hitratio.json" if whole else None)
    pairs = [
        {"trace": row.trace, "size": row.size, "best_online": row.best_online, "others": row.percent, **result}
        for row, result in zip(rows, results, strict=True)
    ]
    by_entries = {(row.trace, row.size): result["hit_percent"] for row, result in zip(rows, results, strict=True)}
    memory = replay_all_memory(arguments.traces, rows, arguments.jobs)
    _print_memory_table(memory, by_entries)
    checked = [*results, *(one[kind] for one in memory for kind in ("alike", "mixed"))]
    broken = [line for result in checked for line in result["check"]]
    print(*broken, sep="\n", end="\n" if broken else "")
    bars = [*compare(rows, results), *(compare_memory(memory, by_entries) if whole else [])]
    met = write_results(path, provenance, {"pairs": pairs, "memory": memory}, bars)
    return 0 if met and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
