"""Workers of two hosts that are recycled, killed and stopped all the time: L1 is flushed not once.

    python tests/stress/recycling.py [--seconds N] [--workers N] [--seed N] [--json FILE]

Each host has a slab and some workers; a worker ends after 100 requests and is replaced (as with max_requests=100),
random ones are SIGKILLed, and now and then whichever reads the stream is stopped for three seconds. Users compute, look
up and invalidate meanwhile. Exit code 0: no host lost its place in the stream, what nobody touched is in L1 at the end,
whatever was invalidated is void on both hosts, and no reader was missing for longer than a second.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import secrets
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))  # provenance.py is shared with the benchmarks
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # redis_servers.py

from provenance import RESULTS, Bar, Provenance, at_least, at_most, write_results
from redis_servers import RedisServer

from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, L2Config, SharedSlab, SyncCacheManager
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter, Word

CONTEXT = multiprocessing.get_context("fork")
HOSTS = ("a", "b")
REQUESTS = 100  # of one worker
UNTOUCHED = 50  # entries that only the start stores
KEYS = 40
KILL_EVERY = 0.7  # s, about
STOP_EVERY = 5.0  # s
STOP_FOR = 3.0  # s
LONGEST_SILENCE_NS = 1_000_000_000


def _l1(name: str) -> L1Config:
    return L1Config(memory_bytes=8 << 20, max_capacity=2000, ttl_seconds=3600, tti_seconds=None, name=name)


def _request(text: object) -> CacheableRequest:
    return CacheableRequest("model", f"request {text}")


def _work(name: str, url: str, seed: int) -> None:
    """One worker's life."""
    draw = random.Random(seed)
    with SyncCacheManager(_l1(name), L2Config(url, operation_timeout_ms=1000)) as manager:
        for _ in range(REQUESTS):
            key = draw.randrange(KEYS)
            if draw.random() < 0.05:
                manager.invalidate(_request(key))
            else:
                manager.get_or_compute(_request(key), lambda: CachedResponse("x" * 200, "model"))
            time.sleep(draw.uniform(0, 0.01))


class Host:
    """One host's slab and workers."""

    def __init__(self, letter: str, url: str, draw: random.Random) -> None:
        self.name = f"recycling-{os.getpid()}-{secrets.token_hex(3)}-{letter}"
        self.url = url
        self.slab = SharedSlab(self.name, _l1(self.name).slab_config())
        self.recycled = self.killed = 0
        self.longest_silence_ns = 0
        self._draw = draw
        self._workers: list[Any] = []

    def start(self, workers: int) -> None:
        self._workers = [self._start() for _ in range(workers)]

    def _start(self) -> Any:
        process = CONTEXT.Process(target=_work, args=(self.name, self.url, self._draw.getrandbits(32)), daemon=True)
        process.start()
        return process

    def replace_the_dead(self) -> None:
        """As a master does."""
        for at, process in enumerate(self._workers):
            if not process.is_alive():
                self.recycled += process.exitcode == 0
                process.join()
                self.slab.reap()
                self._workers[at] = self._start()

    def kill_one(self) -> None:
        victim = self._draw.choice(self._workers)
        os.kill(victim.pid, signal.SIGKILL)
        self.killed += 1

    def stop_one(self) -> int:
        pid: int = self._draw.choice(self._workers).pid
        os.kill(pid, signal.SIGSTOP)
        return pid

    def listen(self) -> None:
        """Note how long nobody has read the stream."""
        beat = self.slab._word(Word.READER_BEAT)
        if beat:
            self.longest_silence_ns = max(self.longest_silence_ns, time.monotonic_ns() - beat)

    def end(self) -> None:
        for process in self._workers:
            os.kill(process.pid, signal.SIGCONT)
            process.kill()
            process.join()

    def judge(self) -> dict[str, Any]:
        """What is to be seen at the end."""
        sums = self.slab._counter_sums()
        kept = sum(tier_key(_request(f"untouched {number}")) in self.slab for number in range(UNTOUCHED))
        return {
            "recycled": self.recycled,
            "killed": self.killed,
            "flushes": sums[Counter.STREAM_FLUSHES],
            "invalidated": sums[Counter.INVALIDATED_KEYS],
            "applied_for_the_other": sums[Counter.INVALIDATED_REMOTE],
            "untouched_kept": kept,
            "longest_silence_ms": round(self.longest_silence_ns / 1e6, 1),
            "check": self.slab.check(),
        }


def _prepare(host: Host) -> None:
    """Store what nobody will touch."""
    with SyncCacheManager(_l1(host.name), L2Config(host.url, operation_timeout_ms=1000)) as manager:
        for number in range(UNTOUCHED):
            manager.store(_request(f"untouched {number}"), CachedResponse("kept", "model"))


def _are_void_everywhere(hosts: list[Host]) -> bool:
    """Invalidate everything from the first host and tell whether the other hears of it, whoever reads there."""
    managers = [
        SyncCacheManager(_l1(host.name), L2Config(host.url, operation_timeout_ms=1000)).open() for host in hosts
    ]
    for key in range(KEYS):
        managers[0].invalidate(_request(key))
    end = time.monotonic() + 10
    is_void = False
    while not is_void and time.monotonic() < end:
        is_void = not any(tier_key(_request(key)) in host.slab for host in hosts for key in range(KEYS))
        time.sleep(0.01)
    for manager in managers:
        manager.close()
    return is_void


def run(url: str, seconds: float, workers: int, seed: int) -> dict[str, Any]:
    """Keep two hosts going for so long."""
    draw = random.Random(seed)
    hosts = [Host(letter, url, draw) for letter in HOSTS]
    try:
        for host in hosts:
            _prepare(host)
            host.start(workers)
        end = time.monotonic() + seconds
        next_kill, next_stop = time.monotonic() + KILL_EVERY, time.monotonic() + STOP_EVERY / 2
        stopped: list[tuple[float, int]] = []
        while (now := time.monotonic()) < end:
            for host in hosts:
                host.replace_the_dead()
                host.listen()
            if now > next_kill:
                draw.choice(hosts).kill_one()
                next_kill = now + draw.uniform(0, 2 * KILL_EVERY)
            if now > next_stop:
                stopped.append((now + STOP_FOR, draw.choice(hosts).stop_one()))
                next_stop = now + STOP_EVERY
            while stopped and stopped[0][0] < now:
                _go_on(stopped.pop(0)[1])
            time.sleep(0.01)
        for host in hosts:
            host.end()
        return {"hosts": [host.judge() for host in hosts], "void_everywhere": _are_void_everywhere(hosts)}
    finally:
        for host in hosts:
            with contextlib.suppress(OSError, ValueError):  # they have ended
                host.end()
            host.slab.unlink()
            host.slab.close()


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def _bars(result: dict[str, Any], seconds: float) -> list[Bar]:
    hosts = result["hosts"]
    return [
        at_most("times that L1 was flushed", sum(host["flushes"] for host in hosts), 0),
        at_least("untouched entries kept, of each host", min(host["untouched_kept"] for host in hosts), UNTOUCHED),
        at_least("void on both hosts at the end", float(result["void_everywhere"]), 1),
        at_most("problems that check() found", sum(len(host["check"]) for host in hosts), 0),
        at_least("workers recycled and killed", sum(host["recycled"] + host["killed"] for host in hosts), seconds / 2),
        at_most("longest time without a reader, ms", max(host["longest_silence_ms"] for host in hosts), 1000),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--workers", type=int, default=3, help="of each host (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "recycling.json", help="default: %(default)s")
    arguments = parser.parse_args()
    provenance = Provenance(arguments.seed, ("redis",))
    print(f"seed {arguments.seed}")
    with RedisServer() as server:
        result = run(server.url, arguments.seconds, arguments.workers, arguments.seed)
    for letter, host in zip(HOSTS, result["hosts"], strict=True):
        print(f"host {letter}: {host}")
    return 0 if write_results(arguments.json, provenance, result, _bars(result, arguments.seconds)) else 1


if __name__ == "__main__":
    sys.exit(main())
