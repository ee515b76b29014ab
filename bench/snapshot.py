"""How fast a snapshot is taken and restored, what memory that needs, and what it and `top` cost the writers.

    python bench/snapshot.py [--quick] [--json FILE]

The files lie on tmpfs. Each way runs in a process of its own. Its memory is what it has besides the slab, the whole
interpreter included. What the writers lose is the median over pairs of windows: beside the command, and while it is
stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from workload import hex_key

from llm_edge_cache import SharedSlab, SlabConfig, snapshot

MiB = 1 << 20
VALUE_BYTES = 4096
ENTRY_BYTES = VALUE_BYTES + 64 + 256  # and what the slab needs beside key and value, generously
WRITERS = 4
FORK = multiprocessing.get_context("fork")


def config_for(entries: int) -> SlabConfig:
    return SlabConfig(memory_bytes=entries * ENTRY_BYTES + 4 * MiB, max_entries=entries + entries // 16, ttl=None)


@contextmanager
def full_slab(name: str, entries: int, seed: int) -> Iterator[SharedSlab]:
    pool = random.Random(seed).randbytes(2 * VALUE_BYTES)
    with SharedSlab(name, config_for(entries)) as slab:
        try:
            for number in range(entries):
                slab.set(hex_key(number), pool[number % VALUE_BYTES :][:VALUE_BYTES], ttl=3600)
            yield slab
        finally:
            slab.unlink()


# ---- there and back ----


def _own_bytes() -> int:
    """Memory of this process besides what it shares: the slab's pages and the files of libraries."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _measured(work: Callable[[snapshot.Progress], Any], pipe: Any) -> None:
    most = 0

    def sample(done: int, total: int) -> None:
        nonlocal most
        most = max(most, _own_bytes())

    started, used = time.monotonic(), time.process_time()
    report = work(sample)
    seconds, cpu = time.monotonic() - started, time.process_time() - used
    pipe.send({"seconds": seconds, "cpu_seconds": cpu, "own_bytes": max(most, _own_bytes()), **report._asdict()})


def _in_a_process(work: Callable[[snapshot.Progress], Any]) -> dict[str, Any]:
    here, there = FORK.Pipe()
    process = FORK.Process(target=_measured, args=(work, there))
    process.start()
    there.close()
    result: dict[str, Any] = here.recv()
    process.join()
    return result


def there_and_back(entries: int, rounds: int, seed: int) -> list[dict[str, Any]]:
    name, file = f"bench-snapshot-{os.getpid()}", f"/dev/shm/bench-snapshot-{os.getpid()}"
    results = []
    with full_slab(name, entries, seed) as slab:
        try:
            for _ in range(rounds):
                saved = _in_a_process(lambda progress: snapshot.save(slab, file, progress=progress))
                with SharedSlab(name + "-restored", config_for(entries)) as other:
                    restored = _in_a_process(lambda progress: snapshot.restore(other, file, progress=progress))
                    other.unlink()
                results.append({"save": saved, "restore": restored})
        finally:
            Path(file).unlink(missing_ok=True)
    return results


# ---- beside writers ----


def _write(name: str, entries: int, seed: int, done: Synchronized[int], stop: Any) -> None:
    generator = random.Random(seed)
    value = generator.randbytes(VALUE_BYTES)
    keys = [hex_key(generator.randrange(entries)) for _ in range(4096)]
    with SharedSlab.attach(name) as slab:
        while not stop.is_set():
            for key in keys[:256]:
                slab.set(key, value)
            keys = keys[256:] + keys[:256]
            done.value += 256


def _rate(counts: list[Synchronized[int]], seconds: float) -> float:
    before, started = sum(count.value for count in counts), time.monotonic()
    time.sleep(seconds)
    return (sum(count.value for count in counts) - before) / (time.monotonic() - started)


@contextmanager
def _running(command: list[str]) -> Iterator[int]:
    """The command again and again, until the end of the block; gives the id of its process group."""
    program = (
        "import subprocess, sys\nwhile True: subprocess.run([sys.executable, '-m', 'llm_edge_cache', *sys.argv[1:]])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process.pid
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def effects(entries: int, pairs: int, seconds: float, seed: int) -> dict[str, Any]:
    """The writers' throughput beside each command, as a share of that without."""
    name = f"bench-effects-{os.getpid()}"
    with full_slab(name, entries, seed), tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        counts: list[Synchronized[int]] = [FORK.Value("Q", 0, lock=False) for _ in range(WRITERS)]  # type: ignore[misc]
        stop = FORK.Event()
        writers = [
            FORK.Process(target=_write, args=(name, entries, seed + at, counts[at], stop)) for at in range(WRITERS)
        ]
        for writer in writers:
            writer.start()
        try:
            time.sleep(seconds)
            commands = {
                "top": ["top", "--name", name, "--json"],
                "snapshot": ["snapshot", "--name", name, f"{folder}/file"],
            }
            return {
                what: _effect(counts, command, pairs, seconds)
                | {"processor_share": _processor_share(command, 30 * seconds)}
                for what, command in commands.items()
            }
        finally:
            stop.set()
            for writer in writers:
                writer.join()


def _effect(counts: list[Synchronized[int]], command: list[str], pairs: int, seconds: float) -> dict[str, Any]:
    """Windows in which the command runs and in which it is stopped take turns: drifts of the host cancel out."""
    rates = []
    with _running(command) as group:
        time.sleep(seconds)  # the interpreter's start is no part of a snapshot
        for at in range(2 * pairs + 1):
            os.killpg(group, signal.SIGCONT if at % 2 else signal.SIGSTOP)
            time.sleep(0.02)
            rates.append(_rate(counts, seconds))
    shares = [2 * rates[at] / (rates[at - 1] + rates[at + 1]) for at in range(1, 2 * pairs, 2)]
    return {"median": statistics.median(shares), "mean": statistics.mean(shares), "shares": shares}


def _processor_share(command: list[str], seconds: float) -> float:
    """What the command takes of all processors, beside the writers, until its end or for so long."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "llm_edge_cache", *command], stdout=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used / wall / (os.cpu_count() or 1)


# ---- all ----


def _bars(results: dict[str, Any], payload_bytes: int) -> list[Bar]:
    bars = []
    for way in ("save", "restore"):
        rounds = [each[way] for each in results["there_and_back"]]
        best = payload_bytes / min(each["seconds"] for each in rounds) / 1e6
        bars.append(at_least(f"{way}, MB/s of payload, best of {len(rounds)}", best, 500))
        most = max(each["own_bytes"] for each in rounds)
        bars.append(at_most(f"{way}, MiB besides the slab", most / MiB, 64))
    lost = max(each["restore"]["lost"] + each["restore"]["refused"] for each in results["there_and_back"])
    bars.append(at_most("entries lost on the way", lost, 0))
    for what, effect in results["effects"].items():
        bars.append(at_least(f"throughput of {WRITERS} writers beside {what}, share", effect["median"], 0.98))
        bars.append(
            at_most(f"of all processors beside {WRITERS} writers: {what}, share", effect["processor_share"], 0.02)
        )
    return bars


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "snapshot.json", help="result file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    quick = arguments.quick
    provenance = Provenance(arguments.seed)
    entries = (16 if quick else 1024) * MiB // VALUE_BYTES
    results = {
        "quick": quick,
        "entries": entries,
        "there_and_back": there_and_back(entries, 1 if quick else 3, arguments.seed),
        "effects": effects(entries, *((1, 0.5) if quick else (50, 2.0)), arguments.seed),
    }
    met = write_results(arguments.json, provenance, results, _bars(results, entries * (VALUE_BYTES + 64)))
    return 0 if met or quick else 1


if __name__ == "__main__":
    sys.exit(main())
