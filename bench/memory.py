"""How much of the segment is payload, and whether that survives shifts of the sizes and several writers.

    python bench/memory.py [--quick] [--json FILE]

Payload means keys and values of the resident entries, out of `memory_bytes`, which is the whole segment, tables
included.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from workload import hex_key

from llm_edge_cache import SharedSlab, SlabConfig
from llm_edge_cache.errors import SlabBusyError

MiB = 1024 * 1024
SMALLEST, LARGEST = 100, 100 * 1024
KEY_BYTES = 64
WRITERS = 4
SizeOf = Callable[[random.Random], int]
_POOL = random.Random(0).randbytes(LARGEST)


def log_uniform(generator: random.Random) -> int:
    return int(math.exp(generator.uniform(math.log(SMALLEST), math.log(LARGEST))))


def always(size: int) -> SizeOf:
    return lambda generator: size


class Churn:
    """Sets new keys, and now and then an old one with another size, and watches what is refused."""

    def __init__(self, config: SlabConfig, seed: int) -> None:
        self.config = config
        self.slab = SharedSlab(f"bench-memory-{os.getpid()}-{time.monotonic_ns()}", config)
        self.refused = 0
        self._generator = random.Random(seed)
        self._numbers = itertools.count()

    def run(self, size_of: SizeOf, turnovers: float) -> None:
        """Sets `turnovers` times the segment's size."""
        generator, store = self._generator, self.slab.set
        left = turnovers * self.config.memory_bytes
        for number in self._numbers:
            again = number > 1000 and generator.random() < 0.1
            size = size_of(generator)
            if not store(hex_key(number - generator.randrange(1000) if again else number), _POOL[:size]):
                self.refused += 1
            left -= size + KEY_BYTES
            if left <= 0:
                return

    @property
    def payload_share(self) -> float:
        return self.slab.stats().payload_bytes / self.config.memory_bytes

    def close(self) -> int:
        """Removes the slab; returns how many sets were refused, by either account."""
        refusals = max(self.refused, self.slab.stats().refusals)
        problems = self.slab.check()
        self.slab.unlink()
        self.slab.close()
        if problems:
            raise SystemExit("\n".join(problems))
        return refusals


def _entries_for(memory_bytes: int, value_bytes: int) -> int:
    """As many entries as could ever fit: the tables for them are paid for out of the same segment."""
    return memory_bytes // (value_bytes + KEY_BYTES + 56)


def mixed(memory_bytes: int, turnovers: int, seed: int) -> dict[str, float]:
    """Log-uniform sizes; the smallest share seen at the end of any turnover after the first two."""
    churn = Churn(SlabConfig(memory_bytes=memory_bytes, ttl=None), seed)
    churn.run(log_uniform, 2)
    shares = []
    for _ in range(turnovers):
        churn.run(log_uniform, 1)
        shares.append(churn.payload_share)
    return {"smallest": min(shares), "last": shares[-1], "refusals": churn.close()}


def _fresh_share(config: SlabConfig, size: int, seed: int) -> tuple[float, int]:
    churn = Churn(config, seed)
    churn.run(always(size), 2)
    share = churn.payload_share
    return share, churn.close()


def shifts(config: SlabConfig, sizes: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Each size for one turnover after the other, against what a fresh segment reaches with it."""
    fresh = {size: _fresh_share(config, size, seed) for size in set(sizes)}
    churn = Churn(config, seed + 1)
    churn.run(always(sizes[0]), 2)
    steps = []
    for size in sizes[1:]:
        churn.run(always(size), 1)
        steps.append({"size": size, "share": churn.payload_share, "of_fresh": churn.payload_share / fresh[size][0]})
    refusals = churn.close() + sum(refused for _, refused in fresh.values())
    return {"fresh": {size: share for size, (share, _) in fresh.items()}, "steps": steps, "refusals": refusals}


def overhead(config: SlabConfig, seed: int) -> dict[str, float]:
    """Bytes that an entry of 1 KiB costs beyond payload and key when the segment is full of them."""
    churn = Churn(config, seed)
    churn.run(always(1024), 2)
    entries = churn.slab.stats().entries
    refusals = churn.close()
    return {"bytes": config.memory_bytes / entries - 1024 - KEY_BYTES, "entries": entries, "refusals": refusals}


def _write_for(name: str, seed: int, seconds: float, sizes: Iterator[int]) -> tuple[int, int]:
    generator = random.Random(seed)
    done = busy = 0
    with SharedSlab.attach(name) as slab:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                slab.set(hex_key(generator.randrange(20_000)), _POOL[: next(sizes)])
            except SlabBusyError:
                busy += 1
            done += 1
    return done, busy


def _writer(task: tuple[str, int, float]) -> tuple[int, int]:
    name, seed, seconds = task
    generator = random.Random(seed)
    return _write_for(name, seed, seconds, (log_uniform(generator) for _ in itertools.count()))


def crowd(seconds: float, seed: int) -> dict[str, int]:
    """Four writers on whatever cores there are (two, on the reference machine): how often one gave up on a lock."""
    name = f"bench-crowd-{os.getpid()}"
    tasks = [(name, seed + i, seconds) for i in range(WRITERS)]
    with SharedSlab(name, SlabConfig(memory_bytes=16 * MiB, ttl=None)) as slab:
        try:
            with multiprocessing.get_context("fork").Pool(WRITERS) as pool:
                results = pool.map(_writer, tasks, chunksize=1)
            stats = slab.stats()
            problems = slab.check()
        finally:
            slab.unlink()
    if problems:
        raise SystemExit("\n".join(problems))
    return {
        "writers": WRITERS,
        "sets": sum(done for done, _ in results),
        "busy": sum(busy for _, busy in results) + stats.busy,
        "refusals": stats.refusals,
    }


def _bars(results: dict[str, Any]) -> list[Bar]:
    bars = [
        at_least(f"payload share, log-uniform sizes, {size} MiB", one["smallest"], 0.85)
        for size, one in results["mixed"].items()
    ]
    for name, one in results["shifts"].items():
        worst = min(one["steps"], key=lambda step: step["of_fresh"])
        bars.append(
            at_least(f"after a shift to {worst['size']} B, of a fresh segment ({name})", worst["of_fresh"], 0.95)
        )
    for name, one in results["overhead"].items():
        bars.append(at_most(f"bytes beyond payload and key of a 1 KiB entry ({name})", one["bytes"], 300))
    groups = (results["mixed"], results["shifts"], results["overhead"])
    refusals = sum(one["refusals"] for group in groups for one in group.values()) + results["crowd"]["refusals"]
    bars.append(at_most("sets refused while something could be evicted", refusals, 0))
    bars.append(
        at_most(f"SlabBusyError with {WRITERS} writers, {results['crowd']['sets']} sets", results["crowd"]["busy"], 0)
    )
    return bars


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json", help="result file (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quick, seed = arguments.quick, arguments.seed
    provenance = Provenance(seed)
    size = (16 if quick else 64) * MiB
    tight = SlabConfig(memory_bytes=size, max_entries=_entries_for(size, 1024 + 200), ttl=None)
    small_too = SlabConfig(memory_bytes=size, max_entries=_entries_for(size, 512), ttl=None)
    default = SlabConfig(memory_bytes=size, ttl=None)
    sizes = (512, 32 * 1024, 512)
    results: dict[str, Any] = {
        "quick": quick,
        "mixed": {total: mixed(total * MiB, 1 if quick else 4, seed) for total in ((16,) if quick else (16, 64, 256))},
        "shifts": {
            "default max_entries": shifts(default, sizes, seed),
            "max_entries for 512 B": shifts(small_too, sizes, seed),
        },
        "overhead": {"default max_entries": overhead(default, seed), "max_entries to fit": overhead(tight, seed)},
        "crowd": crowd(1.0 if quick else 10.0, seed),
    }
    for name, group in results.items():
        print(f"{name}: {group}")
    met = write_results(arguments.json, provenance, results, _bars(results))
    return 0 if met or quick else 1


if __name__ == "__main__":
    sys.exit(main())
