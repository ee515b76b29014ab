"""Replays the recorded traces through the real slab and sets its hit ratios beside those of other policies.

    python bench/hitratio.py [--trace NAME] [--size N] [--jobs N] [--json FILE]

Each entry counts 1, the memory never limits, and a miss is followed by a set, as in the tables that come with the
traces. Where the traces are absent, a small synthetic one is replayed and no bar applies.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, SHARED, Bar, Provenance, at_least, at_most, write_results
from traces import SYNTHETIC, SYNTHETIC_ROWS, Row, read_keys, read_tables, synthetic_keys

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
BASELINE = "WTLFU climb"
LOOK_EVERY = 256  # requests between two looks at the number of residents


def _keys(folder: Path, trace: str) -> Sequence[int]:
    return synthetic_keys() if trace == SYNTHETIC else read_keys(folder / f"{trace}.trace.gz")


def replay(keys: Sequence[int], size: int) -> dict[str, Any]:
    """One trace at one size: percent of hits, and the most entries that were ever seen resident."""
    name = f"hitratio-{os.getpid()}-{time.monotonic_ns()}"
    config = SlabConfig(memory_bytes=16 * MiB + 1024 * size, max_entries=size, ttl=None, max_value_bytes=4096)
    begin = time.monotonic()
    hits = most = 0
    with SharedSlab(name, config) as slab:
        try:
            get, store = slab.get, slab.set
            for number, key in enumerate(keys):
                name_of_key = b"%d" % key
                if get(name_of_key) is not None:
                    hits += 1
                else:
                    store(name_of_key, b"x")
                if number % LOOK_EVERY == 0:
                    most = max(most, len(slab))
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
    broken = [line for result in results for line in result["check"]]
    print(*broken, sep="\n", end="\n" if broken else "")
    met = write_results(path, provenance, {"pairs": pairs}, compare(rows, results))
    return 0 if met and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
