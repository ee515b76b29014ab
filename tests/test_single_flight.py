"""One computation of a missing key on a host, in whatever thread, task or process its callers are."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from callers import FACES, LIVENESS, Face, Outcome, Provider, crew, make_face, outcome_of, request, wait_until

from llm_edge_cache import CachedResponse, CacheManager, L1Config, SharedSlab, SyncCacheManager
from llm_edge_cache.regions import Counter

MiB = 1 << 20


@pytest.fixture(params=FACES)
def kind(request: pytest.FixtureRequest) -> str:
    """Which face."""
    return str(request.param)


@pytest.fixture
def l1(name: str) -> L1Config:
    """A tier of its own."""
    return L1Config(name=name, memory_bytes=4 * MiB)


@pytest.fixture
def face(kind: str, l1: L1Config) -> Iterator[Face]:
    """A manager in this process."""
    made = make_face(kind, l1)
    made.open()
    yield made
    made.close()


@pytest.fixture
def shut(tmp_path: Path) -> Provider:
    """A provider that answers once it is opened."""
    return Provider(tmp_path / "calls", gate=tmp_path / "gate")


def counted(face: Face, counter: Counter) -> int:
    return face.manager.slab._counter_sums()[counter]


def collect(calls: list[Future[list[Outcome]]]) -> list[Outcome]:
    return [outcome for call in calls for outcome in call.result(2 * LIVENESS)]


# ---- one host ----


def test_all_callers_of_all_processes_are_served_by_one_call(kind: str, l1: L1Config, tmp_path: Path) -> None:
    provider = Provider(tmp_path / "calls", 0.3)
    with crew(kind, 4, l1) as workers:
        outcomes = collect([worker.call(provider, callers=50) for worker in workers])
    (call,) = provider.calls()
    assert [outcome.content for outcome in outcomes] == [f"answer of {call.pid}"] * 200


def test_a_killed_leader_costs_one_call_more(kind: str, l1: L1Config, shut: Provider) -> None:
    with crew(kind, 4, l1) as workers:
        calls = {worker.pid: worker.call(shut, callers=10) for worker in workers}
        (first,) = shut.wait_called()
        (leader,) = (worker for worker in workers if worker.pid == first.pid)
        leader.kill()
        del calls[leader.pid]
        second = shut.wait_called(2)[1]
        shut.open()
        assert {outcome.content for outcome in collect(list(calls.values()))} == {f"answer of {second.pid}"}
        assert len(shut.calls()) == 2
        assert SharedSlab.attach(l1.name)._counter_sums()[Counter.TAKEOVERS] == 1


def test_a_failure_reaches_who_waits_and_nobody_else(kind: str, l1: L1Config, tmp_path: Path, shut: Provider) -> None:
    failing = shut._replace(error="no credit")
    with crew(kind, 3, l1) as workers:
        calls = {worker.pid: worker.call(failing, callers=5) for worker in workers}
        (call,) = failing.wait_called()
        wait_for_joiners(workers, 15)
        failing.open()
        for outcome in collect([calls.pop(call.pid)]):
            assert (outcome.error, outcome.text) == ("ProviderError", "no credit")
        for outcome in collect(list(calls.values())):
            assert outcome.error == "ComputeError"
            assert "ProviderError: no credit" in outcome.text
        assert len(failing.calls()) == 1
        assert not workers[0].do("lookup", request()).is_hit
        again = Provider(tmp_path / "again")
        assert collect([workers[1].call(again)])[0].error is None
        assert len(again.calls()) == 1


def wait_for_joiners(workers: list[Any], count: int) -> None:
    """Wait until so many get_or_compute() calls have missed in L1, and have had time to join the flight."""
    wait_until(lambda: workers[0].do("metrics_snapshot").l1_misses >= count, "the callers miss")
    time.sleep(0.1)


def test_callers_of_one_process_get_the_same_exception(face: Face, shut: Provider) -> None:
    failing = shut._replace(error="no credit")
    calls = [face.start(failing) for _ in range(20)]
    failing.wait_called()
    wait_until(lambda: counted(face, Counter.COALESCED) == 19, "all but the leader wait")
    failing.open()
    assert len({id(call.exception(LIVENESS)) for call in calls}) == 1
    assert outcome_of(calls[0]).error == "ProviderError"
    assert not face.do("lookup", request()).is_hit
    assert counted(face, Counter.COMPUTE_ERRORS) == 1


def test_who_gives_up_does_not_disturb_the_others(face: Face, shut: Provider) -> None:
    leading = face.start(shut)
    shut.wait_called()
    hasty = face.start(shut, timeout=0.05)
    patient = face.start(shut)
    assert outcome_of(hasty).error == "TimeoutError"
    shut.open()
    assert outcome_of(leading).content == outcome_of(patient).content == f"answer of {os.getpid()}"
    assert len(shut.calls()) == 1


def test_a_caller_in_another_process_gives_up_when_its_time_is_up(kind: str, l1: L1Config, shut: Provider) -> None:
    with crew(kind, 2, l1) as (leader, other):
        leading = leader.call(shut)
        shut.wait_called()
        hasty = other.call(shut, callers=3, timeout=0.1)
        assert [outcome.error for outcome in hasty.result(LIVENESS)] == ["TimeoutError"] * 3
        shut.open()
        assert leading.result(LIVENESS)[0].error is None
    assert len(shut.calls()) == 1


def test_who_waits_longer_goes_on_when_the_first_of_its_process_gives_up(kind: str, l1: L1Config, shut: Provider) -> None:
    with crew(kind, 2, l1) as (leader, other):
        leading = leader.call(shut)
        shut.wait_called()
        hasty = other.call(shut, timeout=0.1)
        wait_for_joiners([leader], 2)
        patient = other.call(shut)
        assert hasty.result(LIVENESS)[0].error == "TimeoutError"
        shut.open()
        assert collect([leading, patient])[0].content == f"answer of {leader.pid}"
        assert patient.result(0)[0].content == f"answer of {leader.pid}"
    assert len(shut.calls()) == 1


async def test_cancelled(manager: CacheManager, provider: Provider, who: int) -> None:
    """Cancel one of three callers; the two others are served by one call."""
    tasks = [asyncio.ensure_future(manager.get_or_compute(request(), provider.compute_async)) for _ in range(3)]
    while not provider.calls():
        await asyncio.sleep(0.002)
    tasks[who].cancel()
    await asyncio.sleep(0.01)
    provider.open()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(CachedResponse) == 2
    assert isinstance(outcomes[who], asyncio.CancelledError)


test_cancelled.__test__ = False  # type: ignore[attr-defined]
