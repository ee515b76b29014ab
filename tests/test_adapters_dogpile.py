"""dogpile.cache's backend in the slab: dogpile's own suites, and what a mutex of the whole host has to hold."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
from dogpile.cache import make_region
from dogpile.cache.api import NO_VALUE
from dogpile.testing.fixtures import (
    _GenericBackendTestSuite,
    _GenericMutexTestSuite,
    _GenericSerializerTestSuite,
)
from processes import stop

from llm_edge_cache import SharedSlab, SlabConfig
from llm_edge_cache.adapters import dogpile as adapter
from llm_edge_cache.adapters.dogpile import FlightMutex, SlabBackend
from llm_edge_cache.flight import FLIGHT_LEASE_NS

CONFIG = {"memory_bytes": 4 << 20}
SUITES = f"test-dogpile-{os.getpid()}-{secrets.token_hex(4)}"
PATIENCE = 20.0  # seconds after which something that takes one at most is given up
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def the_suites_slab() -> Iterator[None]:
    yield
    SharedSlab(SUITES).unlink()


class _InTheSlab:
    backend = "llm_edge_cache.slab"  # found by its entry point
    config_args: ClassVar = {"arguments": {"name": SUITES, "config": CONFIG}}


class TestDogpileBackendSuite(_InTheSlab, _GenericBackendTestSuite):
    pass


class TestDogpileSerializerSuite(_InTheSlab, _GenericSerializerTestSuite, _GenericBackendTestSuite):
    test_threaded_dogpile = None  # once is enough
    test_threaded_get_multi = None
    test_region_expire = None


class TestDogpileMutexSuite(_InTheSlab, _GenericMutexTestSuite):
    pass


def make(name: str, **arguments: Any) -> SlabBackend:
    return SlabBackend({"name": name, "config": CONFIG, **arguments})


def region_of(name: str, **arguments: Any) -> Any:
    return make_region().configure("llm_edge_cache.slab", arguments={"name": name, "config": CONFIG, **arguments})


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ---- values ----


class Thing:
    pass


def test_the_default_serializer_keeps_types_and_unpickles_nothing(name: str) -> None:
    region = region_of(name)
    region.set("k", {"pair": (1, {2})})
    assert region.get("k") == {"pair": (1, {2})}
    make(name, serializer="pickle").set("p", region._value("pickled"))
    assert region.get("p") is NO_VALUE


def test_what_cannot_be_carried_is_an_error_and_the_old_value_is_gone(name: str) -> None:
    region = region_of(name)
    region.set_multi({"k": "old", "l": "old"})
    with pytest.raises(TypeError, match=r'cannot carry \S*Thing: .*serializer="pickle"'):
        region.set("k", Thing())
    assert region.get_multi(["k", "l"]) == [NO_VALUE, "old"]


def test_pickle_is_the_operator_s_choice(name: str) -> None:
    region = region_of(name, serializer="pickle")
    region.set("k", Thing())
    assert type(region.get("k")) is Thing


def test_a_region_s_own_serializer_is_used_instead(name: str) -> None:
    region = make_region(serializer=pickle.dumps, deserializer=pickle.loads)
    region.configure("llm_edge_cache.slab", arguments={"name": name, "config": CONFIG})
    region.set_multi({"k": Thing(), "l": 1})
    values = region.get_multi(["k", "l", "m"])
    assert [type(value) for value in values[:2]] == [Thing, int]
    assert values[2] is NO_VALUE


@pytest.mark.parametrize("stored", [5, "text", [1, 2], [1, {}], None])
def test_what_is_no_value_of_dogpile_is_a_miss(name: str, stored: Any) -> None:
    backend = make(name)
    backend._objects.set("k", stored, None)
    assert backend.get("k") is NO_VALUE
    assert backend.get_multi(["k"]) == [NO_VALUE]


def test_keys_of_any_length_work(name: str) -> None:
    region = region_of(name)
    region.set_multi({"x" * 5000: 1, "x" * 5001: 2})
    assert region.get_multi(["x" * 5000, "x" * 5001]) == [1, 2]


@pytest.mark.parametrize(("seconds", "ttl"), [(None, None), (50, 50)])
def test_values_stay_until_slab_expiration_time(name: str, seconds: float | None, ttl: float | None) -> None:
    region = region_of(name, slab_expiration_time=seconds)
    region.set("k", 1)
    left = SharedSlab(name).ttl(b"k")
    assert left == ttl or (left is not None and ttl is not None and ttl - 1 < left <= ttl)


def test_a_stale_value_is_served_while_another_is_made(name: str) -> None:
    region = region_of(name)
    region.set("k", "old")
    mutex = region.backend.get_mutex("k")
    assert mutex.acquire()
    assert region.get_or_create("k", lambda: "new", expiration_time=0) == "old"
    mutex.release()
    assert region.get_or_create("k", lambda: "new", expiration_time=0) == "new"


def test_the_configuration_may_be_a_slab_config(name: str) -> None:
    make(name, config=SlabConfig(memory_bytes=4 << 20, max_entries=50))
    assert SharedSlab(name).config.max_entries == 50


def test_the_name_is_needed() -> None:
    with pytest.raises(ValueError, match='needs the argument "name"'):
        SlabBackend({})


def test_without_distributed_lock_threads_only_are_kept_apart(name: str) -> None:
    assert make(name, distributed_lock=False).get_mutex("k") is None


# ---- the mutex, in one process ----


def mutex_of(name: str, key: str = "k") -> FlightMutex:
    mutex = make(name).get_mutex(key)
    assert mutex is not None
    return mutex


def test_two_objects_of_one_key_exclude_each_other_and_two_keys_do_not(name: str) -> None:
    first, second, other = mutex_of(name), mutex_of(name), mutex_of(name, "other")
    assert first.acquire()
    assert second.acquire(False) is False
    assert second.locked()
    assert other.acquire(False) is True
    first.release()
    assert not first.locked()
    assert second.acquire(False) is True


def test_it_is_no_entry_so_clear_and_eviction_leave_it(name: str) -> None:
    mutex, slab = mutex_of(name), SharedSlab(name)
    mutex.acquire()
    assert len(slab) == 0
    slab.clear()
    slab.set_many({b"%d" % number: b"x" * 1000 for number in range(10_000)})
    assert slab.stats().evictions > 0
    assert mutex_of(name).acquire(False) is False


def test_releasing_what_is_not_held_is_an_error(name: str) -> None:
    mutex = mutex_of(name)
    with pytest.raises(RuntimeError, match="not held"):
        mutex.release()
    mutex.acquire()
    mutex.release()
    with pytest.raises(RuntimeError, match="not held"):
        mutex.release()


def test_another_thread_may_release_it(name: str) -> None:
    mutex = mutex_of(name)
    mutex.acquire()
    thread = threading.Thread(target=mutex.release)
    thread.start()
    thread.join(PATIENCE)
    assert not mutex.locked()


def test_threads_that_share_one_object_exclude_each_other(name: str) -> None:
    mutex, inside, most = mutex_of(name), [0], [0]

    def work() -> None:
        for _ in range(50):
            mutex.acquire()
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0)
            inside[0] -= 1
            mutex.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert most == [1]
    assert not mutex.locked()


def test_it_is_held_beyond_its_lease(name: str) -> None:
    mutex = mutex_of(name)
    mutex.acquire()
    time.sleep(FLIGHT_LEASE_NS / 1e9 + 0.5)
    assert mutex_of(name).acquire(False) is False
    mutex.release()


def test_the_renewing_thread_ends_when_nothing_is_held_and_begins_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "_RENEWAL_SECONDS", 0.01)
    mutex = mutex_of(name)
    for _ in range(2):
        mutex.acquire()
        assert mutex._mutexes._is_renewing
        mutex.release()
        wait_until(lambda: not mutex._mutexes._is_renewing)


def test_one_that_was_dropped_while_it_was_held_is_free_after_its_lease(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge_cache.flight.FLIGHT_LEASE_NS", 200_000_000)
    monkeypatch.setattr(adapter, "_RENEWAL_SECONDS", 0.05)
    backend = make(name)
    mutex = backend.get_mutex("k")
    assert mutex is not None
    mutex.acquire()
    del mutex
    wait_until(lambda: mutex_of(name).acquire(False))


def test_without_a_slab_it_lets_everybody_go_ahead(name: str) -> None:
    mutex, slab = mutex_of(name), SharedSlab(name)
    slab.unlink()
    assert mutex.acquire()
    assert mutex.acquire(False)
    mutex.release()
    mutex.release()


def test_a_region_goes_on_when_its_slab_is_unlinked(name: str) -> None:
    region = region_of(name)
    SharedSlab(name).unlink()
    assert region.get_or_create("k", lambda: "made") == "made"


def _take_every_record(slab: SharedSlab) -> list[tuple[int, int]]:
    """Lead flights until there is no record left for anybody."""
    led, refused, number = [], 0, 0
    while refused < 500:
        role, record, token = slab._flight_join(b"%064x" % number, 60_000_000_000)
        number += 1
        refused = refused + 1 if role == 3 else 0
        if role != 3:
            led.append((record, token))
    return led


def test_without_a_free_record_trying_fails_and_waiting_ends(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_PATIENCE_SECONDS", 0.1)
    mutex, slab = mutex_of(name), SharedSlab(name)
    led = _take_every_record(slab)
    assert mutex.acquire(False) is False
    assert mutex.acquire() is True
    mutex.release()
    for record, token in led:
        slab._flight_end(record, token)
    assert mutex.acquire(False) is True
    assert mutex_of(name).acquire(False) is False


# ---- the mutex, across processes ----


def _hold(mutex: FlightMutex, held: Any) -> None:
    mutex.acquire()
    held.set()
    time.sleep(PATIENCE)


@pytest.fixture
def holder(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FlightMutex, Any]]:
    """A mutex, and another process that holds it, for longer than any test waits."""
    monkeypatch.setattr("llm_edge_cache.flight.FLIGHT_LEASE_NS", 3600_000_000_000)
    mutex, held = mutex_of(name), FORK.Event()
    process = FORK.Process(target=_hold, args=(mutex_of(name), held))
    process.start()
    assert held.wait(PATIENCE)
    yield mutex, process
    process.kill()
    process.join(PATIENCE)


def test_another_process_s_mutex_excludes_this_one(holder: tuple[FlightMutex, Any]) -> None:
    mutex, _ = holder
    assert mutex.locked()
    assert mutex.acquire(False) is False


def test_a_mutex_is_free_as_soon_as_its_owner_dies(holder: tuple[FlightMutex, Any]) -> None:
    mutex, process = holder
    begin = time.monotonic()
    process.kill()
    assert mutex.acquire() is True
    mutex.release()
    assert time.monotonic() - begin < PATIENCE


def test_an_owner_that_is_stopped_loses_it_and_another_s_is_not_released(name: str) -> None:
    mutex, held, released = mutex_of(name), FORK.Event(), FORK.Event()

    def hold_and_release() -> None:
        theirs = mutex_of(name)
        theirs.acquire()
        held.set()
        time.sleep(0.5)  # it is stopped here
        theirs.release()
        released.set()

    process = FORK.Process(target=hold_and_release)
    process.start()
    assert held.wait(PATIENCE)
    stop(process.pid or 0)
    try:
        assert mutex.acquire() is True
    finally:
        os.kill(process.pid or 0, signal.SIGCONT)
    assert released.wait(PATIENCE)
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert mutex_of(name).acquire(False) is False


def test_a_forked_child_does_not_release_its_parent_s(name: str) -> None:
    mutex = mutex_of(name)
    mutex.acquire()
    child = FORK.Process(target=mutex.release)
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert mutex_of(name).acquire(False) is False
    mutex.release()
    assert not mutex.locked()


@pytest.fixture
def begin() -> Iterator[Callable[..., Any]]:
    """Start a process that is killed at the end of the test."""
    processes = []

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        processes.append(FORK.Process(target=target, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join(PATIENCE)


def _acquire_and_release(mutex: FlightMutex, released: Any) -> None:
    mutex.acquire()
    mutex.release()
    released.set()
    time.sleep(PATIENCE)


def test_a_forked_child_takes_and_frees_the_object_that_its_parent_held(name: str, begin: Callable[..., Any]) -> None:
    mutex, released = mutex_of(name), FORK.Event()
    mutex.acquire()
    begin(_acquire_and_release, mutex, released)
    mutex.release()
    assert released.wait(PATIENCE)
    assert not mutex.locked()


def test_a_forked_child_renews_what_it_holds(name: str, begin: Callable[..., Any]) -> None:
    backend, held = make(name), FORK.Event()
    parents, childs = backend.get_mutex("parent's"), backend.get_mutex("child's")
    assert parents is not None
    assert childs is not None
    parents.acquire()  # so the parent has a thread that renews; the child has not
    begin(_hold, childs, held)
    assert held.wait(PATIENCE)
    time.sleep(FLIGHT_LEASE_NS / 1e9 + 0.5)
    assert childs.acquire(False) is False


def _create(name: str, go: Any, calls: Any) -> None:
    region = region_of(name)

    def creator() -> str:
        calls.put(os.getpid())
        time.sleep(0.1)
        return "made"

    go.wait(PATIENCE)
    assert region.get_or_create("k", creator) == "made"


def test_one_of_several_processes_creates_a_value(name: str) -> None:
    region_of(name)
    go, calls = FORK.Event(), FORK.SimpleQueue()
    workers = [FORK.Process(target=_create, args=(name, go, calls)) for _ in range(4)]
    for worker in workers:
        worker.start()
    go.set()
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert calls.get() in {worker.pid for worker in workers}
    assert calls.empty()
