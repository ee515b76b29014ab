"""One cache with both faces, given or made here; and faces open themselves before they store."""

from __future__ import annotations

import asyncio

import pytest
from manager_faces import MiB, answer, ask
from redis_servers import RedisServer

from llm_edge_cache import CacheManager, L1Config, L2Config, SyncCacheManager
from llm_edge_cache.faces import Faces


@pytest.fixture
def l1(name: str) -> L1Config:
    return L1Config(name=name, memory_bytes=4 * MiB)


def test_both_faces_are_one_cache(l1: L1Config) -> None:
    faces = Faces(l1)
    faces.threads.store(ask("x"), answer(ask("x")))
    assert asyncio.run(faces.loops.lookup(ask("x"))).is_hit
    assert faces.loops.engine is faces.threads.engine is faces.engine
    faces.close()
    assert faces.engine.slab.closed


@pytest.mark.parametrize("kind", [CacheManager, SyncCacheManager])
def test_a_given_manager_is_one_of_the_faces_and_stays_open(l1: L1Config, kind: type) -> None:
    manager = kind(l1)
    faces = Faces(manager=manager)
    assert manager in (faces.threads, faces.loops)
    faces.close()
    asyncio.run(faces.aclose())
    assert not manager.slab.closed
    manager.slab.close()


def test_what_the_environment_says_has_no_idle_expiry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE_NAME", name)
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_TTL", "77")
    faces = Faces()
    faces.threads.store(ask("x"), answer(ask("x")))
    (entry,) = faces.engine.slab.scan()
    assert 76 < (entry.ttl_left or 0) <= 77
    assert faces.engine.slab.config.tti is None
    faces.close()


def test_what_is_stored_before_open_reaches_redis(redis_server: RedisServer, l1: L1Config) -> None:
    """With no place in the stream of invalidations yet, what began would be void there."""
    l2 = L2Config(redis_url=redis_server.unix_url, key_prefix=f"{l1.name}:", operation_timeout_ms=5000)
    manager = SyncCacheManager(l1, l2)
    manager.store(ask("x"), answer(ask("x")), tags=["t"])
    manager.close()

    async def store() -> None:
        manager = CacheManager(l1, l2)
        await manager.store(ask("y"), answer(ask("y")), tags=["t"])
        await manager.aclose()

    asyncio.run(store())
    with SyncCacheManager(l1, l2) as other:
        other.slab.clear()
        assert [other.lookup(ask(one)).tier for one in "xy"] == ["l2", "l2"]
