"""Managers in four gunicorn workers: every series moves, and tells exactly what all workers ever counted.

The workers write down what they are about to count (`data/manager_app.py`); that is what the exported sums are compared
with, through workers that are recycled after some requests, killed, and stopped.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import signal
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from processes import fork, stop, write_for_ever
from redis_servers import RedisServer
from worker_servers import GUNICORN, HOOKS, Bench, Server, bench, wait_until

from llm_edge_cache import CacheableRequest, L1Config, L2Config, SharedSlab, SlabBusyError, SyncCacheManager, naming
from llm_edge_cache.codec import seal
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import COUNTER_LIMIT, Histogram
from llm_edge_cache.series import HISTOGRAMS, SERIES, Reading

WORKERS = 4
MAX_REQUESTS = 60
UNIT = 64
"""Bytes that an entry is a multiple of; it begins with its header."""
# What Redis is made to answer, by the reason that it is counted under.
ERRORS = {
    "auth": b"NOAUTH",
    "loading": b"LOADING",
    "cluster": b"CLUSTERDOWN",
    "oom": b"OOM",
    "readonly": b"READONLY",
    "response": b"ERR",
}

Sample = tuple[str, tuple[tuple[str, str], ...]]
Scrape = dict[Sample, float]


class Fleet:
    """The server, what its workers wrote down, and what they export."""

    def __init__(self, tools: Bench, folder: Path, redis: RedisServer, proxy: FaultProxy) -> None:
        self.name = tools.name
        self.prefix = f"fleet-{secrets.token_hex(4)}:"
        self.redis = redis
        self.proxy = proxy
        self.tallies = folder / "tallies"
        self.tallies.mkdir()
        self.seen: Scrape = {}
        """The largest value of every sample so far."""
        options = ["--workers", str(WORKERS), "--max-requests", str(MAX_REQUESTS), "manager_app:application"]
        self.server = tools.start([*GUNICORN, *HOOKS, *options], self._environ())

    def _environ(self) -> Mapping[str, str]:
        return {
            "LLM_EDGE_CACHE_L1_MEMORY": "4MiB",
            "LLM_EDGE_CACHE_L1_MAX_CAPACITY": "100",
            "LLM_EDGE_CACHE_REDIS_URL": self.proxy.url,
            "LLM_EDGE_CACHE_KEY_PREFIX": self.prefix,
            "LLM_EDGE_CACHE_QUEUE_LIMIT": "8",
            "LLM_EDGE_CACHE_OPERATION_TIMEOUT_MS": "1000",
            # Shorter than one read of the stream lasts: older entries of L1 are now and then checked in Redis.
            "LLM_EDGE_CACHE_STALENESS": "0.1",
            "MANAGER_APP_TALLIES": str(self.tallies),
        }

    def tallied(self) -> Reading:
        """All counts of all workers that ever were."""
        sums: dict[str, Tally[int]] = {"counter": Tally(), "histogram": Tally()}
        for path in self.tallies.iterdir():
            for line in path.read_text().splitlines():
                kind, index, amount = line.split()
                sums[kind][int(index)] += int(amount)
        counters = tuple(sums["counter"][index] for index in range(COUNTER_LIMIT))
        histograms = tuple((sums["histogram"][index],) for index in Histogram)
        return Reading(False, counters, histograms, {}, {}, None, 0)  # type: ignore[arg-type]

    def scrape(self) -> Scrape:
        """What one worker exports; no counter may ever have been larger."""
        answer = self.server.ask("/metrics")
        found = {(name, tuple(map(tuple, labels))): value for name, labels, value in answer["samples"]}
        for sample, value in found.items():
            if sample[0].endswith(("_total", "_count", "_sum", "_bucket")):
                assert value >= self.seen.get(sample, 0), sample
            self.seen[sample] = max(value, self.seen.get(sample, 0))
        return found

    def wait_exact(self) -> None:
        """Wait until the exported sums are those that were written down: what is under way ends meanwhile."""

        def is_exact() -> bool:
            return mismatches(self.scrape(), self.tallied()) == []

        try:
            wait_until(is_exact, "exported sums are what was counted")
        except AssertionError:
            assert mismatches(self.scrape(), self.tallied()) == []
            raise

    def wait_for(self, sample: str, **labels: str) -> None:
        """Wait until a sample is above 0."""
        key = (sample, tuple(sorted(labels.items())))
        wait_until(lambda: self.scrape()[key] > 0, f"{sample} {labels} is above 0")

    def everywhere(self, path: str) -> None:
        """Ask with another id each time until every worker that runs now has been asked."""
        pids = self.server.pids(WORKERS)
        asked: set[int] = set()
        while not pids <= asked:
            asked.add(self.server.ask(f"{path}{secrets.token_hex(4)}")["pid"])
            pids &= set(children(self.server))

    def wait_healthy(self) -> None:
        self.proxy.pass_on()
        wait_until(lambda: self.scrape()["llm_edge_cache_breaker_open", ()] == 0, "the breaker is closed")


def children(server: Server) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()]


def mismatches(exported: Scrape, tallied: Reading) -> list[tuple[Sample, float, float]]:
    """Samples that differ from the workers' own counts; those that the kernel counts are left out."""
    found = []
    for series in SERIES:
        for values, source in series.samples:
            sample = _sample(series.name, series.labels, values)
            expected = _or_none(source, tallied)
            if series.kind == "counter" and expected is not None and exported[sample] != expected:
                found.append((sample, exported[sample], expected))
    for one in HISTOGRAMS:
        for values, histogram in one.samples:
            sample = _sample(f"{one.name}_count", one.labels, values)
            if exported[sample] != tallied.histograms[histogram][0]:
                found.append((sample, exported[sample], tallied.histograms[histogram][0]))
    return found


def _sample(name: str, labels: tuple[str, ...], values: tuple[str, ...]) -> Sample:
    return name, tuple(sorted(zip(labels, values, strict=True)))


def _or_none(source: Callable[[Reading], float | None], tallied: Reading) -> float | None:
    try:
        return source(tallied)
    except (KeyError, AttributeError):  # not of the counters: the kernel's
        return None


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    with RedisServer() as redis, FaultProxy(redis.address) as proxy, bench(folder) as tools:
        yield Fleet(tools, folder, redis, proxy)


# The tests of one module run in the order in which they stand here, and share the fleet: a history of one host.


def test_every_worker_uses_the_cache(fleet: Fleet) -> None:
    fleet.everywhere("/use?id=")
    fleet.wait_exact()


def test_one_process_of_the_host_reads_the_stream_and_connections_are_few(fleet: Fleet) -> None:
    blocked = set()

    def has_been_read() -> bool:
        blocked.add(fleet.redis.ask("INFO", "clients")["blocked_clients"])
        return 1 in blocked

    for _ in range(50):  # over several reads of the stream
        has_been_read()
        time.sleep(0.01)
    wait_until(has_been_read, "the stream is read")
    assert blocked <= {0, 1}
    # Each process keeps what its threads have used at once: a request, a deferred write, the upkeep, the stream.
    assert fleet.redis.connections() <= 4 * WORKERS


def test_what_is_overtaken_what_does_not_fit_and_what_has_no_record(fleet: Fleet) -> None:
    fleet.server.ask("/overtaken?id=1")
    fleet.server.ask("/fill?count=400")
    fleet.server.ask("/crowd?id=1")
    fleet.wait_exact()


def test_entries_are_verified_while_the_stream_is_out_of_contact(fleet: Fleet) -> None:
    def is_unverified() -> bool:
        fleet.server.ask("/look?prompt=verified")
        return fleet.scrape()["llm_edge_cache_unverified_total", ()] > 0

    wait_until(is_unverified, "an entry is checked in Redis")
    fleet.wait_exact()


BAD = {
    "truncated": b"",
    "format": b"\x77" + seal(b"xx")[1:],
    "checksum": seal(b"xx")[:-1] + b"y",
    "compression": seal(b"\x28\xb5\x2f\xfd and no frame"),
    "content": seal(b"\x01"),
}


@pytest.mark.parametrize("reason", BAD)
def test_values_of_strangers(fleet: Fleet, reason: str) -> None:
    request = CacheableRequest("m", f"bad {reason}")
    begin = b"7" + b"f" * 15 + b"0" * 13  # later than all that was invalidated, and no guard
    fleet.redis.ask("SET", fleet.prefix.encode() + tier_key(request), b"V" + begin + BAD[reason])
    fleet.server.ask(f"/look?prompt=bad+{reason}")
    fleet.wait_for("llm_edge_cache_bad_values_total", reason=reason)
    fleet.wait_exact()


def test_another_host_invalidates(fleet: Fleet, name: str) -> None:
    with SyncCacheManager(
        L1Config(name=name, memory_bytes=4 << 20), L2Config(fleet.redis.url, key_prefix=fleet.prefix)
    ) as other:
        other.invalidate(CacheableRequest("m", "there"))
        fleet.wait_for("llm_edge_cache_invalidations_total", kind="remote")
    fleet.server.ask("/clear")
    fleet.wait_exact()


@pytest.mark.parametrize("reason", ERRORS)
def test_errors_of_redis(fleet: Fleet, reason: str) -> None:
    fleet.proxy.garbage(b"-%s said by the test\r\n" % ERRORS[reason])
    fleet.server.ask(f"/look?prompt=error+{reason}")
    fleet.wait_for("llm_edge_cache_errors_total", tier="l2", reason=reason)
    fleet.wait_healthy()
    fleet.wait_exact()


@pytest.mark.parametrize("reason", ["timeout", "connection"])
def test_outages_of_redis(fleet: Fleet, reason: str) -> None:
    fleet.proxy.blackhole() if reason == "timeout" else fleet.proxy.refuse()

    def is_open() -> bool:  # asks itself: scraped that often, workers are recycled before their upkeep has timed out
        fleet.server.ask(f"/look?prompt=outage+{reason}")
        return fleet.scrape()["llm_edge_cache_breaker_open", ()] == 1

    wait_until(is_open, "the breaker is open")
    fleet.server.ask(f"/look?prompt=skipped+{reason}")
    fleet.wait_for("llm_edge_cache_errors_total", tier="l2", reason=reason)
    fleet.wait_healthy()
    fleet.wait_exact()


# ---- workers that come and go ----


def _compute(fleet: Fleet, prompt: str, seconds: float, pool: ThreadPoolExecutor) -> int:
    """Have some worker compute for so long; return its process id once it does."""
    folder = fleet.tallies.parent
    known = set(folder.glob(f"computing {prompt} *"))
    pool.submit(fleet.server._ask_once, f"/slow?prompt={prompt}&seconds={seconds}")
    wait_until(lambda: set(folder.glob(f"computing {prompt} *")) - known, "a computation has begun")
    (path,) = set(folder.glob(f"computing {prompt} *")) - known
    return int(path.name.rsplit(" ", 1)[1])


def test_a_computation_of_a_killed_worker_is_taken_over(fleet: Fleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        leader = _compute(fleet, "killed", 30, pool)
        waiting = pool.submit(fleet.server.ask, "/slow?prompt=killed&seconds=0.1")
        time.sleep(0.1)  # for the other to be waiting; the counts come out either way
        os.kill(leader, signal.SIGKILL)
        assert waiting.result()["pid"] != leader
    fleet.wait_exact()  # whether it counts as taken over depends: the master may have freed the dead one's record first


def test_a_computation_of_a_stopped_worker_is_lost_to_it(fleet: Fleet) -> None:
    with ThreadPoolExecutor(2) as pool:
        leader = _compute(fleet, "stopped", 0.5, pool)
        stop(leader)
        try:
            assert fleet.server.ask("/slow?prompt=stopped&seconds=0.1")["pid"] != leader
        finally:
            os.kill(leader, signal.SIGCONT)
    fleet.wait_for("llm_edge_cache_takeovers_total")
    fleet.wait_for("llm_edge_cache_flights_lost_total")
    fleet.wait_exact()


def test_workers_are_recycled_and_nothing_is_forgotten(fleet: Fleet) -> None:
    before = set(children(fleet.server))
    wait_until(
        lambda: fleet.server.ask_many("/pid", 40) and not before & set(children(fleet.server)), "all are recycled"
    )
    fleet.wait_exact()
    assert fleet.scrape()["llm_edge_cache_stream_flushes_total", ()] == 0


def test_killed_workers_take_nothing_with_them(fleet: Fleet) -> None:
    fleet.redis.ask("DEL", f"{fleet.prefix}events")  # their successors find that they missed something
    for pid in children(fleet.server):
        os.kill(pid, signal.SIGKILL)
    fleet.everywhere("/use?id=")
    fleet.wait_for("llm_edge_cache_stream_flushes_total")
    fleet.wait_exact()


# ---- processes that are stopped and killed inside the kernel ----


@contextlib.contextmanager
def _killed_with_the_lock(slab: SharedSlab) -> Iterator[None]:
    """Stop a process that has the slab's lock; it is killed at the end."""
    slab._set_lock_timeout(0.1)
    pid = fork(lambda: write_for_ever(slab))
    try:
        wait_until(lambda: _is_stopped_with_the_lock(slab, pid), "it is stopped while it has the lock")
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _is_stopped_with_the_lock(slab: SharedSlab, pid: int) -> bool:
    stop(pid)
    try:
        slab.set(b"ours", b"")
    except SlabBusyError:
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def test_a_process_killed_with_the_lock_is_recovered_from(fleet: Fleet) -> None:
    with SharedSlab.attach(fleet.name) as slab:
        with _killed_with_the_lock(slab):
            fleet.wait_for("llm_edge_cache_errors_total", tier="l1", reason="busy")
        fleet.everywhere("/use?id=")
        fleet.wait_for("llm_edge_cache_recoveries_total")
        assert fleet.scrape()["llm_edge_cache_shards_cleared_total", ()] == 0
        fleet.wait_exact()


def test_a_process_that_leaves_nonsense_behind_costs_the_entries_and_no_more(fleet: Fleet) -> None:
    """What no process of ours does: then there is no telling what is whole, and all of it goes."""
    with SharedSlab.attach(fleet.name) as slab:
        with _killed_with_the_lock(slab):
            path = naming.place_of(fleet.name, naming.current_owner()).segment
            with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as segment:
                at = segment.find(b"theirs")
                while at >= 0:
                    header = at // UNIT * UNIT
                    segment[header : header + UNIT] = b"\xff" * UNIT
                    at = segment.find(b"theirs", header + UNIT)
        fleet.everywhere("/use?id=")
        fleet.wait_for("llm_edge_cache_shards_cleared_total")
        fleet.wait_exact()


# ---- all of it ----


def test_every_worker_exports_the_same(fleet: Fleet) -> None:
    pids, scrapes = fleet.server.pids(WORKERS), {}

    def are_equal() -> bool:
        answers = fleet.server.ask_many("/metrics", 8)
        scrapes.update({answer["pid"]: [s for s in answer["samples"] if "_age_" not in s[0]] for answer in answers})
        newest = [scrapes[pid] for pid in scrapes if pid in children(fleet.server)]
        return len(newest) >= min(len(pids), WORKERS) and all(samples == newest[0] for samples in newest)

    wait_until(are_equal, "all workers export the same")


def test_every_series_was_seen_above_zero(fleet: Fleet) -> None:
    fleet.scrape()
    expected = {_sample(one.name, one.labels, values) for one in SERIES for values, _ in one.samples}
    for part in ("count", "sum"):
        expected |= {
            _sample(f"{one.name}_{part}", one.labels, values) for one in HISTOGRAMS for values, _ in one.samples
        }
    assert {sample for sample in expected if not fleet.seen.get(sample)} == set()


def test_the_slab_is_sound_after_all_that(fleet: Fleet) -> None:
    with SharedSlab.attach(fleet.name) as slab:
        assert slab.check() == []
