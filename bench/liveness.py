"""How long the others are held up when a worker is killed with SIGKILL inside its critical section.

    python bench/liveness.py [--quick] [--trials N] [--json FILE]

The victim is stopped at a random moment. Where that leaves everybody else waiting, it held a lock: it is killed, and
the clock runs until a waiter's call returns. Recovery itself is timed in trials in which nobody waits: the first call
that meets the dead owner's lock rebuilds a full shard, and its duration is the figure.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import RESULTS, Bar, Provenance, at_most, write_results
from workload import hex_key

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
VALUE = random.Random(0).randbytes(1024)
LARGE = random.Random(0).randbytes(8000)  # still copied under the lock: it is held for longer
CONTEXT = multiprocessing.get_context("fork")
MILLISECOND = 1_000_000  # ns
SETTLE = 0.003  # s; enough for the waiter to come to every shard
LONG = MILLISECOND  # a call that took this long waited, at least for SETTLE
NEVER = 2.0  # s; a waiter that is still held up then counts as hung


class Progress:
    """Calls that a child completed, and when the last long one ended: words that parent and child share."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._before = time.monotonic_ns()

    def completed(self) -> None:
        now = time.monotonic_ns()
        if now - self._before > LONG:
            self._words[1] = now
        self._before = now
        self._words[0] += 1

    @property
    def calls(self) -> int:
        return self._words[0]

    @property
    def long_call_ended(self) -> int:
        return self._words[1]


def _write_forever(slab: SharedSlab, names: list[bytes], value: bytes, completed: Callable[[], None]) -> None:
    slab.set(names[0], value)
    completed()
    for name in itertools.cycle(names):
        slab.set(name, value)


def _write_and_tell(slab: SharedSlab, names: list[bytes], value: bytes, completed: Callable[[], None]) -> None:
    for name in itertools.cycle(names):
        slab.set(name, value)
        completed()


def _start(role: Callable[..., None], slab: SharedSlab, names: list[bytes], value: bytes) -> tuple[Any, Progress]:
    """A child that has made its first call."""
    progress = Progress()
    process = CONTEXT.Process(target=role, args=(slab, names, value, progress.completed), daemon=True)
    process.start()
    while progress.calls == 0:
        time.sleep(0.0002)
    return process, progress


def _kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def _stop_at_random(process: Any, generator: random.Random) -> None:
    time.sleep(generator.uniform(0.002, 0.006))
    os.kill(process.pid, signal.SIGSTOP)


def hold_up(slab: SharedSlab, names: list[bytes], trials: int, generator: random.Random) -> dict[str, Any]:
    """Milliseconds from SIGKILL to the end of a waiter's call, over `trials` kills that left it waiting."""
    waiter, progress = _start(_write_and_tell, slab, generator.sample(names, 4000), VALUE)
    milliseconds: list[float] = []
    hangs = kills = 0
    while len(milliseconds) < trials:
        victim, _ = _start(_write_forever, slab, generator.sample(names, 1000), LARGE)
        _stop_at_random(victim, generator)
        time.sleep(SETTLE)
        before = progress.calls
        time.sleep(SETTLE)
        waiting = progress.calls == before
        recoveries = slab.stats().recoveries
        begin = time.monotonic_ns()
        os.kill(victim.pid, signal.SIGKILL)
        kills += 1
        if waiting:
            while progress.calls == before and time.monotonic_ns() - begin < NEVER * 1e9:
                time.sleep(0.00005)  # the waiter needs a processor more than this does; it tells the time itself
            hung = progress.calls == before
            hangs += hung
            if hung or slab.stats().recoveries > recoveries:  # else the scheduler, not the lock, kept the waiter
                milliseconds.append(((time.monotonic_ns() if hung else progress.long_call_ended) - begin) / MILLISECOND)
        victim.join()
    _kill(waiter)
    return {"trials": trials, "kills": kills, "hangs": hangs, **_summary(milliseconds)}


def recovery(slab: SharedSlab, names: list[bytes], trials: int, generator: random.Random) -> dict[str, Any]:
    """Milliseconds of the one call that rebuilt the dead owner's shard, by the clock and in processor time."""
    by_clock: list[float] = []
    by_processor: list[float] = []
    kills = 0
    while len(by_clock) < trials:
        victim, _ = _start(_write_forever, slab, generator.sample(names, 1000), LARGE)
        _stop_at_random(victim, generator)
        _kill(victim)
        kills += 1
        before = slab.stats().recoveries
        clock, processor = max(
            (_timed_set(slab, name) for name in generator.sample(names, 4000)), key=lambda pair: pair[1]
        )
        if slab.stats().recoveries > before:
            by_clock.append(clock)
            by_processor.append(processor)
    return {"trials": trials, "kills": kills, **_summary(by_clock), "processor_time": _summary(by_processor)}


def _timed_set(slab: SharedSlab, name: bytes) -> tuple[float, float]:
    begin, begin_processor = time.monotonic_ns(), time.thread_time_ns()
    slab.set(name, VALUE)
    return (time.monotonic_ns() - begin) / MILLISECOND, (time.thread_time_ns() - begin_processor) / MILLISECOND


def _summary(milliseconds: list[float]) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "median_ms": round(statistics.median(ordered), 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 3),
        "longest_ms": round(ordered[-1], 3),
    }


def measure(memory_bytes: int, trials: int, seed: int) -> dict[str, Any]:
    """A slab of 1 KiB entries, every shard full."""
    generator = random.Random(seed)
    names = [hex_key(number) for number in range(memory_bytes // 1024)]
    with SharedSlab(f"bench-liveness-{os.getpid()}", SlabConfig(memory_bytes=memory_bytes, ttl=None)) as slab:
        try:
            for name in names:
                slab.set(name, VALUE)
            entries = slab.stats().entries
            held = hold_up(slab, names, trials, generator)
            recovered = recovery(slab, names, trials, generator)
            problems = slab.check()
            return {"entries": entries, "hold_up": held, "recovery": recovered, "check": problems}
        finally:
            slab.unlink()


def _bars(results: dict[int, Any]) -> list[Bar]:
    bars = []
    for size, one in results.items():
        bars.append(at_most(f"others held up by a kill, p99 ms, {size} MiB", one["hold_up"]["p99_ms"], 50))
        bars.append(at_most(f"recovery of a full shard, p99 ms, {size} MiB", one["recovery"]["p99_ms"], 20))
        bars.append(at_most(f"hangs and check failures, {size} MiB", one["hold_up"]["hangs"] + len(one["check"]), 0))
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "liveness.json", help="result file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    provenance = Provenance(arguments.seed)
    trials = 5 if arguments.quick else max(arguments.trials, 20)
    results = {
        size: measure(size * MiB, trials, arguments.seed) for size in ((16,) if arguments.quick else (8, 64, 1024))
    }
    for size, one in results.items():
        print(f"{size} MiB: {one}")
    met = write_results(arguments.json, provenance, {"megabytes": results}, _bars(results))
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
