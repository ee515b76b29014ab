"""One computation of a missing key over several hosts: two slabs, one real Redis."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from callers import (
    FACES,
    LIVENESS,
    Loop,
    Outcome,
    Provider,
    Worker,
    close_copies,
    crew,
    make_face,
    outcome_of,
    request,
    wait_until,
)
from fault_proxy import FaultProxy
from processes import ends_well, fork
from redis_servers import RedisServer

from llm_edge_cache import CacheManager, L1Config, L2Config, SharedSlab, fetch, upkeep
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter

MiB = 1 << 20


@pytest.fixture(params=FACES)
def kind(request: pytest.FixtureRequest) -> str:
    """Which face."""
    return str(request.param)


@pytest.fixture
def hosts(name: str) -> Iterator[tuple[L1Config, L1Config]]:
    """Two slabs of their own."""
    both = tuple(L1Config(name=f"{name}-{which}", memory_bytes=4 * MiB) for which in "ab")
    yield both[0], both[1]
    for l1 in both:
        if SharedSlab.exists(l1.name):
            SharedSlab.attach(l1.name).unlink()


def l2_of(url: str) -> L2Config:
    """A prefix of its own in this Redis; its answers have time while the machine is busy."""
    return L2Config(redis_url=url, key_prefix=f"{secrets.token_hex(4)}:", operation_timeout_ms=10_000)


@pytest.fixture
def l2(redis_server: RedisServer) -> L2Config:
    """The Redis of both hosts."""
    return l2_of(redis_server.unix_url)


@pytest.fixture
def shut(tmp_path: Path) -> Provider:
    """A provider that answers once it is opened."""
    return Provider(tmp_path / "calls", gate=tmp_path / "gate")


@contextlib.contextmanager
def two_hosts(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, count: int = 1
) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """So many workers on each host, of this face on one and of the other face on the other."""
    (other,) = set(FACES) - {kind}
    with crew(kind, count, hosts[0], l2) as here, crew(other, count, hosts[1], l2) as there:
        yield here, there


def contents(*calls: list[Outcome]) -> set[str | None]:
    for outcome in (outcome for call in calls for outcome in call):
        assert outcome.error is None, outcome
    return {outcome.content for call in calls for outcome in call}


def sums(l1: L1Config) -> tuple[int, ...]:
    with SharedSlab.attach(l1.name) as slab:
        return slab._counter_sums()


def wait_polling(l1: L1Config, shut: Provider) -> None:
    """Wait until a host has missed in L1 and asks Redis for the lease that the other one has."""
    wait_until(lambda: sums(l1)[Counter.L1_MISSES] >= 1, "the other host misses")


def test_all_callers_of_both_hosts_are_served_by_one_call(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, tmp_path: Path
) -> None:
    provider = Provider(tmp_path / "calls", 0.3)
    with two_hosts(kind, hosts, l2, 2) as (here, there):
        calls = [worker.call(provider, callers=10) for worker in (*here, *there)]
        (answer,) = contents(*(call.result(LIVENESS) for call in calls))
        (call,) = provider.calls()
        assert answer == f"answer of {call.pid}"


def test_a_lease_is_renewed_as_long_as_it_takes(hosts: tuple[L1Config, L1Config], l2: L2Config, tmp_path: Path) -> None:
    provider = Provider(tmp_path / "calls", 3.0)
    with two_hosts("asyncio", hosts, l2) as ((here,), (there,)):
        calls = [here.call(provider), there.call(provider)]
        assert len(contents(*(call.result(LIVENESS) for call in calls))) == 1
    assert len(provider.calls()) == 1


def test_the_call_of_a_killed_process_is_made_by_another_host(
    hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider
) -> None:
    with two_hosts("threads", hosts, l2) as ((here,), (there,)):
        here.call(shut, callers=3)
        shut.wait_called()
        waiting = there.call(shut, callers=3)
        wait_polling(hosts[1], shut)
        here.kill()
        shut.wait_called(2)
        shut.open()
        assert contents(waiting.result(LIVENESS)) == {f"answer of {there.pid}"}
        assert len(shut.calls()) == 2


def test_a_failure_gives_the_lease_up_and_the_other_host_tries(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider, tmp_path: Path
) -> None:
    with two_hosts(kind, hosts, l2) as ((here,), (there,)):
        failing = here.call(shut._replace(error="no credit"))
        shut.wait_called()
        others = there.call(Provider(tmp_path / "others"))
        wait_polling(hosts[1], shut)
        shut.open()
        assert failing.result(LIVENESS)[0].error == "ProviderError"
        assert contents(others.result(LIVENESS)) == {f"answer of {there.pid}"}


SOON = 0.05  # seconds
OLD = Provider(Path(os.devnull), content="old")


def test_a_failed_computation_leaves_the_stale_value_for_the_other_host(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider
) -> None:
    options = {"l1_ttl": SOON, "l2_ttl": SOON, "stale_if_error": 600.0}
    with two_hosts(kind, hosts, l2) as ((here,), (there,)):
        contents(here.call(OLD, **options).result(LIVENESS))
        wait_until(lambda: sums(hosts[0])[Counter.L2_WRITES] == 1, "it is in Redis")
        time.sleep(1.5 * SOON)
        failing = here.call(shut._replace(error="no credit"), **options)
        shut.wait_called()
        others = there.call(shut._replace(error="no credit"), **options)
        wait_polling(hosts[1], shut)
        shut.open()
        assert contents(failing.result(LIVENESS), others.result(LIVENESS)) == {"old"}
    assert len(shut.calls()) == 2


def test_a_stale_value_is_served_while_another_host_computes_it_anew(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider
) -> None:
    options = {"stale_while_revalidate": 600.0}  # the new answer lives long
    with two_hosts(kind, hosts, l2) as ((here,), (there,)):
        contents(here.call(OLD, l1_ttl=SOON, l2_ttl=SOON, **options).result(LIVENESS))
        wait_until(lambda: sums(hosts[0])[Counter.L2_WRITES] == 1, "it is in Redis")
        time.sleep(1.5 * SOON)
        assert contents(here.call(shut, **options).result(LIVENESS)) == {"old"}
        shut.wait_called()
        assert contents(there.call(shut, **options).result(LIVENESS)) == {"old"}
        shut.open()
        # The other's revalidation waits for the lease, and finds what was computed under it.
        new = f"answer of {here.pid}"
        wait_until(lambda: there.do("lookup", request()).is_hit, "the new answer is there")
        assert there.do("lookup", request()).response.content == new
    assert len(shut.calls()) == 1


def test_an_owner_stopped_past_its_lease_answers_its_callers_and_stores_nothing_in_either_tier(
    hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider, tmp_path: Path
) -> None:
    with two_hosts("asyncio", hosts, l2) as ((owner,), (there,)):
        own = owner.call(shut, callers=3)
        shut.wait_called()
        wait_until(lambda: sums(hosts[0])[Counter.COALESCED] == 2, "the two others wait")
        owner.pause()
        others = there.call(Provider(tmp_path / "others"), callers=3)
        assert contents(others.result(LIVENESS)) == {f"answer of {there.pid}"}
        wait_until(lambda: sums(hosts[1])[Counter.L2_WRITES] == 1, "the other's answer is in Redis")
        shut.open()
        owner.resume()
        assert contents(own.result(LIVENESS)) == {f"answer of {owner.pid}"}
        assert owner.do("lookup", request()).response.content == f"answer of {there.pid}"
        assert there.do("lookup", request()).response.content == f"answer of {there.pid}"
    counts = sums(hosts[0])
    refused = (Counter.FLIGHTS_LOST, Counter.L1_FENCED, Counter.DROPPED_FENCED)
    assert [counts[which] for which in refused] == [1, 1, 1]


@pytest.mark.parametrize("comes_back", [False, True])
def test_redis_killed_in_mid_flight_costs_one_call_per_host(
    hosts: tuple[L1Config, L1Config], shut: Provider, comes_back: bool
) -> None:
    with RedisServer() as server, two_hosts("asyncio", hosts, l2_of(server.unix_url), 2) as (here, there):
        calls = [worker.call(shut, callers=3) for worker in here]
        shut.wait_called()
        calls += [worker.call(shut, callers=3) for worker in there]
        wait_until(lambda: sums(hosts[1])[Counter.L1_MISSES] >= 6, "the other host misses")
        server.kill()
        shut.wait_called(2)
        if comes_back:  # and has forgotten the lease
            server.start()
        shut.open()
        assert len(contents(*(call.result(LIVENESS) for call in calls))) == 2
        assert len(shut.calls()) == 2


def test_an_owner_whose_lease_redis_forgot_stores_its_answer_all_the_same(
    hosts: tuple[L1Config, L1Config],
    l2: L2Config,
    redis_server: RedisServer,
    shut: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (fetch, upkeep):  # the worker takes its lease for run out before it is
        monkeypatch.setattr(module, "LEASE_MS", 0)
    with crew("threads", 1, hosts[0], l2) as (owner,), redis_server.client() as client:
        own = owner.call(shut)
        shut.wait_called()
        for key in client.scan_iter(l2.key_prefix + "*"):
            if client.type(key) == b"string":
                client.delete(key)
        shut.open()
        assert contents(own.result(LIVENESS)) == {f"answer of {owner.pid}"}
        assert owner.do("lookup", request()).is_hit
        wait_until(lambda: sums(hosts[0])[Counter.L2_WRITES] == 1, "Redis has it, too")


def test_a_forked_child_leaves_its_parents_lease_alone_and_uses_redis_at_once(
    hosts: tuple[L1Config, L1Config], l2: L2Config, redis_server: RedisServer, shut: Provider, tmp_path: Path
) -> None:
    face = make_face("asyncio", hosts[0], l2)
    call = face.start(shut)
    shut.wait_called()

    def child() -> None:
        assert isinstance(face.manager, CacheManager)
        close_copies(face.manager)
        own = Loop(face.manager)
        outcome = outcome_of(own.start(Provider(tmp_path / "child"), "another question"))
        own.close()  # sends what is queued
        assert outcome.error is None

    assert ends_well(fork(child))
    lease = redis_server.ask("GET", l2.key_prefix.encode() + tier_key(request()))
    assert lease[:1] == b"L"
    wait_until(lambda: sums(hosts[0])[Counter.L2_WRITES] == 1, "the child's answer is in Redis")
    shut.open()
    assert outcome_of(call).content == f"answer of {os.getpid()}"
    face.close()
    assert sums(hosts[0])[Counter.L2_WRITES] == 2


@pytest.mark.parametrize(
    "invalidation", [("invalidate", request()), ("invalidate_tag", "news"), ("clear_all",)], ids=str
)
def test_who_comes_after_an_invalidation_is_not_served_by_what_another_host_began_before(
    hosts: tuple[L1Config, L1Config], l2: L2Config, tmp_path: Path, shut: Provider, invalidation: tuple[object, ...]
) -> None:
    with crew("threads", 1, hosts[0], l2) as (one,), crew("asyncio", 1, hosts[1], l2) as (other,):
        early = one.call(shut._replace(content="old"), tags=("news",))
        shut.wait_called()
        other.do(*invalidation)  # type: ignore[arg-type]
        late = other.call(Provider(tmp_path / "late", content="new"), callers=3, tags=("news",))
        # One that comes last may find what the first of them has computed by then.
        asked = (Counter.L1_MISSES, Counter.L1_HITS)
        wait_until(lambda: sum(sums(hosts[1])[counter] for counter in asked) >= 3, "all have asked")
        shut.open()
        assert contents(early.result(LIVENESS)) == {"old"}
        assert contents(late.result(LIVENESS)) == {"new"}


# ---- values that L1 does not take ----


def test_values_too_large_for_l1_come_from_redis_for_all_processes(
    kind: str, hosts: tuple[L1Config, L1Config], l2: L2Config, shut: Provider
) -> None:
    large = shut._replace(content="x", repeat=2 * MiB)
    with two_hosts(kind, hosts, l2, 2) as (here, there):
        calls = [worker.call(large, callers=3) for worker in (*here, *there)]
        large.wait_called()
        large.open()
        assert {len(content or "") for content in contents(*(call.result(LIVENESS) for call in calls))} == {2 * MiB}
        assert len(large.calls()) == 1


def test_without_redis_they_are_computed_by_all_processes_at_once(
    hosts: tuple[L1Config, L1Config], redis_server: RedisServer, shut: Provider, tmp_path: Path
) -> None:
    large = shut._replace(content="x", repeat=2 * MiB)
    meeting = Provider(tmp_path / "meeting", gate=tmp_path / "open", content="x", repeat=2 * MiB)
    with FaultProxy(redis_server.address) as proxy, crew("asyncio", 3, hosts[0], L2Config(proxy.url)) as workers:
        leader, *others = workers
        proxy.refuse()
        calls = [leader.call(large)]
        large.wait_called()
        calls += [other.call(meeting) for other in others]
        wait_until(lambda: sums(hosts[0])[Counter.L1_MISSES] >= 3, "they miss")
        large.open()
        meeting.wait_called(2)  # both before either has answered
        meeting.open()
        meeting.open()
        assert {len(content or "") for content in contents(*(call.result(LIVENESS) for call in calls))} == {2 * MiB}
