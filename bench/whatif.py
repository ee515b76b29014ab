"""Sets the answers of `stats --what-if` beside real replays at half, twice and four times the entries.

    python bench/whatif.py [--trace NAME] [--size N] [--jobs N] [--json FILE]

Each trace is replayed through the real slab at each size N of the tables that come with the traces, and the answer is
taken at the end; it is compared with real replays at N/2, 2N and 4N, over the same requests: those that the answer says
it is about. Twice: as the command answers ("rule": 96 to 224 live sampled keys per shard, about 1 % of a large one),
and with all but 1 % of the keys left out of the sample ("1 %"). Where the traces are absent, a small synthetic one
is replayed and no bar applies.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from provenance import RESULTS, SHARED, Bar, Provenance, at_least, at_most, write_results
from traces import SYNTHETIC, SYNTHETIC_ROWS, read_keys, read_tables, synthetic_keys

from llm_edge_cache import SharedSlab, SlabConfig
from llm_edge_cache.whatif import FACTORS, Answer, estimate, read_history

MiB = 1024 * 1024
SHARES = {"rule": 1.0, "1 %": 0.01}
BOUND = 2.0  # points
LARGE = 10_000  # entries, of which 1 % are enough keys by themselves

Pair = tuple[str, int]  # trace, entries


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One trace at one size."""

    hits: bytes  # of each request: 1 or 0
    answers: dict[str, Answer | None]  # by name of the share
    seconds: dict[str, float]  # that the answer took

    def percent(self, last: int) -> float:
        """Of hits, over so many requests at the end."""
        return 100 * self.hits.count(1, len(self.hits) - last) / last


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One answer beside the truth."""

    trace: str
    entries: int
    factor: float
    sample: str
    sampled_share: float
    sampled_keys: int
    is_whole: bool
    lookups: int
    answer_percent: float | None  # None: "not known yet"
    margin_percent: float | None
    real_percent: float

    @property
    def error(self) -> float:
        assert self.answer_percent is not None
        return self.answer_percent - self.real_percent


def _keys(folder: Path, trace: str) -> Sequence[int]:
    return synthetic_keys() if trace == SYNTHETIC else read_keys(folder / f"{trace}.trace.gz")


def replay(keys: Sequence[int], entries: int, *, asks: bool) -> Replayed:
    """Each entry counts 1, the memory never limits, and a miss is followed by a set."""
    config = SlabConfig(memory_bytes=16 * MiB + 1024 * entries, max_entries=entries, ttl=None, max_value_bytes=4096)
    hits = bytearray(len(keys))
    with SharedSlab(f"whatif-{os.getpid()}-{time.monotonic_ns()}", config) as slab:
        try:
            get, store = slab.get, slab.set
            for number, key in enumerate(keys):
                name = b"%d" % key
                if get(name) is not None:
                    hits[number] = 1
                else:
                    store(name, b"x")
            answers, seconds = _ask(slab) if asks else ({}, {})
        finally:
            slab.unlink()
    return Replayed(bytes(hits), answers, seconds)


def _ask(slab: SharedSlab) -> tuple[dict[str, Answer | None], dict[str, float]]:
    answers, seconds = {}, {}
    for name, share in SHARES.items():
        begin = time.monotonic()
        history = read_history(slab, time.monotonic_ns(), share)
        answers[name] = estimate(history) if history else None
        seconds[name] = round(time.monotonic() - begin, 3)
    return answers, seconds


def _replay_task(task: tuple[Path, Pair, bool]) -> Replayed:
    folder, (trace, entries), asks = task
    return replay(_keys(folder, trace), entries, asks=asks)


def at_factor(entries: int, factor: float) -> int:
    return max(int(entries * factor), 1)


def replay_all(folder: Path, pairs: list[Pair], jobs: int) -> dict[Pair, Replayed]:
    """The pairs, which answer, and those that they are compared with; the largest ones start first."""
    wanted = {(trace, at_factor(entries, factor)) for trace, entries in pairs for factor in FACTORS}
    order = sorted(wanted, key=lambda pair: (pair[0] != "arc_oltp", -pair[1]))
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        tasks = [(folder, pair, pair in pairs) for pair in order]
        return dict(zip(order, pool.map(_replay_task, tasks, chunksize=1), strict=True))


def compare(pairs: list[Pair], replayed: dict[Pair, Replayed]) -> list[Comparison]:
    found = []
    for trace, entries in pairs:
        for sample, answer in replayed[trace, entries].answers.items():
            for one in answer.estimates if answer else ():
                there = replayed[trace, at_factor(entries, one.factor)]
                known = one.hit_ratio is not None and one.margin is not None
                found.append(
                    Comparison(
                        trace=trace,
                        entries=entries,
                        factor=one.factor,
                        sample=sample,
                        sampled_share=answer.sampled_share,
                        sampled_keys=answer.sampled_keys,
                        is_whole=answer.is_whole,
                        lookups=answer.lookups,
                        answer_percent=100 * one.hit_ratio if known else None,
                        margin_percent=100 * one.margin if known else None,
                        real_percent=there.percent(min(answer.lookups, len(there.hits))),
                    )
                )
    return found


# ---- what is printed ----


def _cell(comparison: Comparison) -> str:
    if comparison.answer_percent is None:
        return "not known yet"
    if comparison.factor == 1.0:
        return f"{comparison.answer_percent:.1f}"
    return f"{comparison.answer_percent:.1f} ±{comparison.margin_percent:.1f} ({comparison.error:+.1f})"


def print_tables(comparisons: list[Comparison]) -> None:
    """In percent: the answer, its margin, and how far it is from the real replay."""
    for sample in SHARES:
        print(f"\nsample: {sample}\n{'trace':<24}{'entries':>8}{'sampled':>9}{'keys':>7}{'requests':>10}", end="")
        print("".join(f"{f'{factor:g} x':>21}" for factor in FACTORS))
        rows: dict[Pair, list[Comparison]] = {}
        for comparison in comparisons:
            if comparison.sample == sample:
                rows.setdefault((comparison.trace, comparison.entries), []).append(comparison)
        for (trace, entries), cells in rows.items():
            head = cells[0]
            print(
                f"{trace:<24}{entries:>8}{100 * head.sampled_share:>8.2f}%{head.sampled_keys:>7}"
                f"{head.lookups:>9}{'' if head.is_whole else '*'}" + "".join(f"{_cell(cell):>21}" for cell in cells)
            )
    print("\n* the last ones: the ring has forgotten what was before")


def _judged(comparisons: list[Comparison], sample: str, least_entries: int) -> list[Comparison]:
    return [
        comparison
        for comparison in comparisons
        if comparison.sample == sample
        and comparison.entries >= least_entries
        and comparison.factor != 1.0
        and comparison.answer_percent is not None
    ]


def _bars_of(judged: list[Comparison], what: str) -> list[Bar]:
    if not judged:
        return []
    errors = [abs(one.error) for one in judged]
    covered = [error <= (one.margin_percent or 0.0) for error, one in zip(errors, judged, strict=True)]
    within = [error <= BOUND for error in errors]
    return [
        at_most(f"{what}: mean error, points, {len(judged)} answers", statistics.mean(errors), 1.0),
        at_least(f"{what}: share of answers within {BOUND:g} points", statistics.mean(within), 0.9),
        at_least(f"{what}: share of answers within their own margin", statistics.mean(covered), 0.9),
    ]


def bars(comparisons: list[Comparison]) -> list[Bar]:
    rule = _judged(comparisons, "rule", 100)
    return _bars_of(rule, "rule, from 100 entries") + _bars_of(
        _judged(comparisons, "1 %", LARGE), f"1 %, from {LARGE:,} entries"
    )


# ---- the program ----


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--traces", type=Path, default=SHARED / "traces", help="folder of *.trace.gz and README.md (%(default)s)"
    )
    parser.add_argument("--trace", help="only this one")
    parser.add_argument("--size", type=int, help="only this size")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--json", type=Path, default=None, help="result file (default: docs/results/whatif.json for a full run)"
    )
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> tuple[list[Pair], bool]:
    """The pairs, and whether that is all there are."""
    readme = arguments.traces / "README.md"
    rows = read_tables(readme) if readme.exists() else SYNTHETIC_ROWS
    pairs = [(row.trace, row.size) for row in rows]
    chosen = [
        (trace, size) for trace, size in pairs if arguments.trace in (None, trace) and arguments.size in (None, size)
    ]
    if not chosen:
        raise SystemExit("no such trace and size")
    return chosen, rows is not SYNTHETIC_ROWS and chosen == pairs


def main() -> int:
    arguments = _arguments()
    provenance = Provenance()
    pairs, is_full = _chosen(arguments)
    replayed = replay_all(arguments.traces, pairs, arguments.jobs)
    comparisons = compare(pairs, replayed)
    print_tables(comparisons)
    print()
    slowest = max(seconds for pair in pairs for seconds in replayed[pair].seconds.values())
    results: dict[str, Any] = {
        "slowest_answer_seconds": slowest,
        "answers": [dataclasses.asdict(comparison) for comparison in comparisons],
    }
    path = arguments.json or (RESULTS / "whatif.json" if is_full else None)
    judged = bars(comparisons) if pairs[0][0] != SYNTHETIC else []
    return 0 if write_results(path, provenance, results, judged) else 1


if __name__ == "__main__":
    sys.exit(main())
