"""Redis in every kind of trouble behind both managers: nobody is raised at, held up or told anything wrong.

Each fault is met from full health, stays for a while, and is over: the first calls, the time when the breaker is open,
and the return to service are one story told by one test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from fault_proxy import FaultProxy
from manager_faces import AMPLE, HASTY, KINDS, Face, answer, ask, judge
from redis_servers import RedisCluster, RedisServer, ReservedPort, SentinelGroup, wait_for
from redis_troubles import OUTAGES, REFUSALS, Trouble, on_the_wire

from llm_edge_cache import CacheableRequest, SharedSlab
from llm_edge_cache.breaker import OPEN_FROM, PROBE_INTERVAL_NS
from llm_edge_cache.regions import Counter, Word

LATE = 5.0  # seconds; a bound that holds is well below it, a broken one well above
ERRORS = [counter for counter in Counter if counter.name.startswith("L2_ERROR_")]
DROPS = Counter.DROPPED_UNAVAILABLE

_numbers = itertools.count()


def fresh(what: str = "fresh") -> CacheableRequest:
    """A request that nobody has asked before."""
    return ask(f"{what} {next(_numbers)}")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def timely(call: Callable[..., object], *args: object, **options: object) -> object:
    start = time.monotonic()
    outcome = call(*args, **options)
    assert time.monotonic() - start < LATE
    return outcome


def call_all(face: Face, known: CacheableRequest, *, keeps_l1: bool = True) -> None:
    """One call of each kind; what it returns is right, and it returns soon."""
    found = timely(face.lookup, known)
    judge(known, found.response)  # type: ignore[attr-defined]
    face.forget(known)
    absent = fresh()
    assert not timely(face.lookup, absent).is_hit  # type: ignore[attr-defined]
    assert timely(face.store, absent, answer(absent))
    assert judge(absent, face.lookup(absent).response) or not keeps_l1
    computed = fresh()
    assert judge(computed, timely(face.get_or_compute, computed, lambda: answer(computed)))  # type: ignore[arg-type]


def counted_since(face: Face, before: dict[Counter, int]) -> dict[Counter, int]:
    now = face.counts()
    return {counter: now[counter] - before[counter] for counter in Counter}


def timeouts_for(trouble: Trouble) -> dict[str, int]:
    return HASTY if Counter.L2_ERROR_TIMEOUT in trouble.reasons else AMPLE


@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_is_met_sat_out_and_left(kind: str, outage: str, name: str) -> None:
    with OUTAGES[outage]() as trouble, Face(kind, name, trouble.url, **timeouts_for(trouble)) as face:
        face.wait_usable()
        known = [fresh("known") for _ in range(3)]
        for request in known:
            face.put_in_redis(request)

        trouble.strike()
        before = face.counts()
        for _ in range(3):
            call_all(face, known[0])
        wait_for(face.is_open, "the breaker opens")
        errors = {counter for counter in ERRORS if counted_since(face, before)[counter]}
        assert errors <= trouble.reasons
        assert errors

        face.flush()
        before = face.counts()
        for _ in range(20):
            call_all(face, known[1])
        face.flush()
        since = counted_since(face, before)
        # 20 x: known, fresh, computed; the answers just stored came from L1.
        assert since[Counter.L2_SKIPPED] == 60
        assert since[DROPS] == 40
        assert since[Counter.L2_HITS] == since[Counter.L2_MISSES] == since[Counter.L2_WRITES] == 0
        assert since[Counter.L1_HITS] == 20

        trouble.heal()
        wait_for(lambda: judge(known[2], face.lookup(known[2]).response), "Redis is in service again")
        assert face.count(Counter.L2_HITS) > 0
        face.put_in_redis(fresh())
        wait_for(lambda: not face.is_open(), "the breaker stays closed")


def test_a_redis_that_is_not_there_at_start_is_taken_up_when_it_is(kind: str, name: str) -> None:
    server = RedisServer()
    try:
        with Face(kind, name, server.url) as face:
            assert not face.health_check().l2_healthy
            for _ in range(3):
                call_all(face, ask("never stored"))
            face.flush()
            assert face.count(Counter.L2_HITS, Counter.L2_MISSES) == 0
            assert face.count(DROPS) == 6
            server.start()
            face.wait_usable()
            request = fresh()
            face.put_in_redis(request)
            assert judge(request, face.lookup(request).response)
            assert face.health_check().is_fully_healthy
    finally:
        server.destroy()


def test_the_first_call_of_a_manager_that_nobody_opened_waits_for_no_absent_redis(kind: str, name: str) -> None:
    with ReservedPort() as nowhere:
        face = Face(kind, name, f"redis://127.0.0.1:{nowhere}")
        assert not timely(face.lookup, fresh()).is_hit  # type: ignore[attr-defined]
        face.close()


def test_a_wrong_password_is_an_outage_counted_as_one(kind: str, name: str) -> None:
    with RedisServer(password="right") as server:
        url = server.url.replace("right", "wrong")
        with Face(kind, name, url) as face:
            wait_for(face.is_open, "the breaker opens")
            call_all(face, ask("never stored"))
            assert {counter for counter in ERRORS if face.count(counter)} == {Counter.L2_ERROR_AUTH}


def test_a_redis_slower_than_a_request_may_be_passes_no_probe(kind: str, name: str) -> None:
    patient = {"operation_timeout_ms": 200, "connection_timeout_ms": 20_000}
    with on_the_wire(lambda proxy: proxy.delay(2.0)) as trouble, Face(kind, name, trouble.url, **patient) as face:
        face.wait_usable()
        trouble.strike()
        wait_for(lambda: face.lookup(fresh()).is_hit or face.is_open(), "the breaker opens")
        proxy = trouble.proxy
        assert proxy is not None
        asked = proxy.asked
        wait_for(lambda: proxy.asked >= asked + 3, "it is probed")  # a PING that has the time, and what has not
        assert face.is_open()
        assert face.count(Counter.BREAKER_OPENED) == 1


def test_all_commands_of_a_look_up_share_one_operation_timeout(kind: str, name: str) -> None:
    slow = on_the_wire(lambda proxy: proxy.delay(1.5))
    with slow as trouble, Face(kind, name, trouble.url, operation_timeout_ms=2500) as face:
        face.wait_usable()
        plain, tagged = fresh(), fresh()
        face.put_in_redis(plain)
        face.put_in_redis(tagged, tags=("tag",))
        trouble.strike()
        assert judge(plain, face.lookup(plain).response)  # one command
        assert not face.lookup(tagged).is_hit  # two
        assert face.count(Counter.L2_ERROR_TIMEOUT) >= 1


# ---- a Redis that answers, but takes nothing ----


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_redis_that_takes_nothing_is_still_read_and_its_refusals_are_counted(
    kind: str, refusal: str, name: str
) -> None:
    with REFUSALS[refusal]() as trouble, Face(kind, name, trouble.url) as face:
        face.wait_usable()
        known = fresh("known")
        face.put_in_redis(known)
        trouble.strike()
        before = face.counts()
        assert judge(known, face.lookup(known).response)
        call_all(face, known)
        face.flush()
        since = counted_since(face, before)
        assert since[Counter.L2_HITS] == 1
        assert since[DROPS] == 2
        assert {counter for counter in ERRORS if since[counter]} == trouble.reasons
        assert not face.is_open()

        face.invalidate(known)  # cannot be told: so nothing of Redis is trusted until it is
        assert not face.lookup(known).is_hit
        trouble.heal()
        face.wait_usable()
        assert not face.lookup(known).is_hit
        request = fresh()
        face.put_in_redis(request)
        assert judge(request, face.lookup(request).response)


# ---- several servers ----


def test_a_slot_that_moves_costs_nothing(kind: str, name: str, cluster: RedisCluster) -> None:
    with Face(kind, name, cluster.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        known = fresh("known")
        face.put_in_redis(known)
        key = face.redis_name(known)
        destination = next(node for node in cluster.nodes if node is not cluster.holder(key))
        before = face.counts()
        with cluster.migrating(key, destination):
            assert judge(known, face.lookup(known).response)
            face.forget(known)
            assert judge(known, face.get_or_compute(known, lambda: pytest.fail("it is there")))
        face.forget(known)
        assert judge(known, face.lookup(known).response)
        face.forget(known)
        assert judge(known, face.get_or_compute(known, lambda: pytest.fail("it is there")))
        call_all(face, known)
        face.flush()
        since = counted_since(face, before)
        assert sum(since[counter] for counter in ERRORS) == since[DROPS] == 0
        assert since[Counter.L2_HITS] == 4
        cluster.migrate_back(key, destination)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as made:
        yield made


def test_a_failed_master_is_replaced_by_the_one_that_sentinels_name(name: str) -> None:
    with SentinelGroup() as group, contextlib.ExitStack() as stack:
        faces = [stack.enter_context(Face(kind, f"{name}-{kind}", group.url)) for kind in KINDS]
        known = [fresh("known") for _ in faces]
        for face, request in zip(faces, known, strict=True):
            stack.callback(face.slab.unlink)
            face.wait_usable()
            face.put_in_redis(request)
        wait_for(lambda: group.replica.ask("DBSIZE") == group.master.ask("DBSIZE"), "the replica has it all")
        group.fail_over()
        for face, request in zip(faces, known, strict=True):
            # L1 is cleared when the place in the new master's stream is not found, which may be right now.
            call_all(face, ask("never stored"), keeps_l1=False)
            wait_for(lambda face=face, request=request: judge(request, face.lookup(request).response), "in service")
            face.put_in_redis(fresh())


# ---- how often a Redis that is away is asked ----

_WORKER = """
import json, sys, time
from llm_edge_cache import CacheableRequest, CachedResponse, L1Config, L2Config, SyncCacheManager

name, url, own = sys.argv[1:]
slowest, calls = 0.0, 0
with SyncCacheManager(L1Config(name=name, memory_bytes=4 << 20), L2Config(url)) as cache:
    print("open", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end and not cache.lookup(CacheableRequest("model", own)).is_hit:
        start = time.monotonic()
        cache.get_or_compute(CacheableRequest("model", f"{own} {calls}"), lambda: CachedResponse("x", "m"))
        slowest, calls = max(slowest, time.monotonic() - start), calls + 1
        time.sleep(0.002)
    else:
        print(json.dumps({"slowest": slowest, "calls": calls}), flush=True)
"""


def test_a_host_of_three_processes_probes_once_an_interval_and_asks_nothing_else(
    name: str, redis_server: RedisServer
) -> None:
    own = [f"{name} {index}" for index in range(3)]
    with FaultProxy(redis_server.address) as proxy:
        with Face("threads", name, proxy.url) as face:
            face.wait_usable()
            for prompt in own:
                face.put_in_redis(ask(prompt))
        proxy.blackhole()
        workers = [
            subprocess.Popen([sys.executable, "-c", _WORKER, name, proxy.url, prompt], stdout=subprocess.PIPE)
            for prompt in own
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"open\n"
            with SharedSlab.attach(name) as slab:
                wait_for(lambda: slab._word(Word.BREAKER) >= OPEN_FROM, "the breaker opens")
            time.sleep(1.0)  # what was under way when it opened
            asked, start = proxy.asked, time.monotonic()
            time.sleep(5 * PROBE_INTERVAL_NS / 1e9)
            probes, seconds = proxy.asked - asked, time.monotonic() - start
            # One more at each end: claimed before, and sent only now; and the first of the intervals.
            assert 1 <= probes <= seconds / (PROBE_INTERVAL_NS / 1e9) + 2
            proxy.pass_on()
            for worker in workers:
                stdout, _ = worker.communicate(timeout=60)
                done = json.loads(stdout)
                assert done["calls"] > 0
                assert done["slowest"] < LATE
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()


# ---- deferred writes ----


def test_the_queue_is_bounded_and_what_does_not_fit_is_counted(kind: str, name: str) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(RedisServer())
        proxy = stack.enter_context(FaultProxy(server.address))
        with Face(kind, name, proxy.url, queue_limit=8) as face:
            face.wait_usable()
            proxy.delay(1.0)
            for _ in range(100):
                request = fresh()
                assert timely(face.store, request, answer(request))
            assert face.count(Counter.DROPPED_QUEUE_FULL) >= 100 - 2 * 8 - 64
            proxy.pass_on()
            face.flush()
            assert face.count(Counter.DROPPED_QUEUE_FULL, Counter.L2_WRITES, DROPS) == 100


def test_closing_sends_what_is_queued(kind: str, name: str, redis_server: RedisServer) -> None:
    requests = [fresh() for _ in range(200)]
    with Face(kind, name, redis_server.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        for request in requests:
            face.store(request, answer(request))
    assert redis_server.ask("EXISTS", *map(face.redis_name, requests)) == 200


def test_closing_drops_and_counts_what_cannot_be_sent(kind: str, name: str) -> None:
    with RedisServer() as server, Face(kind, name, server.url, **HASTY) as face:
        face.wait_usable()
        server.pause()
        for _ in range(200):
            request = fresh()
            face.store(request, answer(request))
        slab = SharedSlab.attach(name)
    sums = slab._counter_sums()
    assert sums[DROPS] == 200
    slab.close()
