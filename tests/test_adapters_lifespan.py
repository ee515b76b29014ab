"""A cache that lives as long as its application: Starlette, FastAPI and Flask, under real servers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from flask import Flask, request
from redis_servers import RedisServer
from starlette.applications import Starlette
from worker_servers import HOOKS, Bench, bench

from llm_edge_cache import CacheableRequest, CachedResponse, CacheManager, L1Config, L2Config, SyncCacheManager
from llm_edge_cache.adapters.lifespan import OpenedWSGI, lifespan

MiB = 1 << 20
APPS = Path(__file__).resolve().parents[1] / "docs" / "examples" / "web_apps"
LOOPBACK = ["--host", "127.0.0.1", "--port", "0"]


@pytest.fixture
def l1(name: str) -> L1Config:
    return L1Config(name=name, memory_bytes=4 * MiB)


async def lived(app: Any) -> tuple[list[str], dict[str, Any]]:
    """Start an ASGI application and stop it; returns what it said, and the state it made."""
    said: list[str] = []
    state: dict[str, Any] = {}
    messages = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> dict[str, str]:
        return {"type": next(messages)}

    async def send(message: dict[str, Any]) -> None:
        said.append(message["type"])

    await app({"type": "lifespan", "state": state}, receive, send)
    return said, state


@pytest.mark.parametrize("framework", [Starlette, FastAPI])
@pytest.mark.parametrize("kind", [CacheManager, SyncCacheManager])
def test_it_is_open_while_the_application_serves(framework: Any, kind: Any, l1: L1Config) -> None:
    made: list[Any] = []

    @contextlib.asynccontextmanager
    async def inner(app: Any) -> AsyncIterator[dict[str, Any]]:
        made[-1].slab.set(b"k", b"v")
        yield {"own": made[-1].engine.is_open}

    def get_manager() -> Any:
        made.append(kind(l1))
        return made[-1]

    app = framework(lifespan=lifespan(get_manager, inner))
    for _ in range(2):  # as under a test client
        said, state = asyncio.run(lived(app))
        assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert state == {"own": True, "cache": made[-1]}
        assert made[-1].slab.closed


def test_it_is_closed_when_the_application_s_own_start_fails(l1: L1Config) -> None:
    @contextlib.asynccontextmanager
    async def inner(app: Any) -> AsyncIterator[None]:
        raise OSError("no start")
        yield

    async def use() -> bool:
        manager = CacheManager(l1)
        with pytest.raises(OSError, match="no start"):
            await lived(Starlette(lifespan=lifespan(manager, inner)))
        return manager.slab.closed

    assert asyncio.run(use())


def test_what_was_stored_last_reaches_redis(redis_server: RedisServer, l1: L1Config) -> None:
    """Closing flushes the queue: another host finds what was stored a moment before the end."""
    l2 = L2Config(redis_url=redis_server.unix_url, key_prefix=f"{l1.name}:", operation_timeout_ms=5000)
    asked = CacheableRequest("m", "why")

    @contextlib.asynccontextmanager
    async def inner(app: Any) -> AsyncIterator[None]:
        yield
        await manager.store(asked, CachedResponse("because", "m"))

    manager = CacheManager(l1, l2)
    asyncio.run(lived(Starlette(lifespan=lifespan(manager, inner))))
    with SyncCacheManager(l1, l2) as other:
        other.slab.clear()
        assert other.lookup(asked).is_hit


def test_flask_finds_it_in_the_environ(l1: L1Config) -> None:
    app = Flask(__name__)
    with SyncCacheManager(l1) as manager:
        app.wsgi_app = OpenedWSGI(app.wsgi_app, manager)  # type: ignore[method-assign]

        @app.get("/")
        def root() -> str:
            return str(request.environ["llm_edge_cache"] is manager and manager.engine.is_open)

        assert app.test_client().get("/").text == "True"


def test_wsgi_needs_a_manager_for_threads(l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager, pytest.raises(TypeError, match="SyncCacheManager"):
        OpenedWSGI(lambda *_: [], CacheManager.over(manager.engine))  # type: ignore[arg-type]


# ---- the examples, under their servers ----


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Bench]:
    with bench(tmp_path) as tools:
        yield tools


FLASK = ["-m", "gunicorn", *HOOKS, "--chdir", str(APPS), "--bind", "127.0.0.1:0", "--workers", "2"]
COMMANDS = {
    "fastapi": ["-m", "uvicorn", "--app-dir", str(APPS), *LOOPBACK, "--workers", "2", "fastapi_app:app"],
    "flask": [*FLASK, "flask_app:app"],
    "flask, preloaded": [*FLASK, "--preload", "flask_app:app"],
}


@pytest.mark.parametrize("example", COMMANDS)
def test_an_example_s_workers_are_one_cache(tools: Bench, redis_server: RedisServer, example: str) -> None:
    environ = {
        "LLM_EDGE_CACHE_L1_MEMORY": "8MiB",
        "LLM_EDGE_CACHE_REDIS_URL": redis_server.unix_url,
        "LLM_EDGE_CACHE_KEY_PREFIX": f"{tools.name}:",
    }
    server = tools.start(COMMANDS[example], environ)
    workers = server.pids(2)
    answers = server.ask_many("/ask?question=why", 24)
    assert len({answer["content"] for answer in answers}) == 1
    assert {answer["pid"] for answer in answers} <= workers
    server.stop()
    assert "Traceback" not in server.log, server.log
