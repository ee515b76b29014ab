"""The cache on every kind of Redis that a URL may name, with every right that it may lack; and what it opens there."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from fault_proxy import FaultProxy
from manager_faces import KINDS, Face, answer, ask, judge
from redis_servers import RedisCluster, RedisServer, SentinelGroup, wait_for

from llm_edge_cache import redis_records
from llm_edge_cache.redis_commands import LuaScript
from llm_edge_cache.regions import Counter, Word
from llm_edge_cache.sizing import Sizer

ERRORS = [counter for counter in Counter if counter.name.startswith("L2_ERROR_")]


def everything_works(one: Face, other: Face) -> None:
    """Two hosts share values, tags and invalidations. Their L1s start empty."""
    requests = [ask(f"shared {index}") for index in range(40)]
    for request in requests:
        one.store(request, answer(request), tags=("even" if int(request.prompt.split()[1]) % 2 == 0 else "odd",))
    one.flush()
    assert one.count(Counter.L2_WRITES) == 40
    for request in requests:
        assert judge(request, other.get_or_compute(request, lambda: pytest.fail("it is there")))
    other.invalidate(requests[1])
    other.invalidate_tag("even")
    for request in requests[:3]:
        assert not other.lookup(request).is_hit
        wait_for(lambda request=request: not one.lookup(request).is_hit, "the other host has heard")
    assert judge(requests[3], one.lookup(requests[3]).response)
    assert one.l2_approximate_size() == other.l2_approximate_size() == 39  # values that a tag made void count
    other.clear_all()
    wait_for(lambda: not one.lookup(requests[3]).is_hit, "the other host has heard")
    assert one.health_check().is_fully_healthy
    assert one.l2_approximate_size() == 0
    for face in (one, other):
        assert face.count(*ERRORS, Counter.DROPPED_UNAVAILABLE, Counter.STREAM_FLUSHES) == 0


def try_everything(name: str, url: str) -> None:
    with contextlib.ExitStack() as stack:
        faces = []
        for kind in KINDS:
            face = stack.enter_context(Face(kind, f"{name}-{kind}", url))
            stack.callback(face.slab.unlink)
            face.wait_usable()
            faces.append(face)
        everything_works(*faces)


def test_over_a_unix_socket(name: str) -> None:
    with RedisServer(password="pw") as server:
        try_everything(name, server.unix_url)


def test_over_tls(name: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with RedisServer() as server, FaultProxy(server.address, tls=context) as proxy:
        try_everything(name, f"{proxy.url}?ssl_ca_certs={file}")


def test_behind_sentinels(name: str) -> None:
    with SentinelGroup(password="pw") as group:
        try_everything(name, group.url)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster(password="pw") as made:
        yield made


def test_on_a_cluster(name: str, cluster: RedisCluster) -> None:
    try_everything(name, cluster.url)
    sizes = [node.ask("DBSIZE") for node in cluster.nodes]
    assert all(sizes), sizes  # so the sizes above were sums over the nodes


def test_a_cluster_that_is_down_is_an_outage_that_no_probe_ends(name: str, cluster: RedisCluster) -> None:
    with Face("threads", name, cluster.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        lost = cluster.nodes[2]
        slots = [slot for slot in range(16384) if slot * 3 // 16384 == 2]
        cluster.forget(slots, lost)
        try:
            wait_for(lambda: face.lookup(ask("x")) and face.is_open(), "the breaker opens")
            opened = face.count(Counter.BREAKER_OPENED)
            skipped = face.count(Counter.L2_SKIPPED)
            wait_for(lambda: face.lookup(ask("x")) and face.count(Counter.L2_SKIPPED) > skipped + 500, "calls go by")
            assert face.count(Counter.BREAKER_OPENED) == opened
        finally:
            lost.ask("CLUSTER", "ADDSLOTS", *slots)
            for node in cluster.nodes:
                wait_for(lambda node=node: b"cluster_state:ok" in node.ask("CLUSTER", "INFO"), "the Cluster is up")
        face.wait_usable()
        face.put_in_redis(ask("y"))
        assert judge(ask("y"), face.lookup(ask("y")).response)


# ---- rights ----


@pytest.fixture
def restricted() -> Iterator[RedisServer]:
    """A server whose user "app" may use the cache's keys alone."""
    with RedisServer() as server:
        yield server


def as_app(server: RedisServer, *rules: str) -> str:
    server.ask("ACL", "SETUSER", "app", "reset", "on", ">pw", "~llm_cache:*", *rules)
    return server.url.replace("redis://", "redis://app:pw@")


NEEDED = (
    "+ping +get +getrange +setrange +strlen +set +del +pttl +pexpire +time +type +eval +evalsha "
    "+xadd +xread +xrange +xrevrange"
)
SIZING = "+dbsize +scan"


def test_the_documented_rights_are_enough(name: str, restricted: RedisServer) -> None:
    try_everything(name, as_app(restricted, *NEEDED.split(), *SIZING.split()))
    documented = (Path(__file__).parent.parent / "docs" / "failures.md").read_text()
    assert set(NEEDED.split()) <= set(documented.split())
    assert SIZING in documented


def test_no_branch_of_a_script_needs_a_right_that_is_not_documented() -> None:
    scripts = [script for script in vars(redis_records).values() if isinstance(script, LuaScript)]
    used = {name.lower() for script in scripts for name in re.findall(r"redis\.p?call\('(\w+)'", script.text)}
    assert {f"+{name}" for name in used} <= set(NEEDED.split())


@pytest.mark.parametrize("kind", KINDS)
def test_a_user_who_may_not_read_the_stream_is_served_from_redis_and_nothing_stale(
    kind: str, name: str, restricted: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = as_app(restricted, *NEEDED.replace("+xread ", "").split())
    contents = contextlib.ExitStack()
    with contents:
        face = contents.enter_context(Face(kind, name, url, staleness_seconds=0.2))
        other = contents.enter_context(Face(kind, f"{name}-other", url))
        contents.callback(other.slab.unlink)
        face.wait_usable()
        other.wait_usable()
        request = ask("once")
        face.put_in_redis(request)
        assert judge(request, face.lookup(request).response)
        wait_for(lambda: face.lookup(request) and face.count(Counter.UNVERIFIED), "L1 is not trusted for long")
        assert judge(request, face.lookup(request).response)
        other.invalidate(request)
        assert not face.lookup(request).is_hit
        assert face.count(Counter.L2_ERROR_AUTH) > 0
        assert face.count(Counter.BREAKER_OPENED) == 0
    warnings = [record for record in caplog.records if "lacks a right" in record.getMessage()]
    assert len(warnings) == 2  # one for each host, however often it is refused


def test_a_user_without_sizing_rights_has_everything_but_sizes(name: str, restricted: RedisServer) -> None:
    with Face("threads", name, as_app(restricted, *NEEDED.split())) as face:
        face.wait_usable()
        request = ask("once")
        face.put_in_redis(request)
        assert judge(request, face.lookup(request).response)
        assert face.l2_approximate_size() == 0
        assert not face.is_open()


# ---- sizes ----


def test_sizes_are_not_asked_of_a_redis_that_is_away(name: str, redis_server: RedisServer) -> None:
    options = {"key_prefix": f"{name}:", "operation_timeout_ms": 1000}
    with FaultProxy(redis_server.address) as proxy, Face("threads", name, proxy.url, **options) as face:
        face.wait_usable()
        face.put_in_redis(ask("one"))
        assert face.l2_approximate_size() == 1
        proxy.blackhole()
        wait_for(lambda: face.lookup(ask("x")) and face.is_open(), "the breaker opens")
        errors = face.count(*ERRORS)
        assert [face.l2_approximate_size() for _ in range(5)] == [1] * 5
        assert face.count(*ERRORS) <= errors + 1  # what was under way when it opened


def test_a_sample_is_due_once_a_minute(name: str, redis_server: RedisServer) -> None:
    with Face("threads", name, redis_server.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        wait_for(lambda: face.slab._word(Word.L2_SIZED_AT), "the first sample")
        assert face.engine.tier is not None
        sizer = Sizer(face.slab, face.engine.tier)
        at = face.slab._word(Word.L2_SIZED_AT)
        assert not sizer.is_due(at + 59_999_999_999)
        assert sizer.is_due(at + 60_000_000_000)


# ---- connections ----

_WORKER = """
import asyncio, json, sys
from llm_edge_cache import CacheableRequest, CachedResponse, CacheManager, L1Config, L2Config, SyncCacheManager

kind, name, url, own = sys.argv[1:]
tiers = L1Config(name=name, memory_bytes=4 << 20), L2Config(url)

def requests():
    return [(CacheableRequest("model", f"{own} {index}"), CachedResponse("x", "m")) for index in range(100)]

def wait():
    print("used", flush=True)
    sys.stdin.readline()

def threads():
    with SyncCacheManager(*tiers) as cache:
        for request, response in requests():
            cache.lookup(request)
            cache.store(request, response)
            cache.get_or_compute(request.with_max_tokens(1), lambda: response)
            cache.invalidate(request)
        wait()

async def coroutines():
    async with CacheManager(*tiers) as cache:
        for request, response in requests():
            await cache.lookup(request)
            await cache.store(request, response)
            await cache.get_or_compute(request.with_max_tokens(1), lambda: response)
            await cache.invalidate(request)
        wait()

threads() if kind == "threads" else asyncio.run(coroutines())
"""


def test_four_workers_hold_one_pool_each_and_one_stream_reader(name: str) -> None:
    with RedisServer() as server, contextlib.ExitStack() as stack:
        workers = []
        for index in range(4):
            command = [sys.executable, "-c", _WORKER, KINDS[index % 2], name, server.url, str(index)]
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(worker.communicate)
            workers.append(worker)
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"used\n"
        with server.client() as client:
            own = client.client_id()
            others = [other for other in client.client_list() if int(other["id"]) != own]
        readers = [other for other in others if other["cmd"] == "xread"]
        assert len(readers) == 1
        # A worker that makes one call at a time needs three: for that call, for its deferred writes, for its upkeep.
        assert len(others) - len(readers) <= 4 * 3, json.dumps(others, indent=1)
        total = server.ask("INFO", "stats")["total_connections_received"]
        assert total <= len(others) + 4 * 3 + 20  # none for each operation (the test's own ones are among these)


def test_who_reads_the_stream_no_longer_keeps_no_connection_for_it(name: str) -> None:
    def is_waiting(server: RedisServer) -> bool:
        with server.client() as client:
            return any(other["cmd"] == "xread" for other in client.client_list())

    with RedisServer() as server, Face("threads", name, server.url) as face:
        wait_for(lambda: is_waiting(server), "it reads")
        slab = face.engine.slab
        slab._word_set(Word.READER_BEAT, 1 << 62)  # another one that lives for ever
        slab._word_set(Word.READER, 2)
        wait_for(lambda: not is_waiting(server), "the connection is closed")
