"""LiteLLM's cache, under LiteLLM itself; it is large, so it comes with the extra `bench` and not with `test`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

litellm = pytest.importorskip("litellm", reason="of the extra bench")

from llm_edge_cache import L1Config, SyncCacheManager  # noqa: E402
from llm_edge_cache.adapters.litellm import LLMEdgeCache  # noqa: E402

MiB = 1 << 20
PATIENCE = 100.0
"""Seconds; LiteLLM alone takes ten to be imported."""
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(4 * PATIENCE)]  # the warnings are LiteLLM's own


@pytest.fixture
def cache(name: str) -> Iterator[LLMEdgeCache]:
    cache = LLMEdgeCache(L1Config(name=name, memory_bytes=4 * MiB))
    yield cache
    cache.close()


COMPLETION = """
import os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
from llm_edge_cache import L1Config
from llm_edge_cache.adapters.litellm import LLMEdgeCache
name, answer = sys.argv[1:]
litellm.cache = litellm.Cache(type="local")
litellm.cache.cache = LLMEdgeCache(L1Config(name=name, memory_bytes=4 << 20))
said = litellm.completion("gpt-4o", messages=[{"role": "user", "content": "why"}], mock_response=answer, caching=True)
print(said.choices[0].message.content, said.usage.total_tokens, said._hidden_params.get("cache_hit"))
import time
from llm_edge_cache import SharedSlab
while not len(SharedSlab.attach(name)):  # LiteLLM stores from a thread of its own
    time.sleep(0.01)
"""


def complete(name: str, answer: str) -> str:
    command = [sys.executable, "-c", COMPLETION, name, answer]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_second_process_s_completion_is_a_hit(name: str) -> None:
    first, second = (complete(name, answer) for answer in ("one", "two"))
    assert first.split()[0] == second.split()[0] == "one"
    assert first.split()[1] == second.split()[1]
    assert second.split()[2] == "True"


def test_a_completion_s_ttl_is_honoured(cache: LLMEdgeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = litellm.Cache(type="local")
    holder.cache = cache
    monkeypatch.setattr(litellm, "cache", holder)

    async def ask(answer: str) -> Any:
        made = await litellm.acompletion(
            "gpt-4o",
            messages=[{"role": "user", "content": "why"}],
            mock_response=answer,
            caching=True,
            cache={"ttl": 1},
        )
        await asyncio.sleep(0.2)
        return made.choices[0].message.content

    async def ask_three_times() -> list[Any]:
        said = [await ask("one"), await ask("two")]
        await asyncio.sleep(1.0)
        return [*said, await ask("three")]

    assert asyncio.run(ask_three_times()) == ["one", "one", "three"]


def test_batches(cache: LLMEdgeCache) -> None:
    async def use() -> list[Any]:
        await cache.async_set_cache_pipeline([("a", {"n": 1}), ("b", [1.5])], ttl=60)
        await cache.batch_cache_write("c", "text", ttl="60")
        found = await cache.async_batch_get_cache(["a", "b", "c", "d"])
        await cache.delete_cache_keys(["a", "c"])
        return [found, cache.batch_get_cache(["a", "b", "c"])]

    assert asyncio.run(use()) == [[{"n": 1}, [1.5], "text", None], [None, [1.5], None]]


def test_a_ttl_that_is_over_leaves_nothing(cache: LLMEdgeCache) -> None:
    for ttl in (0, -1):
        cache.set_cache("k", "old")
        cache.set_cache("k", "new", ttl=ttl)
        assert cache.get_cache("k") is None


def test_without_a_ttl_the_default_holds(name: str) -> None:
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        cache = LLMEdgeCache(manager=manager, default_ttl=50.0)
        for ttl, left in ((None, 50), ("wrong", 50), (20, 20), (0.5, 0.5)):
            cache.set_cache("k", "v", ttl=ttl)
            (entry,) = manager.slab.scan()
            assert left - 1 < (entry.ttl_left or 0) <= left


def test_what_cannot_be_carried_is_an_error_and_the_old_value_is_gone(cache: LLMEdgeCache) -> None:
    cache.set_cache("k", "old")
    with pytest.raises(TypeError, match="object"):
        cache.set_cache("k", object())
    assert cache.get_cache("k") is None
    asyncio.run(cache.async_set_cache("k", "old"))
    with pytest.raises(TypeError, match="object"):
        asyncio.run(cache.async_set_cache("k", object()))
    assert cache.get_cache("k") is None


def test_a_flush_takes_only_its_own(name: str) -> None:
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        one, other = LLMEdgeCache(manager=manager), LLMEdgeCache(manager=manager, namespace="other")
        one.set_cache("k", 1)
        other.set_cache("k", 2)
        one.flush_cache()
        assert (one.get_cache("k"), other.get_cache("k")) == (None, 2)


def test_it_tells_whether_it_works(cache: LLMEdgeCache) -> None:
    assert asyncio.run(cache.ping())
    assert asyncio.run(cache.test_connection())["status"] == "success"
    asyncio.run(cache.disconnect())


def test_expired_means_gone(cache: LLMEdgeCache) -> None:
    cache.set_cache("k", 1, ttl=0.1)
    time.sleep(0.2)
    assert cache.get_cache("k") is None
