"""How exactly, and how soon, one computation serves all callers: the bars of single flight, on one host and on two.

    python bench/flights.py [--quick] [--trials N] [--seed N] [--json FILE]

Callers are real processes with a cache manager each; hosts are two slabs on this machine with one real Redis between
them. Every trial uses a key of its own. Times are CLOCK_MONOTONIC, taken in the caller's process. The provider takes
300 ms; where a lease runs out, 3 s, and its owner is killed at a random moment of the first half. Bars are on the 99th
percentile over the trials; counts must be right in every trial.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from provenance import RESULTS, ROOT, Bar, Provenance, at_most, write_results

sys.path.append(str(ROOT / "tests"))
from callers import FACES, LIVENESS, Outcome, Provider, Worker, wait_until
from redis_servers import RedisServer

from llm_edge_cache import L1Config, L2Config, SharedSlab, redis_tier
from llm_edge_cache.regions import Counter

MiB = 1 << 20
MS = 1e6  # ns
PROVIDER_SECONDS = 0.3
KILLED_AFTER = 0.15  # s, in the middle of the provider's call
PROCESSES, CALLERS = 4, 50
LONG_SECONDS = 3.0
LEASE_MS = redis_tier.LEASE_MS
POLL_MS = 20  # between two looks at another host's lease


class Trial:
    """One missing key, asked for at once by callers in many processes."""

    def __init__(self, directory: Path, number: int, generator: random.Random) -> None:
        self.generator = generator
        self.name = f"question {number}"
        self.provider = Provider(directory / f"calls-{number}", PROVIDER_SECONDS)

    def start(self, workers: list[Worker]) -> dict[int, Any]:
        return {worker.pid: worker.call(self.provider, CALLERS, self.name) for worker in workers}

    def leader(self, workers: list[Worker]) -> Worker:
        pid = self.provider.wait_called()[0].pid
        return next(worker for worker in workers if worker.pid == pid)


def outcomes_of(calls: dict[int, Any]) -> dict[int, list[Outcome]]:
    return {pid: call.result(2 * LIVENESS) for pid, call in calls.items()}


def spread_ms(outcomes: dict[int, list[Outcome]], leader: int) -> float:
    """From the first of the leader's own callers that has the answer to the last caller of all."""
    first = min(outcome.at_ns for outcome in outcomes[leader])
    return (max(outcome.at_ns for served in outcomes.values() for outcome in served) - first) / MS


def wrong(outcomes: dict[int, list[Outcome]], calls: int, expected: int) -> int:
    """Callers without the one answer, and calls that there should not have been or should have been."""
    answers = {outcome.content for served in outcomes.values() for outcome in served}
    failures = sum(outcome.error is not None for served in outcomes.values() for outcome in served)
    return failures + abs(calls - expected) + (len(answers) - 1)


class Host:
    """A slab of its own, with workers that are replaced when one was killed."""

    def __init__(self, face: str, count: int, l2: L2Config | None, stack: contextlib.ExitStack) -> None:
        self._face, self._count, self._l2 = face, count, l2
        self._l1 = L1Config(name=f"bench-flights-{os.getpid()}-{id(self)}", memory_bytes=16 * MiB)
        self._slab = stack.enter_context(SharedSlab(self._l1.name, self._l1.slab_config()))
        stack.callback(self._slab.unlink)
        self._stack = stack
        self._workers: list[Worker] = []

    def flushes(self) -> int:
        """How often L1 was cleared because invalidations may have been missed."""
        return self._slab._counter_sums()[Counter.STREAM_FLUSHES]

    def workers(self) -> list[Worker]:
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        while len(self._workers) < self._count:
            worker = Worker(self._face, self._l1, self._l2)
            self._stack.callback(worker.end)
            self._workers.append(worker)
        return self._workers


# ---- the situations; each returns a figure in ms, and how much was wrong ----


def calm(workers: list[Worker], trial: Trial) -> tuple[float, int]:
    """Milliseconds from the leader's answer to the last caller's."""
    outcomes = outcomes_of(trial.start(workers))
    calls = trial.provider.calls()
    return spread_ms(outcomes, calls[0].pid), wrong(outcomes, len(calls), 1)


def killed(workers: list[Worker], trial: Trial) -> tuple[float, int]:
    """Milliseconds that the last caller waited beyond what it would have, had the leader lived."""
    calls = trial.start(workers)
    leader = trial.leader(workers)
    begun = trial.provider.calls()[0]
    time.sleep(max(0.0, KILLED_AFTER - (time.monotonic_ns() - begun.at_ns) / 1e9))
    leader.kill()
    del calls[leader.pid]
    outcomes = outcomes_of(calls)
    last = max(outcome.at_ns for served in outcomes.values() for outcome in served)
    would_have = begun.at_ns + PROVIDER_SECONDS * 1e9
    return (last - would_have) / MS, wrong(outcomes, len(trial.provider.calls()), 2)


def takeover(here: list[Worker], there: list[Worker], trial: Trial) -> tuple[float, int]:
    """Milliseconds from the death of the leader's process to the other host's call."""
    (owner,) = here
    owner.call(trial.provider._replace(seconds=LONG_SECONDS), CALLERS, trial.name)
    trial.leader(here)
    calls = {worker.pid: worker.call(trial.provider, CALLERS, trial.name) for worker in there}
    time.sleep(trial.generator.uniform(KILLED_AFTER, LONG_SECONDS / 2))  # anywhere between two renewals
    died = time.monotonic_ns()
    owner.kill()
    outcomes = outcomes_of(calls)
    begun = trial.provider.calls()
    return (begun[1].at_ns - died) / MS, wrong(outcomes, len(begun), 2)


def redis_killed(hosts: tuple[Host, Host], server: RedisServer, trial: Trial) -> tuple[float, int]:
    """Milliseconds from the death of Redis to the last caller's answer, and calls beyond one per host."""
    flushes = [host.flushes() for host in hosts]
    calls = trial.start(hosts[0].workers())
    trial.leader(hosts[0].workers())
    calls |= trial.start(hosts[1].workers())
    time.sleep(KILLED_AFTER)
    died = time.monotonic_ns()
    server.kill()
    outcomes = outcomes_of(calls)
    server.start()
    # It comes back empty, so each host clears its L1, and what is computed meanwhile is void: not in the next trial.
    for host, before in zip(hosts, flushes, strict=True):
        wait_until(lambda host=host, before=before: host.flushes() > before, "the host follows Redis again")
    last = max(outcome.at_ns for served in outcomes.values() for outcome in served)
    failures = sum(outcome.error is not None for served in outcomes.values() for outcome in served)
    return (last - died) / MS, failures + max(0, len(trial.provider.calls()) - 2)


# ---- running them ----


def repeat(
    trials: int, directory: Path, generator: random.Random, run: Callable[[Trial], tuple[float, int]]
) -> dict[str, Any]:
    figures, faults = [], 0
    for number in range(trials):
        figure, wrong_count = run(Trial(directory, time.monotonic_ns() + number, generator))
        figures.append(figure)
        faults += wrong_count
    ordered = sorted(figures)
    return {
        "trials": trials,
        "wrong": faults,
        "median_ms": round(statistics.median(ordered), 2),
        "p99_ms": round(ordered[min(trials - 1, int(trials * 0.99))], 2),
        "longest_ms": round(ordered[-1], 2),
    }


@contextlib.contextmanager
def scene() -> Iterator[tuple[contextlib.ExitStack, Path]]:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        yield stack, Path(directory)


def measure(face: str, trials: int, seed: int) -> dict[str, dict[str, Any]]:
    found = {}
    generator = random.Random(seed)
    with scene() as (stack, directory):
        host = Host(face, PROCESSES, None, stack)
        found["one host, calm"] = repeat(trials, directory, generator, lambda trial: calm(host.workers(), trial))
        found["one host, leader killed"] = repeat(
            trials, directory, generator, lambda trial: killed(host.workers(), trial)
        )
    with scene() as (stack, directory):
        server = stack.enter_context(RedisServer())
        l2 = L2Config(server.unix_url)
        one, other = (Host(face, PROCESSES // 2, l2, stack) for _ in range(2))
        single = Host(face, 1, l2, stack)
        found["two hosts, calm"] = repeat(
            trials, directory, generator, lambda trial: calm([*one.workers(), *other.workers()], trial)
        )
        found["two hosts, leader killed"] = repeat(
            trials, directory, generator, lambda trial: takeover(single.workers(), other.workers(), trial)
        )
        found["two hosts, Redis killed"] = repeat(
            trials, directory, generator, lambda trial: redis_killed((one, other), server, trial)
        )
    return found


# Situation, what its figure is, and the bar in ms.
_BARS = (
    ("one host, calm", "last caller after the leader's", 20.0),
    ("one host, leader killed", "waited beyond the provider's 300 ms", 300.0),
    ("two hosts, calm", "last caller after the leader's", None),
    ("two hosts, leader killed", "the other host's call after the death", float(LEASE_MS + POLL_MS)),
    ("two hosts, Redis killed", "last answer after the death", None),
)


def bars_of(results: dict[str, dict[str, dict[str, Any]]]) -> list[Bar]:
    bars = []
    for face, found in results.items():
        for situation, figure, limit in _BARS:
            bars.append(at_most(f"{face}: {situation}: wrong calls or answers", found[situation]["wrong"], 0))
            if limit is not None:
                bars.append(at_most(f"{face}: {situation}: {figure}, p99 ms", found[situation]["p99_ms"], limit))
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "flights.json", help="result file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    logging.getLogger("llm_edge_cache").setLevel(logging.ERROR)  # each death of Redis is warned of, by each host
    provenance = Provenance(arguments.seed, distributions=("redis", "hiredis"))
    trials = 1 if arguments.quick else max(arguments.trials, 20)
    faces = FACES[:1] if arguments.quick else FACES
    results = {face: measure(face, trials, arguments.seed) for face in faces}
    print(f"{'face':8}  {'situation':26} {'trials':>6} {'wrong':>5} {'median':>9} {'p99':>9}  ms: figure")
    for face, found in results.items():
        for situation, figure, _ in _BARS:
            row = found[situation]
            cells = f"{row['trials']:>6} {row['wrong']:>5} {row['median_ms']:>9.2f} {row['p99_ms']:>9.2f}"
            print(f"{face:8}  {situation:26} {cells}  {figure}")
    counts = {"processes": PROCESSES, "callers": CALLERS, "provider_ms": PROVIDER_SECONDS * 1000}
    met = write_results(arguments.json, provenance, {**counts, "faces": results}, bars_of(results))
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(main())
