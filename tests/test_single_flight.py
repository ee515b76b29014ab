"""One computation of a missing key on a host, in whatever thread, task or process its callers are."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from callers import (
    FACES,
    LIVENESS,
    Face,
    Loop,
    Outcome,
    Provider,
    Threads,
    close_copies,
    crew,
    make_face,
    outcome_of,
    request,
    wait_joined,
    wait_until,
)
from processes import ends_well, fork

from llm_edge_cache import CachedResponse, CacheManager, L1Config, SharedSlab, SyncCacheManager
from llm_edge_cache.errors import ComputeError
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
        wait_joined(workers, 15)
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


def test_who_waits_longer_goes_on_when_the_first_gives_up(kind: str, l1: L1Config, shut: Provider) -> None:
    with crew(kind, 2, l1) as (leader, other):
        leading = leader.call(shut)
        shut.wait_called()
        hasty = other.call(shut, timeout=0.1)
        wait_joined([leader, other], 2)
        patient = other.call(shut)
        assert hasty.result(LIVENESS)[0].error == "TimeoutError"
        shut.open()
        assert collect([leading, patient])[0].content == f"answer of {leader.pid}"
        assert patient.result(0)[0].content == f"answer of {leader.pid}"
    assert len(shut.calls()) == 1


@pytest.mark.parametrize("who", [0, 1])
def test_a_cancelled_caller_does_not_disturb_the_others(l1: L1Config, shut: Provider, who: int) -> None:
    async def cancel_one() -> list[Any]:
        async with CacheManager(l1) as manager:
            tasks = [asyncio.ensure_future(manager.get_or_compute(request(), shut.compute_async)) for _ in range(3)]
            while not shut.calls():
                await asyncio.sleep(0.002)
            tasks[who].cancel()
            await asyncio.sleep(0.01)
            shut.open()
            return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(cancel_one())
    assert isinstance(outcomes.pop(who), asyncio.CancelledError)
    assert [outcome.content for outcome in outcomes] == [f"answer of {os.getpid()}"] * 2
    assert len(shut.calls()) == 1


def test_the_computation_goes_on_when_all_callers_are_gone(l1: L1Config, shut: Provider) -> None:
    async def leave() -> Any:
        async with CacheManager(l1) as manager:
            with pytest.raises(TimeoutError):
                await manager.get_or_compute(request(), shut.compute_async, timeout=0.05)
            shut.open()
            return await manager.get_or_compute(request(), shut.compute_async)

    assert asyncio.run(leave()).content == f"answer of {os.getpid()}"
    assert len(shut.calls()) == 1


def test_a_computation_that_cancels_itself_is_an_error_to_its_callers(l1: L1Config) -> None:
    async def cancelled() -> CachedResponse:
        raise asyncio.CancelledError

    async def call() -> None:
        async with CacheManager(l1) as manager:
            with pytest.raises(ComputeError, match="cancelled"):
                await manager.get_or_compute(request(), cancelled)

    asyncio.run(call())


class Interrupt(BaseException):
    """What ends one thread or greenlet and concerns no other: KeyboardInterrupt, gevent.Timeout."""


def test_a_thread_that_is_interrupted_does_not_disturb_the_others(l1: L1Config, shut: Provider) -> None:
    begun, interrupt = threading.Event(), threading.Event()

    def interrupted() -> CachedResponse:
        begun.set()
        interrupt.wait(LIVENESS)
        raise Interrupt

    def lead(manager: SyncCacheManager) -> None:
        with pytest.raises(Interrupt):
            manager.get_or_compute(request(), interrupted)

    face = make_face("threads", l1)
    assert isinstance(face.manager, SyncCacheManager)
    leader = threading.Thread(target=lead, args=(face.manager,))
    leader.start()
    begun.wait(LIVENESS)
    others = [face.start(shut) for _ in range(3)]
    wait_until(lambda: counted(face, Counter.L1_MISSES) == 4, "they miss")
    interrupt.set()
    leader.join(LIVENESS)
    shut.open()
    assert [outcome_of(call).content for call in others] == [f"answer of {os.getpid()}"] * 3
    assert len(shut.calls()) == 1
    face.close()


def test_twenty_threads_and_many_keys(l1: L1Config, tmp_path: Path) -> None:
    provider = Provider(tmp_path / "calls", 0.001)
    with SyncCacheManager(l1) as manager:

        def work() -> None:
            for number in range(50):
                answer = manager.get_or_compute(request(f"question {number}"), provider.compute)
                assert answer is not None

        threads = [threading.Thread(target=work) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIVENESS)
        assert len(provider.calls()) == 50
        assert manager.l1_entry_count() == 50


def test_two_event_loops_of_one_process_share_a_computation(l1: L1Config, shut: Provider) -> None:
    manager = CacheManager(l1)
    loops = [Loop(manager), Loop(manager)]
    calls = [loop.start(shut) for loop in loops for _ in range(5)]
    shut.wait_called()
    wait_until(lambda: counted(loops[0], Counter.L1_MISSES) == 10, "they miss")
    shut.open()
    assert [outcome_of(call).content for call in calls] == [f"answer of {os.getpid()}"] * 10
    assert len(shut.calls()) == 1
    loops[1].stop()
    loops[0].close()


def test_a_loop_that_does_not_run_loses_its_flight(l1: L1Config, tmp_path: Path, shut: Provider) -> None:
    manager = CacheManager(l1)
    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(manager.get_or_compute(request(), shut.compute_async, timeout=0.05))
    with crew("threads", 1, l1) as (other,):  # the loop stands still with the flight on it
        assert collect([other.call(Provider(tmp_path / "others"))])[0].content == f"answer of {other.pid}"
    shut.open()
    loop.run_until_complete(asyncio.sleep(0.05))
    (found,) = [loop.run_until_complete(manager.lookup(request())).response]
    assert found is not None
    assert found.content == f"answer of {other.pid}"
    loop.run_until_complete(manager.aclose())
    loop.close()


# ---- an owner that is stopped ----


def test_an_owner_that_was_stopped_answers_its_callers_and_stores_nothing(
    kind: str, l1: L1Config, tmp_path: Path, shut: Provider
) -> None:
    with crew(kind, 2, l1) as (owner, other):
        own = owner.call(shut, callers=3)
        shut.wait_called()
        with SharedSlab.attach(l1.name) as slab:
            wait_until(lambda: slab._counter_sums()[Counter.COALESCED] == 2, "the two others wait")
        owner.pause()
        others = Provider(tmp_path / "others")
        assert {outcome.content for outcome in collect([other.call(others, callers=3)])} == {f"answer of {other.pid}"}
        shut.open()
        owner.resume()
        assert {outcome.content for outcome in collect([own])} == {f"answer of {owner.pid}"}
        assert other.do("lookup", request()).response.content == f"answer of {other.pid}"
    sums = SharedSlab.attach(l1.name)._counter_sums()
    assert [sums[which] for which in (Counter.TAKEOVERS, Counter.FLIGHTS_LOST, Counter.L1_FENCED)] == [1, 1, 1]


# ---- what began too early ----

INVALIDATIONS = [("invalidate", request()), ("invalidate_tag", "news"), ("clear_all",)]


@pytest.mark.parametrize("invalidation", INVALIDATIONS, ids=lambda call: call[0])
def test_who_comes_after_an_invalidation_is_not_served_by_what_began_before(
    face: Face, tmp_path: Path, shut: Provider, invalidation: tuple[Any, ...]
) -> None:
    early = face.start(shut._replace(content="old"), tags=("news",))
    shut.wait_called()
    face.do(*invalidation)
    late = [face.start(Provider(tmp_path / "late", content="new"), tags=("news",)) for _ in range(5)]
    wait_until(lambda: counted(face, Counter.L1_MISSES) == 6, "they miss")
    shut.open()
    assert outcome_of(early).content == "old"
    assert [outcome_of(call).content for call in late] == ["new"] * 5
    assert len(Provider(tmp_path / "late").calls()) == 1
    assert face.do("lookup", request()).response.content == "new"


@pytest.mark.parametrize("invalidation", INVALIDATIONS, ids=lambda call: call[0])
@pytest.mark.parametrize("failure", [None, "no credit"])
def test_nor_by_that_of_another_process(
    l1: L1Config, tmp_path: Path, shut: Provider, invalidation: tuple[Any, ...], failure: str | None
) -> None:
    with crew("asyncio", 1, l1) as (one,), crew("threads", 1, l1) as (other,):
        early = one.call(shut._replace(content="old", error=failure), tags=("news",))
        shut.wait_called()
        other.do(*invalidation)
        late = other.call(Provider(tmp_path / "late", content="new"), callers=3, tags=("news",))
        wait_until(lambda: one.do("metrics_snapshot").l1_misses >= 4, "they miss")
        shut.open()
        assert collect([early])[0].error == (failure and "ProviderError")
        assert [outcome.content for outcome in collect([late])] == ["new"] * 3
        assert one.do("lookup", request()).response.content == "new"


# ---- values that L1 does not take ----


def test_values_too_large_for_l1_are_computed_by_all_processes_at_once(
    kind: str, l1: L1Config, tmp_path: Path, shut: Provider
) -> None:
    large = shut._replace(content="x", repeat=2 * MiB)
    meeting = Provider(tmp_path / "meeting", gate=tmp_path / "open", content="x", repeat=2 * MiB)
    with crew(kind, 4, l1) as (leader, *others):
        calls = [leader.call(large)]
        large.wait_called()
        calls += [other.call(meeting, callers=3) for other in others]
        wait_joined([leader, *others], 10)
        large.open()
        meeting.wait_called(3)  # all before the first of them has answered
        meeting.open()
        assert {len(outcome.content or "") for outcome in collect(calls)} == {2 * MiB}
        assert len(meeting.calls()) == 3


# ---- fork and close ----


def test_a_forked_child_uses_the_manager_at_once_and_the_parents_flight_goes_on(
    face: Face, tmp_path: Path, shut: Provider
) -> None:
    calls = [face.start(shut) for _ in range(3)]
    shut.wait_called()
    others = Provider(tmp_path / "others")
    assert ends_well(fork(lambda: _use_in_child(face, others, shut)))
    assert [outcome_of(call).content for call in calls] == [f"answer of {os.getpid()}"] * 3
    assert (len(shut.calls()), len(others.calls())) == (1, 1)
    assert counted(face, Counter.FLIGHTS_LOST) == counted(face, Counter.COMPUTE_ERRORS) == 0


def _use_in_child(face: Face, others: Provider, shut: Provider) -> None:
    manager = face.manager
    if isinstance(manager, CacheManager):
        close_copies(manager)
        mine = Loop(manager)
    else:
        mine = Threads(manager)
    own = outcome_of(mine.start(others, "another question"))
    shared = mine.start(shut)  # the parent's flight, from another process
    time.sleep(0.1)
    shut.open()
    assert own.content == f"answer of {os.getpid()}"
    assert outcome_of(shared).content == f"answer of {os.getppid()}"


def test_threads_whose_cache_is_closed_get_their_answers(l1: L1Config, tmp_path: Path, shut: Provider) -> None:
    face = make_face("threads", l1)
    calls = [face.start(shut) for _ in range(3)]
    shut.wait_called()
    wait_until(lambda: counted(face, Counter.COALESCED) == 2, "two wait")
    face.close()
    with crew("threads", 1, l1) as (other,):  # its flight was given up with it
        assert collect([other.call(Provider(tmp_path / "others"))])[0].content == f"answer of {other.pid}"
    shut.open()
    assert [outcome_of(call).content for call in calls] == [f"answer of {os.getpid()}"] * 3


def test_tasks_whose_cache_is_closed_get_an_error(l1: L1Config, tmp_path: Path, shut: Provider) -> None:
    face = make_face("asyncio", l1)
    calls = [face.start(shut) for _ in range(3)]
    shut.wait_called()
    with crew("asyncio", 1, l1) as (other,):
        waiting = other.call(Provider(tmp_path / "others"), callers=3)
        wait_until(lambda: other.joined == 1 and counted(face, Counter.COALESCED) == 4, "they wait")
        face.close()
        assert [outcome_of(call).error for call in calls] == ["ComputeError"] * 3
        assert [outcome.content for outcome in collect([waiting])] == [f"answer of {other.pid}"] * 3


def test_who_waits_for_another_process_at_close_is_told(kind: str, l1: L1Config, shut: Provider) -> None:
    face = make_face(kind, l1)
    with crew(kind, 1, l1) as (leader,):
        leading = leader.call(shut)
        shut.wait_called()
        waiting = face.start(shut)
        wait_until(lambda: counted(face, Counter.L1_MISSES) == 2, "it misses")
        face.close()
        assert outcome_of(waiting).error in ("SlabClosedError", "ComputeError")
        shut.open()
        assert collect([leading])[0].error is None
