"""Checks the slab's consistency on recorded histories of several processes, some millions of calls long.

    python tests/stress/history.py [--operations N] [--seed N] [--json FILE]

Rounds of four kinds take turns, each with its own slab: nothing is evicted; entries are evicted all the time; memory is
too small for what is stored; few keys and large values, with readers apart from writers. Four workers (two inherit the
slab over fork, two attach by its name) make random calls, pause at random between them, and are stopped and continued
at random within them. history_checker.py then judges each key. Exit code 0: no violation, no wrong value, nothing gave
up, and the slab's own check() is clean.
"""

from __future__ import annotations

import argparse
import collections
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks

from history_checker import Violation, check_keys
from history_records import by_key, read
from history_worker import Mix, Worker
from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
WORKERS = 4
JUDGES = os.cpu_count() or 1
CONTEXT = multiprocessing.get_context("fork")
SMALL_SIZES = (20, 64, 200, 700, 1500, 4000)
ALL_SIZES = (*SMALL_SIZES, 9000, 20_000, 65_536)
STOP_EVERY = 0.01  # s, about
LONGEST_STOP = 0.02  # s
HUNG = 60.0  # s without an answer from any worker


class Kind(NamedTuple):
    config: SlabConfig
    mix: Mix
    strict: bool  # nothing is evicted: misses are claims, too


def _config(memory_bytes: int, max_entries: int) -> SlabConfig:
    return SlabConfig(memory_bytes=memory_bytes, max_entries=max_entries, ttl=None, max_value_bytes=64 * 1024)


KINDS = {
    "roomy": Kind(_config(64 * MiB, 20_000), Mix(8, 40, 0, 0.0, (*SMALL_SIZES, *SMALL_SIZES, *ALL_SIZES)), True),
    "evicting": Kind(_config(16 * MiB, 100), Mix(8, 32, 1000, 0.5, SMALL_SIZES), False),
    "squeezed": Kind(_config(2 * MiB, 2000), Mix(8, 32, 300, 0.4, ALL_SIZES), False),
    # Memory for some ten of the large values: what a reader is copying is soon somebody else's.
    "crowded": Kind(
        _config(1 * MiB, 64), Mix(1, 3, 0, 0.0, (9000, 20_000, 65_536, 65_536), clears=False, roles=True), False
    ),
}


class Task(NamedTuple):
    kind: str
    seed: int
    calls: int
    path: Path


def _serve(pipe: Connection, slabs: dict[str, SharedSlab], names: dict[str, str], number: int) -> None:
    if number % 2:
        slabs = {kind: SharedSlab.attach(name) for kind, name in names.items()}
    workers = {kind: Worker(slab, number + 1) for kind, slab in slabs.items()}
    while (task := pipe.recv()) is not None:
        worker = workers[task.kind]
        worker.calls = worker.busy = 0
        worker.run(KINDS[task.kind].mix, task.seed, task.calls, task.path)
        pipe.send((worker.calls, worker.busy))


class Crew:
    """The worker processes, and the hand that stops and continues them."""

    def __init__(self, slabs: dict[str, SharedSlab], names: dict[str, str], seed: int) -> None:
        self._random = random.Random(seed)
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(WORKERS):
            mine, its = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(its, slabs, names, number), daemon=True)
            process.start()
            its.close()
            self._pipes.append(mine)
            self._processes.append(process)
        self.stops = 0

    def run(self, tasks: list[Task]) -> tuple[int, int]:
        """Calls made and calls given up, when all are done."""
        for pipe, task in zip(self._pipes, tasks, strict=True):
            pipe.send(task)
        answers: list[tuple[int, int]] = []
        running = dict(zip(self._pipes, self._processes, strict=True))
        last_answer = time.monotonic()
        while running:
            for ready in wait(list(running), timeout=self._random.uniform(0, 2 * STOP_EVERY)):
                assert isinstance(ready, Connection)
                answers.append(ready.recv())
                del running[ready]
                last_answer = time.monotonic()
            if running:
                self._stop_for_a_while(self._random.choice(list(running.values())))
            if time.monotonic() - last_answer > HUNG + tasks[0].calls / 1000:
                raise SystemExit("a worker hangs")
        return sum(calls for calls, _ in answers), sum(busy for _, busy in answers)

    def _stop_for_a_while(self, process: Any) -> None:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(self._random.uniform(0, LONGEST_STOP) ** 2 / LONGEST_STOP)  # mostly short
        os.kill(process.pid, signal.SIGCONT)
        self.stops += 1

    def dismiss(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(None)
            process.join()


class _Part(NamedTuple):
    """One process's share of the keys to judge."""

    paths: list[Path]
    kind: str
    part: int
    parts: int


def _judge(task: _Part) -> tuple[int, list[Violation], int]:
    kind = KINDS[task.kind]
    records = [record for path in task.paths for record in read(path)]
    keys = by_key(records, task.part, task.parts)
    violations, misses = check_keys(keys, strict=kind.strict, is_counter=kind.mix.is_counter)
    return len(records), violations, misses


class Run:
    """Rounds until the number of calls is reached; `totals` is what the result file says."""

    def __init__(self, operations: int, per_round: int, seed: int) -> None:
        self._operations = operations
        self._per_round = per_round
        self._random = random.Random(seed)
        self.totals: collections.Counter[str] = collections.Counter()
        self.by_kind: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in KINDS}
        self.violations: list[str] = []

    def go(self, folder: Path) -> None:
        names = {kind: f"history-{os.getpid()}-{kind}" for kind in KINDS}
        slabs = {kind: SharedSlab(name, KINDS[kind].config) for kind, name in names.items()}
        try:
            with CONTEXT.Pool(JUDGES) as judges:
                crew = Crew(slabs, names, self._random.randrange(1 << 30))
                while self.totals["operations"] < self._operations:
                    kind = list(KINDS)[self.totals["rounds"] % len(KINDS)]
                    self._round(kind, slabs[kind], crew, judges, folder)
                crew.dismiss()
                self.totals["stops"] = crew.stops
        finally:
            for slab in slabs.values():
                slab.unlink()
                slab.close()

    def _round(self, kind: str, slab: SharedSlab, crew: Crew, judges: Any, folder: Path) -> None:
        slab.clear()  # so a value of an earlier round is one that nobody wrote
        tasks = [
            Task(kind, self._random.randrange(1 << 30), self._per_round // WORKERS, folder / f"{worker}.log")
            for worker in range(WORKERS)
        ]
        calls, busy = crew.run(tasks)
        paths = [task.path for task in tasks]
        judged = judges.map(_judge, [_Part(paths, kind, part, JUDGES) for part in range(JUDGES)], chunksize=1)
        mine = self.by_kind[kind]
        mine.update(rounds=1, operations=calls, records=judged[0][0])
        self.totals.update(rounds=1, operations=calls, records=judged[0][0], busy=busy)
        for _, violations, misses in judged:
            self.totals.update(violations=len(violations))
            mine.update(violations=len(violations), unexplained_misses=misses)
            self.violations += [f"{kind}, round {self.totals['rounds']}: {violation}" for violation in violations[:20]]
        self._look_at(kind, slab)
        print(f"{self.totals['operations']} operations, {self.totals['violations']} violations", flush=True)

    def _look_at(self, kind: str, slab: SharedSlab) -> None:
        problems = slab.check()
        stats = slab.stats()
        self.totals.update(check_failures=len(problems))
        self.violations += [f"{kind}: check(): {problem}" for problem in problems[:20]]
        self.by_kind[kind].update(
            {
                name: getattr(stats, name) - self.by_kind[kind][name]
                for name in ("evictions", "refusals", "recoveries", "expirations")
            }
        )
        if KINDS[kind].strict and stats.evictions + stats.expirations + stats.refusals:
            raise SystemExit(f"{kind}: something was evicted or refused, so misses prove nothing: {stats}")


def _bars(run: Run, operations: int) -> list[Bar]:
    totals = run.totals
    return [
        at_least("operations in the history", totals["operations"], operations),
        at_most("violations of the cache's consistency", totals["violations"], 0),
        at_most("check() failures", totals["check_failures"], 0),
        at_most("SlabBusyError (no stop was longer than a lock timeout)", totals["busy"], 0),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--per-round", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument(
        "--json", type=Path, default=None, help="result file (from 10 million on: docs/results/history.json)"
    )
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    provenance = Provenance(seed)
    run = Run(arguments.operations, arguments.per_round, seed)
    with tempfile.TemporaryDirectory(prefix="history-") as folder:
        run.go(Path(folder))
    print(*run.violations[:100], sep="\n")
    results = {
        "totals": dict(run.totals),
        "kinds": {kind: dict(counts) for kind, counts in run.by_kind.items()},
        "violations": run.violations[:100],
    }
    print(results["totals"], results["kinds"])
    whole = arguments.operations >= 10_000_000
    path = arguments.json or (RESULTS / "history.json" if whole else None)
    return 0 if write_results(path, provenance, results, _bars(run, arguments.operations)) else 1


if __name__ == "__main__":
    sys.exit(main())
