"""The same guarantees across processes: forked, spawned, from a fork server, and unrelated ones that know the name."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from processes import ends_well, fork, stop, write_for_ever

from llm_edge_cache import SharedSlab, SlabBusyError, SlabConfig, SlabNotFoundError

MiB = 1 << 20
PROCESSES = 4
ROUNDS = 500
METHODS = ["fork", "spawn", "forkserver"]


def _in_processes(work: Callable[..., Any], *arguments: Any, method: str = "fork") -> list[Any]:
    context = multiprocessing.get_context(method)
    with context.Pool(PROCESSES) as pool:
        started = [pool.apply_async(work, (*arguments, number)) for number in range(PROCESSES)]
        return [result.get(timeout=60) for result in started]


def _increment(slab: SharedSlab, _: int) -> None:
    for _round in range(ROUNDS):
        slab.incr(b"counter")


def _add_all(slab: SharedSlab, number: int) -> int:
    return sum(slab.add(b"key %d" % key, b"%d" % number) for key in range(ROUNDS))


def _append_by_cas(slab: SharedSlab, number: int) -> int:
    retries = 0
    for _round in range(100):
        while True:
            found = slab.gets(b"list")
            assert found is not None
            if slab.cas(b"list", found[0] + b"%d" % number, found[1]):
                break
            retries += 1
    return retries


def _pop_all(slab: SharedSlab, _: int) -> list[bytes]:
    popped = (slab.pop(b"key %d" % key) for key in range(ROUNDS))
    return [value for value in popped if value is not None]


def _set_and_read(slab: SharedSlab, number: int) -> tuple[bytes | None, int]:
    slab.set(b"from %d" % number, b"%d" % os.getpid())
    return slab.get(b"from parent"), os.getpid()


@pytest.mark.parametrize("method", METHODS)
def test_incr_is_atomic_across_processes(slab: SharedSlab, method: str) -> None:
    slab.set(b"counter", b"0")
    _in_processes(_increment, slab, method=method)
    assert slab.get(b"counter") == b"%d" % (PROCESSES * ROUNDS)


def test_add_succeeds_in_one_process_only(slab: SharedSlab) -> None:
    assert sum(_in_processes(_add_all, slab)) == ROUNDS


def test_cas_loses_no_update(slab: SharedSlab) -> None:
    slab.set(b"list", b"")
    _in_processes(_append_by_cas, slab)
    final = slab.get(b"list")
    assert final is not None
    assert sorted(final) == sorted(b"".join(b"%d" % number * 100 for number in range(PROCESSES)))


def test_pop_gives_each_value_to_one_caller(slab: SharedSlab) -> None:
    for key in range(ROUNDS):
        slab.set(b"key %d" % key, b"%d" % key)
    popped = [value for values in _in_processes(_pop_all, slab) for value in values]
    assert sorted(popped) == sorted(b"%d" % key for key in range(ROUNDS))


@pytest.mark.parametrize("method", METHODS)
def test_a_slab_object_works_in_a_process_started_by(slab: SharedSlab, method: str) -> None:
    slab.set(b"from parent", b"warm")
    results = _in_processes(_set_and_read, slab, method=method)
    assert {value for value, _ in results} == {b"warm"}
    for number, (_, pid) in enumerate(results):
        assert slab.get(b"from %d" % number) == b"%d" % pid


def test_an_unrelated_process_that_knows_the_name_shares_it(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    slab.set(b"ours", b"1")
    program = """
import sys
from llm_edge_cache import SharedSlab
with SharedSlab(sys.argv[1]) as slab:
    print(slab.get(b"ours").decode(), slab.stats().attached_processes)
    slab.set(b"theirs", b"2")
"""
    assert run_python(program, slab.name) == "1 2"
    assert slab.get(b"theirs") == b"2"
    assert slab.stats().attached_processes == 1


def test_counts_of_the_dead_stay_in_the_sums(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    program = """
import os, sys
from llm_edge_cache import SharedSlab
slab = SharedSlab.attach(sys.argv[1])
for _ in range(10):
    slab.get(b"absent")
os._exit(0) if sys.argv[2] == "kill" else slab.close()
"""
    for manner in ("kill", "close", "kill"):
        run_python(program, slab.name, manner)
    assert slab.stats().misses == 30
    assert slab.stats().attached_processes == 1


def _in_fork(work: Callable[[], Any]) -> None:
    assert ends_well(fork(work))


def test_a_forked_child_is_a_process_of_its_own(slab: SharedSlab) -> None:
    slab.get(b"before the fork")

    def child() -> None:
        slab.get(b"absent")
        assert slab.stats().attached_processes == 2
        assert slab.stats().misses == 2

    _in_fork(child)
    assert slab.stats().attached_processes == 1
    slab.get(b"absent")
    assert slab.stats().misses == 3


def test_a_child_without_a_file_descriptor_to_learn_its_identity_with_reserves_nothing(slab: SharedSlab) -> None:
    """Others would take a reservation of nobody's for a dead process's, and give its units away while it is filled."""
    value = b"v" * 400_000

    def store(deadline: float) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
        while time.monotonic() < deadline:
            slab.set(b"large %d" % os.getpid(), value)
            assert slab.get(b"large %d" % os.getpid()) in (value, None)

    deadline = time.monotonic() + 1.5
    children = [multiprocessing.get_context("fork").Process(target=store, args=(deadline,)) for _ in range(2)]
    for child in children:
        child.start()
    while time.monotonic() < deadline:
        slab.reap()
        assert slab.check() == []
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_process_that_calls_exec_is_one_attached_process(slab: SharedSlab, run_python: Callable[..., str]) -> None:
    program = """
import os, sys
from llm_edge_cache import SharedSlab
slab = SharedSlab.attach(sys.argv[1])
slab.get(b"key")
if len(sys.argv) == 2:
    os.execv(sys.executable, [*sys.orig_argv, "again"])
print(slab.stats().attached_processes)
"""
    assert run_python(program, slab.name) == "2"


def test_a_child_that_never_used_the_slab_leaves_its_parent_s_record_alone(slab: SharedSlab) -> None:
    _in_fork(slab.close)
    assert slab.stats().attached_processes == 1
    assert slab.set(b"key", b"value")


def test_a_child_s_child_may_use_it_too(slab: SharedSlab) -> None:
    def child() -> None:
        slab.set(b"child", b"1")
        _in_fork(lambda: slab.set(b"grandchild", b"2"))

    _in_fork(child)
    assert slab.get_many([b"child", b"grandchild"]) == {b"child": b"1", b"grandchild": b"2"}


def _set_and_attach(slab: SharedSlab, number: int) -> None:
    slab.set(b"%d" % number, b"value")
    SharedSlab.attach(slab.name).close()


def test_a_fork_while_threads_work_on_the_slab_leaves_the_child_able(slab: SharedSlab) -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            slab.set(b"busy", bytes(50_000))
            SharedSlab.attach(slab.name).close()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            _in_fork(functools.partial(_set_and_attach, slab, number))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert len(slab.get_many(b"%d" % number for number in range(20))) == 20


def test_it_pickles_by_name(slab: SharedSlab) -> None:
    slab.set(b"key", b"value")
    with pickle.loads(pickle.dumps(slab)) as copy:
        assert copy.get(b"key") == b"value"
        assert (copy.name, copy.config) == (slab.name, slab.config)


def test_a_pickle_of_what_is_gone_does_not_bring_it_back(slab: SharedSlab) -> None:
    pickled = pickle.dumps(slab)
    slab.unlink()
    with pytest.raises(SlabNotFoundError):
        pickle.loads(pickled)


def test_many_processes_that_start_at_once_make_one_slab(name: str) -> None:
    program = """
import sys
from llm_edge_cache import SharedSlab, SlabConfig
with SharedSlab(sys.argv[1], SlabConfig(memory_bytes=4 << 20)) as slab:
    slab.add(b"counter", b"0")
    slab.incr(b"counter")
"""
    started = [subprocess.Popen([sys.executable, "-c", program, name]) for _ in range(8)]
    assert [process.wait(timeout=60) for process in started] == [0] * 8
    with SharedSlab.attach(name) as slab:
        assert slab.get(b"counter") == b"8"


@contextlib.contextmanager
def _writer(slab: SharedSlab) -> Iterator[int]:
    """A process that does nothing but write; yields its pid."""
    pid = fork(lambda: write_for_ever(slab))
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    stop(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _rounds() -> Iterator[int]:
    """Count for as long as a slow machine may take until the writer was stopped with the lock."""
    end = time.monotonic() + 60
    number = 0
    while time.monotonic() < end:
        yield number
        number += 1


def _busy_error(slab: SharedSlab, value: bytes) -> str:
    try:
        slab.set(b"ours", value)
    except SlabBusyError as error:
        return str(error)
    return ""


def test_a_writer_stopped_with_the_lock_costs_others_a_busy_error_in_time_and_no_reads(slab: SharedSlab) -> None:
    slab._set_lock_timeout(0.1)
    slab.set(b"ours", b"0")
    last, busy = b"0", 0
    with _writer(slab) as pid:
        for number in _rounds():
            time.sleep(0.002)
            with _stopped(pid):
                assert slab.get(b"ours") == last  # reads are prompt and right, wherever the writer stands
                begin = time.monotonic()
                error = _busy_error(slab, b"%d" % number)
                if error:
                    busy += 1
                    assert "no lock within 100 ms" in error
                    assert 0.09 < time.monotonic() - begin < 5
                else:
                    last = b"%d" % number
                assert slab.get(b"ours") == last
            if busy == 5:
                break
    assert busy == 5, "the writer was never stopped while it had the lock"
    assert slab.stats().busy == 5
    assert slab.set(b"after", b"value")


def test_other_threads_run_while_one_waits_for_a_lock(slab: SharedSlab) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    slab._set_lock_timeout(0.3)
    thread = threading.Thread(target=tick)
    with _writer(slab) as pid:
        thread.start()
        for _ in _rounds():
            time.sleep(0.002)
            with _stopped(pid):
                begin = time.monotonic()
                waited = _busy_error(slab, b"value") and [at for at in ticks if begin < at < time.monotonic()]
                if len(waited) > 3:
                    break
    done.set()
    thread.join()
    assert len(waited) > 3


def test_a_writer_that_dies_during_a_check_is_no_finding(name: str) -> None:
    """Its reservation was a live one's when the check began, and its units are reached from nothing else."""

    def store_for_ever() -> None:
        while True:
            slab.set(b"large", b"v" * (6 * MiB))

    context = multiprocessing.get_context("fork")
    with SharedSlab(name, SlabConfig(memory_bytes=64 * MiB, max_entries=30_000, max_value_bytes=8 * MiB)) as slab:
        for number in range(20_000):  # a check takes milliseconds
            slab.set(b"%d" % number, b"small")
        for round_ in range(40):
            writer = context.Process(target=store_for_ever)
            writer.start()
            killer = threading.Timer(0.01 + round_ % 10 / 1000, writer.kill)
            killer.start()
            for _check in range(3):
                assert slab.check() == []
            killer.join()
            writer.join()


def test_a_killed_writer_s_lock_is_taken_over_at_once(slab: SharedSlab) -> None:
    slab._set_lock_timeout(60)
    for _ in range(30):
        with _writer(slab):
            time.sleep(0.005)
        begin = time.monotonic()
        assert slab.set(b"ours", b"value")
        assert time.monotonic() - begin < 30
    assert slab.stats().busy == 0
