"""The hooks without a server: what gunicorn takes from the module, and that a failing slab never ends a master."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.config import Config
from processes import fork
from worker_servers import wait_until

from llm_edge_cache import SharedSlab, SlabConfig
from llm_edge_cache.workers import gunicorn as hooks


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"test-hooks-{os.getpid()}-{secrets.token_hex(4)}"
    monkeypatch.setenv("LLM_EDGE_CACHE_NAME", name)
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_MEMORY", "8MiB")
    yield name
    hooks.on_exit(_server())
    if SharedSlab.exists(name):
        SharedSlab.attach(name).unlink()


def _server(**env: str) -> Any:
    configuration = SimpleNamespace(env=env, uid=os.geteuid(), gid=os.getegid())
    return SimpleNamespace(cfg=configuration, log=logging.getLogger("test.gunicorn"))


WORKER = SimpleNamespace(pid=1)
LARGE_BYTES = 1 << 20


def test_gunicorn_takes_the_hooks_and_nothing_else_from_the_module() -> None:
    taken = {name for name in vars(hooks) if name in Config().settings}
    assert taken == set(hooks.__all__)


def test_gunicorn_accepts_every_hook() -> None:
    configuration = Config()
    for hook in hooks.__all__:
        configuration.set(hook, getattr(hooks, hook))


def test_the_first_number_of_workers_creates_the_slab(name: str) -> None:
    hooks.nworkers_changed(_server(), 2, None)
    assert SharedSlab.exists(name)


def test_a_later_number_of_workers_does_not(name: str) -> None:
    hooks.nworkers_changed(_server(), 3, 2)
    assert not SharedSlab.exists(name)


def test_on_starting_creates_the_slab_by_itself(name: str) -> None:
    hooks.on_starting(_server())
    assert SharedSlab.exists(name)


def test_raw_env_counts(name: str) -> None:
    server = _server(LLM_EDGE_CACHE_L1_MEMORY="16MiB")
    hooks.on_starting(server)
    with SharedSlab.attach(name) as slab:
        assert slab.config.memory_bytes == 16 << 20


def test_a_failure_to_start_is_what_gunicorn_reports_as_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_TTL", "0")
    with pytest.raises(RuntimeError, match="LLM_EDGE_CACHE_L1_TTL='0' is not allowed"):
        hooks.on_starting(_server())


def _kill_writer(name: str) -> bool:
    """Kill a process that fills large values; return whether it left a reservation beside its entry."""
    with SharedSlab.attach(name) as slab:

        def write_large() -> None:
            while True:
                slab.set(b"k", bytes(LARGE_BYTES))

        pid = fork(write_large)
        try:
            wait_until(lambda: slab.stats().used_bytes > LARGE_BYTES * 1.5, "a reservation beside the entry")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        # If it died holding the lock, this recovers; a first reservation of the dead is reaped by it, a second within a
        # short time is not.
        slab.delete(b"none")
        return slab.stats().used_bytes > LARGE_BYTES * 1.5


def _used_bytes(name: str) -> int:
    with SharedSlab.attach(name) as slab:
        return slab.stats().used_bytes


def test_child_exit_frees_what_a_killed_worker_was_writing(name: str) -> None:
    hooks.on_starting(_server())
    wait_until(lambda: _kill_writer(name), "a writer killed between reserving and publishing")
    hooks.child_exit(_server(), WORKER)
    assert _used_bytes(name) < LARGE_BYTES * 1.5


def test_a_new_master_frees_what_the_workers_of_an_earlier_one_were_writing(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=8 << 20)):
        wait_until(lambda: _kill_writer(name), "a writer killed between reserving and publishing")
        hooks.on_starting(_server())
        assert _used_bytes(name) < LARGE_BYTES * 1.5


def test_on_exit_leaves_the_slab(name: str) -> None:
    hooks.on_starting(_server())
    hooks.on_exit(_server())
    assert SharedSlab.exists(name)


def test_hooks_after_on_exit_do_nothing(name: str) -> None:
    hooks.on_starting(_server())
    hooks.on_exit(_server())
    hooks.child_exit(_server(), WORKER)
    hooks.post_fork(_server(), WORKER)
    hooks.on_exit(_server())


def test_a_slab_unlinked_by_hand_does_not_end_the_master(name: str) -> None:
    hooks.on_starting(_server())
    SharedSlab.attach(name).unlink()
    hooks.child_exit(_server(), WORKER)


def test_a_reload_that_fails_is_logged_and_keeps_the_slab(name: str, caplog: pytest.LogCaptureFixture) -> None:
    hooks.on_starting(_server())
    hooks.on_reload(_server(LLM_EDGE_CACHE_L1_TTL="never"))
    assert "the slab stays as it was: LLM_EDGE_CACHE_L1_TTL='never'" in caplog.text
    with SharedSlab.attach(name) as slab:
        assert slab.stats().attached_processes == 1


def test_a_reload_may_name_another_slab(name: str) -> None:
    hooks.on_starting(_server())
    other = name + "-other"
    hooks.on_reload(_server(LLM_EDGE_CACHE_NAME=other))
    try:
        assert SharedSlab.exists(other)
        assert SharedSlab.exists(name)
    finally:
        hooks.on_exit(_server())
        SharedSlab.attach(other).unlink()
