"""uvicorn with several workers, which it spawns: they meet by the slab's name alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_servers import Bench, bench, wait_until

from llm_edge_cache import SharedSlab

OPEN = [pytest.param({}, id="at-first-use"), pytest.param({"SLAB_APP_OPEN": "import"}, id="on-import")]


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as tools:
        yield tools


@pytest.mark.parametrize("environ", OPEN)
def test_every_worker_reads_what_one_has_set(tools: Bench, environ: dict[str, str]) -> None:
    server = tools.uvicorn(environ)
    workers = server.pids(2)
    server.ask("/set?key=k&value=shared")
    assert server.value_seen_by("k", 2) == dict.fromkeys(workers, "shared")
    assert server.ask("/stats")["check"] == []
    tools.wait_attached(2)


def test_a_killed_worker_is_replaced_and_the_cache_stays_warm(tools: Bench) -> None:
    server = tools.uvicorn()
    victim = min(server.pids(2))
    server.ask("/set?key=k&value=warm")
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: f"Child process [{victim}] died" in server.log, "the supervisor's notice")
    seen = server.value_seen_by("k", 2)
    assert victim not in seen
    assert set(seen.values()) == {"warm"}
    tools.wait_attached(2)


def test_a_stopped_server_leaves_a_warm_slab_and_no_process_attached(tools: Bench) -> None:
    server = tools.uvicorn()
    server.pids(2)
    server.ask("/set?key=k&value=warm")
    assert server.stop() == 0
    assert tools.attached() == 0
    with SharedSlab.attach(tools.name) as slab:
        assert slab.get(b"k") == b"warm"
