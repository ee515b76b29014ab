"""Kills processes with SIGKILL at random moments, by the ten thousand, and watches that nobody else notices.

    python tests/stress/sigkill_soak.py [--kills N] [--seed N] [--json FILE]

Writers and readers are forked, work for some milliseconds in a tight loop and are killed, three at a time; whoever has
the lock next recovers, and is killed in turn. In half of the batches some are stopped for a while first, and continued
or killed where they stand. Two watchers check every value that they can get. After each batch nobody but the parent is
alive: check() must be clean, and when everything has been deleted, every byte must be free again.

Only kills of writers that had completed a call count towards N: a process killed on its way there has risked nothing.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import heapq
import mmap
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from soak_roles import Findings, Shared, Watcher, items_of, read_until_killed, run_and_exit, write_until_killed

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
MORTALS = 3
WATCHERS = 2
READERS_SHARE = 0.15
STOPPED_SHARE = 0.3
IMPATIENCE = 0.05  # of them are killed on their way to their first call, if need be
LONGEST_LIFE = 0.005  # s
LONGEST_STOP = 0.03  # s
HANG = 10.0  # s without a heartbeat
SMALL_SIZES = (20, 100, 900, 4000)
ALL_SIZES = (*SMALL_SIZES, 9000, 30_000, 65_536)


@dataclasses.dataclass(frozen=True)
class Kind:
    config: SlabConfig
    sizes: tuple[int, ...]
    evicting: bool


def _config(memory_bytes: int, max_entries: int) -> SlabConfig:
    return SlabConfig(memory_bytes=memory_bytes, max_entries=max_entries, ttl=None, max_value_bytes=64 * 1024)


KINDS = {
    "roomy": Kind(_config(64 * MiB, 20_000), ALL_SIZES, False),
    "squeezed": Kind(_config(2 * MiB, 2000), ALL_SIZES, True),
    "evicting": Kind(_config(8 * MiB, 100), SMALL_SIZES, True),
}


@dataclasses.dataclass(order=True)
class Mortal:
    """A child and what happens to it next, at `due` (CLOCK_MONOTONIC, s)."""

    due: float
    pid: int
    slot: int
    writer: bool
    action: int  # the next signal
    patience: int  # how often it is left alone because it has not come to its first call yet


class HangError(Exception):
    """A watcher made no progress for HANG seconds: the run ends, and says so."""


class Batch:
    """So many kills on one slab."""

    def __init__(self, kind: str, slab: SharedSlab, generator: random.Random, stops: bool) -> None:
        self._kind = KINDS[kind]
        self._slab = slab
        self._random = generator
        self._stops = stops
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
        self._items = items_of(self._kind.sizes, generator.randrange(1 << 30))
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[Findings] = []

    def run(self, kills: int) -> None:
        watchers = [self._start_watcher(number) for number in range(WATCHERS)]
        mortals = [self._fork(slot) for slot in range(MORTALS)]
        heapq.heapify(mortals)
        self._beat, self._beat_at = [0] * WATCHERS, time.monotonic()
        try:
            while self.counts["writers_killed"] < kills:
                self._next_due(mortals)
        finally:
            for mortal in mortals:
                self._kill(mortal)
            for process, pipe in watchers:
                self._dismiss(process, pipe)

    def _dismiss(self, process: Any, pipe: Connection) -> None:
        pipe.send("stop")
        if pipe.poll(HANG):
            self.findings.append(pipe.recv())
        else:
            self.counts["hangs"] += 1
            process.kill()
        process.join()

    def _start_watcher(self, number: int) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe()
        watcher = Watcher(self._slab, number, self._random.randrange(1 << 30), self._kind.sizes, self._kind.evicting)
        process = context.Process(target=watcher.watch, args=(its, self._words, MORTALS + number), daemon=True)
        process.start()
        return process, mine

    def _fork(self, slot: int) -> Mortal:
        self._words[slot] = 0
        seed = self._random.randrange(1 << 30)
        writer = self._random.random() >= READERS_SHARE
        pid = os.fork()
        if pid == 0:
            shared = Shared(self._slab, self._items, self._words, slot)
            if writer:
                run_and_exit(lambda: write_until_killed(shared, seed, self._kind.evicting))
            run_and_exit(lambda: read_until_killed(shared, seed))
        stop = self._stops and self._random.random() < STOPPED_SHARE
        patience = 0 if self._random.random() < IMPATIENCE else 100
        return Mortal(self._soon(), pid, slot, writer, signal.SIGSTOP if stop else signal.SIGKILL, patience)

    def _soon(self) -> float:
        return time.monotonic() + self._random.uniform(0.0001, LONGEST_LIFE)

    def _next_due(self, mortals: list[Mortal]) -> None:
        mortal = mortals[0]
        left = mortal.due - time.monotonic()
        if left > 0:
            time.sleep(left)
        if self._words[mortal.slot] == 0 and mortal.patience > 0:
            following = dataclasses.replace(mortal, due=self._soon(), patience=mortal.patience - 1)
        elif mortal.action == signal.SIGKILL:
            self._kill(mortal)
            following = self._fork(mortal.slot)
        else:
            following = self._stop_or_continue(mortal)
        heapq.heapreplace(mortals, following)
        self._watch_heartbeats()

    def _kill(self, mortal: Mortal) -> None:
        os.kill(mortal.pid, signal.SIGKILL)
        _, status = os.waitpid(mortal.pid, 0)
        if not os.WIFSIGNALED(status):
            self.counts["died_by_themselves"] += 1
        elif self._words[mortal.slot] == 0:
            self.counts["killed_before_their_first_call"] += 1
        else:
            self.counts["writers_killed" if mortal.writer else "readers_killed"] += 1
            self.counts["calls_of_the_killed"] += self._words[mortal.slot]

    def _stop_or_continue(self, mortal: Mortal) -> Mortal:
        os.kill(mortal.pid, mortal.action)
        if mortal.action == signal.SIGCONT:
            return dataclasses.replace(mortal, due=self._soon(), action=signal.SIGKILL)
        self.counts["stops"] += 1
        due = time.monotonic() + self._random.uniform(0, LONGEST_STOP)
        return dataclasses.replace(mortal, due=due, action=self._random.choice((signal.SIGCONT, signal.SIGKILL)))

    def _watch_heartbeats(self) -> None:
        now = time.monotonic()
        beat = list(self._words[MORTALS : MORTALS + WATCHERS])
        if all(new != old for new, old in zip(beat, self._beat, strict=True)):
            self._beat, self._beat_at = beat, now
        elif now - self._beat_at > HANG:
            raise HangError


def _leaked_bytes(slab: SharedSlab, baseline: int) -> int:
    """Bytes still taken when everything has been deleted; what dead owners had reserved is looked for in passing."""
    slab.delete_many([entry.key for entry in slab.scan()])
    for _ in range(100):
        used = slab.stats().used_bytes
        if used <= baseline:
            return 0
        for number in range(64):  # a write comes to every shard, and each looks after its dead now and then
            slab.set(b"sweep-%d" % number, b"x")
            slab.delete(b"sweep-%d" % number)
        time.sleep(0.05)
    return used - baseline


class Soak:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.totals: collections.Counter[str] = collections.Counter()
        self.longest_stall_ms = {"kills only": 0.0, "with stops": 0.0}
        self.problems: list[str] = []

    def go(self, kills: int, per_batch: int) -> None:
        slabs = {kind: SharedSlab(f"soak-{os.getpid()}-{kind}", KINDS[kind].config) for kind in KINDS}
        baselines = {kind: slab.stats().used_bytes for kind, slab in slabs.items()}
        try:
            while self.totals["writers_killed"] < kills:
                number = self.totals["batches"]
                kind = list(KINDS)[number % len(KINDS)]
                stops = number // len(KINDS) % 2 == 1
                batch = Batch(kind, slabs[kind], self._random, stops)
                try:
                    batch.run(min(per_batch, kills - self.totals["writers_killed"]))
                finally:
                    self._account(kind, batch, stops)
                self._look_at(kind, slabs[kind], baselines[kind])
                print(f"{self.totals['writers_killed']} writers killed, {len(self.problems)} problems", flush=True)
            self.totals["recoveries"] = sum(slab.stats().recoveries for slab in slabs.values())
        except HangError:
            self.totals["hangs"] = max(1, self.totals["hangs"])
        finally:
            for slab in slabs.values():
                slab.unlink()
                slab.close()

    def _account(self, kind: str, batch: Batch, stops: bool) -> None:
        self.totals.update(batch.counts)
        self.totals["batches"] += 1
        mode = "with stops" if stops else "kills only"
        for findings in batch.findings:
            counts = dataclasses.asdict(findings)
            self.longest_stall_ms[mode] = max(self.longest_stall_ms[mode], round(counts.pop("longest_ns") / 1e6, 2))
            self.totals[f"over_50_ms, {mode}"] += counts.pop("over_50_ms")
            for name, count in counts.items():
                self.totals[f"watchers_{name}"] += count
                if count and name != "calls":
                    self.problems.append(f"batch {self.totals['batches']} ({kind}, {mode}): {count} {name}")

    def _look_at(self, kind: str, slab: SharedSlab, baseline: int) -> None:
        broken = slab.check()
        leaked = _leaked_bytes(slab, baseline)
        broken += slab.check()
        self.totals.update(check_failures=len(broken), leaked_bytes=leaked)
        self.problems += [f"batch {self.totals['batches']} ({kind}): {line}" for line in broken[:10]]
        if leaked:
            self.problems.append(f"batch {self.totals['batches']} ({kind}): {leaked} bytes leaked")


def _bars(soak: Soak, kills: int) -> list[Bar]:
    totals = soak.totals
    wrong = totals["watchers_wrong_values"] + totals["watchers_stale_values"]
    return [
        at_least("writers killed", totals["writers_killed"], kills),
        at_most("wrong values", wrong, 0),
        at_most("values lost that no dead process was writing", totals["watchers_lost_values"], 0),
        at_most("check() failures", totals["check_failures"], 0),
        at_most("bytes leaked", totals["leaked_bytes"], 0),
        at_most("hangs", totals["hangs"], 0),
        at_most("calls given up or refused, children that died by themselves",
                totals["watchers_busy"] + totals["watchers_refused"] + totals["died_by_themselves"], 0),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20_000)
    parser.add_argument("--per-batch", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--json", type=Path, default=None, help="result file (from 20,000 on: docs/results/sigkill-soak.json)"
    )
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    provenance = Provenance(seed)
    soak = Soak(seed)
    soak.go(arguments.kills, arguments.per_batch)
    print(*soak.problems, sep="\n")
    results = {"totals": dict(soak.totals), "longest_stall_ms": soak.longest_stall_ms, "problems": soak.problems}
    print(results["totals"], soak.longest_stall_ms)
    path = arguments.json or (RESULTS / "sigkill-soak.json" if arguments.kills >= 20_000 else None)
    return 0 if write_results(path, provenance, results, _bars(soak, arguments.kills)) else 1


if __name__ == "__main__":
    sys.exit(main())
