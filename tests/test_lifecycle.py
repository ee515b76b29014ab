"""Created, attached to, replaced, unlinked, closed: at no time do two processes serve two slabs under one name."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from processes import ends_well, fork

from llm_edge_cache import (
    SharedSlab,
    SlabClosedError,
    SlabConfig,
    SlabConfigError,
    SlabNotFoundError,
    SlabPermissionError,
    list_slabs,
    naming,
)

MiB = 1 << 20
SMALL = SlabConfig(memory_bytes=4 * MiB)
LARGER = SlabConfig(memory_bytes=5 * MiB, ttl=60)


def _serve(pipe: Connection, name: str) -> None:
    slab = SharedSlab.attach(name)
    while True:
        method, *arguments = pipe.recv()
        try:
            pipe.send(getattr(slab, method)(*arguments))
        except Exception as error:  # for the other side to judge
            pipe.send(error)


class Remote:
    """A slab object in another process."""

    def __init__(self, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, name), daemon=True)
        self.process.start()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._pipe.send((method, *arguments))
            assert self._pipe.poll(30), "the other process does not answer"
            return self._pipe.recv()

        return call

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def remote(name: str) -> Iterator[Remote]:
    other = Remote(name)
    assert other.get(b"ready?") is None
    try:
        yield other
    finally:
        other.kill()


def test_opening_twice_attaches_to_the_same(name: str) -> None:
    with SharedSlab(name, SMALL) as first, SharedSlab(name, SMALL) as second:
        first.set(b"key", b"value")
        assert second.get(b"key") == b"value"
        assert second.stats().attached_processes == 1


def test_config_none_creates_with_the_defaults_when_nothing_is_live(name: str) -> None:
    with SharedSlab(name) as slab:
        assert slab.config == SlabConfig()


def test_config_none_takes_what_is_live(name: str) -> None:
    with SharedSlab(name, SMALL), SharedSlab(name) as second, SharedSlab.attach(name) as third:
        assert second.config == third.config == SMALL


def test_attach_to_nothing_names_what_there_is(slab: SharedSlab) -> None:
    with pytest.raises(SlabNotFoundError, match=f"no live slab 'nowhere'; .*{slab.name}"):
        SharedSlab.attach("nowhere")
    assert not SharedSlab.exists("nowhere")
    assert not [entry for entry in os.listdir("/dev/shm") if "nowhere" in entry]


def test_exists_and_list_slabs_know_what_is_live(name: str) -> None:
    odd = name + "/ä b%\n"
    with SharedSlab(name, SMALL), SharedSlab(odd, SMALL) as second:
        assert SharedSlab.exists(name)
        assert {name, odd} <= set(list_slabs())
        second.unlink()
        assert odd not in list_slabs()
        assert not SharedSlab.exists(odd)


def test_a_slab_outlives_its_processes(name: str, run_python: Callable[..., str]) -> None:
    program = """
import sys
from llm_edge_cache import SharedSlab
SharedSlab(sys.argv[1]).set(b"key", b"warm")
"""
    run_python(program, name)
    with SharedSlab.attach(name) as slab:
        assert slab.get(b"key") == b"warm"


def test_another_config_on_a_live_slab_names_each_field_both_values_and_the_remedy(name: str) -> None:
    with SharedSlab(name, SMALL) as slab, remote(name) as other:
        slab.close()
        with pytest.raises(SlabConfigError) as caught:
            SharedSlab(name, LARGER)
        message = str(caught.value)
        for part in (
            "memory_bytes is 4194304, asked for 5242880",
            "ttl is 300.0, asked for 60.0",
            "replace=True",
            name,
        ):
            assert part in message
        assert "tti" not in message
        assert other.set(b"key", b"still here") is True


def test_another_config_while_this_process_uses_the_slab_is_refused_too(slab: SharedSlab) -> None:
    with pytest.raises(SlabConfigError):
        SharedSlab(slab.name, LARGER)
    assert slab.set(b"key", b"value")


def test_another_config_replaces_a_slab_that_nobody_is_attached_to(name: str, run_python: Callable[..., str]) -> None:
    run_python("import sys; from llm_edge_cache import *; SharedSlab(sys.argv[1]).set(b'key', b'old')", name)
    with SharedSlab(name, SMALL) as slab:
        assert slab.config == SMALL
        assert slab.get(b"key") is None


def test_a_killed_process_is_not_attached(name: str) -> None:
    with SharedSlab(name, SMALL), remote(name) as other:
        pass
    assert not other.process.is_alive()
    with SharedSlab(name, LARGER) as slab:
        assert slab.config == LARGER


def test_replace_retires_and_every_process_moves_over_at_its_next_operation(name: str) -> None:
    with SharedSlab(name, SMALL) as old, remote(name) as other:
        old.set(b"key", b"old")
        assert other.get(b"key") == b"old"
        with SharedSlab(name, LARGER, replace=True) as new:
            assert other.get(b"key") is None
            assert other.set(b"from other", b"1") is True
            assert new.get(b"from other") == b"1"
            assert old.get(b"from other") == b"1"
            assert old.config == LARGER
            assert new.stats().attached_processes == 2


@pytest.mark.parametrize(
    "first", ["get", "set", "get_many", "gets", "delete", "__contains__", "__len__", "stats", "clear", "ttl"]
)
def test_whatever_the_next_operation_is(name: str, first: str) -> None:
    with SharedSlab(name, SMALL) as old, SharedSlab(name, LARGER, replace=True) as new:
        new.set(b"key", b"new")
        arguments: dict[str, tuple[Any, ...]] = {
            "set": (b"other", b"value"),
            "get_many": ([b"key"],),
            "__len__": (),
            "stats": (),
            "clear": (),
        }
        getattr(old, first)(*arguments.get(first, (b"key",)))
        assert old._mapping is new._mapping


def test_replace_with_the_same_config_starts_empty(name: str) -> None:
    with SharedSlab(name, SMALL) as old:
        old.set(b"key", b"old")
        with SharedSlab(name, SMALL, replace=True) as new:
            assert new.get(b"key") is None


def test_a_version_of_the_old_slab_means_nothing_in_the_new(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        slab.set(b"key", b"old")
        found = slab.gets(b"key")
        assert found is not None
        SharedSlab(name, SMALL, replace=True).set(b"key", b"new")
        assert slab.cas(b"key", b"stale", found[1]) is False


def test_a_token_of_the_old_slab_means_nothing_in_the_new(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        _, token = slab.get_or_token(b"key")
        SharedSlab(name, SMALL, replace=True).close()
        assert slab.fill(b"key", b"stale", token) is False


def test_after_unlink_everybody_misses_and_refuses(name: str) -> None:
    with SharedSlab(name, SMALL) as slab, remote(name) as other:
        slab.set(b"key", b"value")
        slab.get(b"key")
        slab.unlink()
        for one in (slab, other):
            assert one.get(b"key") is None
            assert one.set(b"key", b"value") is False
            assert one.get_many([b"key"]) == {}
            assert one.set_many({b"key": b"value"}) == [b"key"]
            assert one.add(b"key", b"value") is False
            assert one.delete(b"key") is False
            assert one.touch(b"key") is False
            assert one.pop(b"key") is None
            assert one.ttl(b"key") is None
            assert one.gets(b"key") is None
            assert one.get_or_token(b"key")[0] is None
            assert one.__len__() == 0
            assert one.check() == []
            assert one.clear() is None
        with pytest.raises(KeyError):
            slab.incr(b"key")
        assert list(slab.scan()) == []
        stats = slab.stats()
        assert (stats.entries, stats.payload_bytes, stats.hits) == (0, 0, 1)
        with pytest.raises(SlabNotFoundError):
            SharedSlab.attach(name)


def test_what_comes_after_unlink_is_found_by_all(name: str) -> None:
    with SharedSlab(name, SMALL) as slab, remote(name) as other:
        slab.unlink()
        assert other.get(b"key") is None
        with SharedSlab(name, LARGER) as new:
            new.set(b"key", b"new")
            assert other.get(b"key") == b"new"
            assert slab.get(b"key") == b"new"


def test_unlink_leaves_no_file_behind(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        place = slab._place
        assert os.path.exists(place.segment)
        assert os.path.exists(place.lock)
        slab.unlink()
        slab.unlink()
    assert not os.path.exists(place.segment)
    assert not os.path.exists(place.lock)


def test_unlink_works_once_closed(name: str) -> None:
    slab = SharedSlab(name, SMALL)
    slab.close()
    slab.unlink()
    assert not SharedSlab.exists(name)


def test_close_leaves_the_slab_and_gives_the_record_back(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        with remote(name) as other:
            assert slab.stats().attached_processes == 2
            other.close()
            assert slab.stats().attached_processes == 1
        assert SharedSlab.exists(name)


def test_a_forgotten_slab_object_gives_its_mapping_back(name: str) -> None:
    with SharedSlab(name, SMALL):
        pass
    slab = SharedSlab(name, SMALL)
    held = weakref.ref(slab._segment)
    del slab
    gc.collect()
    assert held() is None
    assert name not in Path("/proc/self/maps").read_text()


def test_closing_one_object_leaves_the_others_of_the_process(name: str) -> None:
    with SharedSlab(name, SMALL) as first, SharedSlab(name, SMALL) as second:
        second.set(b"key", b"value")
        first.close()
        assert second.get(b"key") == b"value"


def test_the_process_that_created_it_may_be_killed_at_any_time(name: str, run_python: Callable[..., str]) -> None:
    """Whatever a SIGKILL leaves of a creation, the next one gets a whole slab."""
    program = """
import os, signal, sys, threading, time
from llm_edge_cache import SharedSlab, SlabConfig
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
while True:
    SharedSlab(sys.argv[1], SlabConfig(memory_bytes=8 << 20), replace=True).close()
"""
    for delay in (0.01, 0.013, 0.017, 0.02, 0.03):
        done = subprocess.run([sys.executable, "-c", program, name, str(delay)], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL
        with SharedSlab(name, SMALL) as slab:
            assert slab.set(b"key", b"value")
            assert slab.check() == []


def test_closing_while_threads_use_it_ends_them_with_closed_and_nothing_else(name: str) -> None:
    value = bytes(1 * MiB)
    for _ in range(10):
        slab = SharedSlab(name, SlabConfig(memory_bytes=32 * MiB))
        ends: list[BaseException] = []

        def work(slab: SharedSlab = slab, ends: list[BaseException] = ends) -> None:
            try:
                while True:
                    slab.set(b"key", value)
                    assert slab.get(b"key") in (value, None)
                    list(slab.scan())
            except BaseException as error:  # for the main thread to judge
                ends.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        slab.close()
        for thread in threads:
            thread.join(20)
        assert [type(end) for end in ends] == [SlabClosedError] * 4, ends
    SharedSlab.attach(name).unlink()


def test_replacing_while_threads_use_it_costs_them_misses_and_nothing_else(name: str) -> None:
    slab = SharedSlab(name, SMALL)
    stop = threading.Event()
    ends: list[BaseException] = []

    def work(number: int) -> None:
        try:
            while not stop.is_set():
                slab.set(b"key %d" % number, b"%d" % number)
                assert slab.get(b"key %d" % number) in (b"%d" % number, None)
        except BaseException as error:  # for the main thread to judge
            ends.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        SharedSlab(name, SMALL, replace=True).close()
    stop.set()
    for thread in threads:
        thread.join(20)
    assert ends == []
    assert slab.set(b"key", b"value")
    assert slab.check() == []
    slab.close()


def test_two_processes_that_replace_each_other_s_slab_end_up_on_one(name: str) -> None:
    with SharedSlab(name, SMALL) as slab, remote(name) as other:
        for number in range(10):
            SharedSlab(name, SlabConfig(memory_bytes=(4 + number % 2) * MiB), replace=True).close()
            assert slab.set(b"from us", b"%d" % number)
            assert other.get(b"from us") == b"%d" % number
        leftovers = [entry for entry in os.listdir("/dev/shm") if name in entry]
        assert len(leftovers) == 2, leftovers  # one segment, one lock file


# ---- a master that starts as root ----

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand files over")
NOBODY = 65534


def _as_nobody(work: Callable[[], Any]) -> None:
    def as_nobody() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        work()

    assert ends_well(fork(as_nobody))


@pytest.fixture
def owned_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_owner", None)
    naming.set_owner(NOBODY, NOBODY)


@needs_root
def test_a_slab_opened_for_another_user_is_that_user_s(owned_by_nobody: None, name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        for path in (slab._place.segment, slab._place.lock):
            status = os.stat(path)
            assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (NOBODY, NOBODY, 0o600)

        def child() -> None:
            assert slab.set(b"inherited", b"1")
            with SharedSlab.attach(name) as again, SharedSlab(name, SMALL) as third:
                assert again.get(b"inherited") == third.get(b"inherited") == b"1"
            with SharedSlab(name, SMALL, replace=True) as new:
                assert new.set(b"by the worker", b"2")
            assert slab.get(b"by the worker") == b"2"

        _as_nobody(child)
        assert slab.get(b"by the worker") == b"2"
        slab.unlink()


@needs_root
def test_chown_hands_a_live_slab_over(name: str) -> None:
    with SharedSlab(name, SMALL) as slab, SharedSlab(name, SMALL) as second:
        slab.set(b"key", b"value")
        before = slab._place
        slab.chown(NOBODY, NOBODY)
        assert slab.get(b"key") == second.get(b"key") == b"value"
        assert not os.path.exists(before.segment)
        assert not os.path.exists(before.lock)
        _as_nobody(lambda: SharedSlab.attach(name).set(b"theirs", SharedSlab.attach(name).get(b"key") or b"nothing"))
        assert second.get(b"theirs") == b"value"
        assert not SharedSlab.exists(name)  # under root's own name
        slab.unlink()
        assert second.get(b"key") is None


@needs_root
def test_chown_takes_the_warm_slab_that_the_user_has(name: str) -> None:
    _as_nobody(lambda: SharedSlab(name, SMALL).set(b"key", b"warm"))
    with SharedSlab(name, SMALL) as slab:
        slab.set(b"key", b"cold")
        slab.chown(NOBODY, NOBODY)
        assert slab.get(b"key") == b"warm"
        slab.unlink()


@needs_root
def test_nobody_cannot_open_slabs_for_root(name: str) -> None:
    def child() -> None:
        with pytest.raises(SlabPermissionError, match="only root"):
            naming.set_owner(0, 0)
        with SharedSlab(name, SMALL) as slab:
            with pytest.raises(SlabPermissionError):
                slab.chown(0, 0)
            assert slab.set(b"key", b"value")
            slab.unlink()

    _as_nobody(child)
