"""The gateway under a server of one's own: configured by variables alone, under gunicorn and under uvicorn."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from gateway_servers import CHAT, UVICORN, Connection, Reply, ask, question, request_bytes
from stand_in_upstream import AT_ONCE, StandInUpstream
from worker_servers import Bench, Server, bench, wait_until

from llm_edge_cache import MiB, SharedSlab, SlabConfig
from llm_edge_cache.gateway import app
from llm_edge_cache.gateway.stand_in import StandInSettings, recording_key
from llm_edge_cache.gateway.stand_in_faults import Plan

FACTORY = "llm_edge_cache.gateway.app:from_environment"
GUNICORN = [
    *("-m", "gunicorn", "--bind", "127.0.0.1:0", "-k", "llm_edge_cache.workers.gateway.GatewayWorker"),
    *("--graceful-timeout", "60", f"{FACTORY}()"),
]
HOOKS = ["-c", "python:llm_edge_cache.workers.gunicorn"]
PACED = StandInSettings(words=60, first_delay=0.2, word_delay=0.02, jitter=0.0)


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as tools:
        yield tools


@pytest.fixture
def upstream() -> Iterator[StandInUpstream]:
    with StandInUpstream(AT_ONCE) as running:
        yield running


def start(tools: Bench, upstream: StandInUpstream, arguments: list[str], workers: int = 2, **environ: str) -> Server:
    variables = {"LLM_EDGE_CACHE_UPSTREAM": upstream.url, "LLM_EDGE_CACHE_L1_MEMORY": "16MiB", **environ}
    server = tools.start([*arguments, "--workers", str(workers)], variables)
    server.ask("/healthz")
    return server


def memory_of(tools: Bench) -> int:
    with SharedSlab.attach(tools.name) as slab:
        return slab.config.memory_bytes


SERVERS = [
    pytest.param([*GUNICORN, *HOOKS], id="gunicorn"),
    pytest.param([*GUNICORN, *HOOKS, "--preload"], id="gunicorn-preloaded"),
    pytest.param(GUNICORN, id="gunicorn-without-hooks"),
    pytest.param([*UVICORN, FACTORY], id="uvicorn"),
]


@pytest.mark.parametrize("arguments", SERVERS)
def test_all_workers_share_a_slab_of_the_size_that_the_variable_names(
    tools: Bench, upstream: StandInUpstream, arguments: list[str]
) -> None:
    server = start(tools, upstream, arguments)
    replies = [asyncio.run(ask(server.port, CHAT, question("shared"))) for _ in range(20)]
    assert [reply.cache for reply in replies] == ["MISS", *["HIT"] * 19]
    assert upstream.provider.tally.calls == 1
    assert memory_of(tools) == 16 * MiB


def test_the_server_adds_no_header_to_a_provider_s_own(tools: Bench) -> None:
    body = question("whose headers?")
    headers = ((b"date", b"Thu, 01 Jan 2026 00:00:00 GMT"), (b"server", b"a provider"))
    recorded = {recording_key(CHAT, json.dumps(body).encode()): Plan(200, headers, (b"{}",))}
    with StandInUpstream(AT_ONCE, recorded) as upstream:
        server = start(tools, upstream, [*GUNICORN, *HOOKS])
        reply = asyncio.run(ask(server.port, CHAT, body))
    assert (reply.all("date"), reply.all("server")) == (["Thu, 01 Jan 2026 00:00:00 GMT"], ["a provider"])


def test_a_connection_is_kept_for_longer_than_gunicorn_s_two_seconds(tools: Bench, upstream: StandInUpstream) -> None:
    server = start(tools, upstream, [*GUNICORN, *HOOKS])

    async def main() -> Reply:
        async with await Connection.open(server.port) as connection:
            await connection.ask(CHAT, question("first"))
            await asyncio.sleep(3)
            return await connection.ask(CHAT, question("second"))

    assert asyncio.run(main()).status == 200


@pytest.mark.parametrize("arguments", SERVERS)
def test_a_stop_cuts_no_answer(tools: Bench, upstream: StandInUpstream, arguments: list[str]) -> None:
    upstream.provider.settings = PACED
    server = start(tools, upstream, arguments)

    async def main() -> list[Reply]:
        connections = [await Connection.open(server.port) for _ in range(12)]
        for number, connection in enumerate(connections):
            await connection.send(request_bytes("POST", CHAT, question(f"{number}", stream=True)))
        replies = [await connection.head() for connection in connections]  # all are under way
        server.send(signal.SIGTERM)
        await asyncio.gather(*(connection.body(reply) for connection, reply in zip(connections, replies, strict=True)))
        await asyncio.gather(*(connection.close() for connection in connections))
        return replies

    replies = asyncio.run(main())
    assert [reply.is_whole for reply in replies] == [True] * 12
    assert all(reply.body.endswith(b"data: [DONE]\n\n") for reply in replies)
    assert server.wait() == 0


def test_a_worker_that_comes_later_takes_the_slab_of_another_size_that_is_live_by_then(
    tools: Bench, upstream: StandInUpstream
) -> None:
    server = start(tools, upstream, [*GUNICORN, *HOOKS])
    with SharedSlab(tools.name, SlabConfig(memory_bytes=32 * MiB, ttl=None), replace=True):
        (victim, *_) = workers_of(server)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in workers_of(server) and len(workers_of(server)) == 2, "another worker")
        server.ask("/healthz")
        assert "Worker failed to boot" not in server.log
    assert memory_of(tools) == 32 * MiB


def workers_of(server: Server) -> list[int]:
    return [child.pid for child in psutil.Process(server.pid).children() if child.status() != psutil.STATUS_ZOMBIE]


def test_a_worker_that_finds_no_slab_takes_the_one_that_another_makes_meanwhile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=8 * MiB)):
        monkeypatch.setattr(SharedSlab, "exists", lambda name: False)  # as it was a moment ago
        with app._open_slab(name, 16 * MiB) as slab:
            assert slab.config.memory_bytes == 8 * MiB
