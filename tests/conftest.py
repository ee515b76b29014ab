"""What the tests share: slabs and names that are cleaned up, other processes, a real Redis and a bad wire to it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from browser import find_chromium
from fault_proxy import FaultProxy
from gateway_servers import Gateway, recordings, run_gateway
from redis_servers import RedisServer
from stand_in_upstream import AT_ONCE, StandInUpstream

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1 << 20
SMALL = SlabConfig(memory_bytes=4 * MiB)
LONG = (
    "test_kernel_c.py",
    "test_interleavings.py",
    "test_bench_smoke.py",
    "test_stress_short.py",
    "test_style.py",
)
"""Files that take longest, the longest first."""

# A shell starts what runs in its background with SIGINT ignored, and so would be every process of these tests; several
# are interrupted to see what they leave behind. A signal that is handled here is at its default in what is started from
# here.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: a file of few long tests that came last would be waited for alone."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def name() -> Iterator[str]:
    """A slab's name that nobody else uses; what is live under it at the end is unlinked."""
    chosen = f"test-{os.getpid()}-{secrets.token_hex(4)}"
    yield chosen
    if SharedSlab.exists(chosen):
        SharedSlab.attach(chosen).unlink()


@pytest.fixture
def slab(name: str) -> Iterator[SharedSlab]:
    """A small slab of its own; its invariants hold at the end."""
    with SharedSlab(name, SMALL) as made:
        yield made
        if not made.closed:
            assert made.check() == []


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Run a program in a fresh interpreter and return what it prints; it must exit with 0."""

    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resource_tracker" not in done.stderr, done.stderr
        return done.stdout.strip()

    return run


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One real Redis for all: a test uses keys of its own (a prefix) and does nothing that the others would notice."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def fault_proxy(redis_server: RedisServer) -> Iterator[FaultProxy]:
    """A proxy before `redis_server` that passes everything on, until it is told otherwise."""
    with FaultProxy(redis_server.address) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def chromium() -> str:
    """A Chromium that `Browser` can drive."""
    found = find_chromium()
    if found is None:
        pytest.skip("no Chromium on the PATH, and no apt-get, root and network to install one: Debian's `chromium`")
    return found


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway with four workers for all: a test asks questions of its own."""
    with (
        StandInUpstream(AT_ONCE, recordings()) as upstream,
        run_gateway(tmp_path_factory.mktemp("gateway"), upstream, workers=4) as running,
    ):
        yield running


@pytest.fixture
def gateway(served: Gateway) -> Iterator[Gateway]:
    """The gateway that all share, before a provider that answers equal questions alike, and at once."""
    yield served
    served.upstream.provider.settings = AT_ONCE
    served.upstream.is_hurried = False


@pytest.fixture(scope="session")
def served_hastily(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway of two workers that does not wait for long for anybody."""
    directory = tmp_path_factory.mktemp("hasty")
    with (
        StandInUpstream(AT_ONCE) as upstream,
        run_gateway(
            directory, upstream, workers=2, background_limit=0.5, client_timeout=0.5, idle_timeout=2.0
        ) as running,
    ):
        yield running


@pytest.fixture
def hasty(served_hastily: Gateway) -> Iterator[Gateway]:
    """The hasty one, before a provider that answers at once."""
    yield served_hastily
    served_hastily.upstream.provider.settings = AT_ONCE
