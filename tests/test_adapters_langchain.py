"""LangChain's cache: the suites of langchain-tests, real models of langchain-core, and two processes."""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("langchain_tests")

from langchain_core.caches import BaseCache
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.language_models.fake_chat_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, Generation, GenerationChunk
from langchain_tests.integration_tests.cache import AsyncCacheTestSuite, SyncCacheTestSuite

from llm_edge_cache import CachedResponse, CacheManager, L1Config, L2Config, SyncCacheManager
from llm_edge_cache.adapters.langchain import LLMEdgeCache
from llm_edge_cache.adapters.serializers import MsgspecSerializer

MiB = 1 << 20
CHAT = ChatGeneration(
    message=AIMessage(
        content=[{"type": "text", "text": "hello"}],
        tool_calls=[{"name": "look", "args": {"lc": 1, "type": "constructor", "x": [1.5, None]}, "id": "t1"}],
        invalid_tool_calls=[{"name": "bad", "args": "{", "id": "t2", "error": "no JSON"}],
        usage_metadata={
            "input_tokens": 3,
            "output_tokens": 4,
            "total_tokens": 7,
            "input_token_details": {"cache_read": 1},
        },
        response_metadata={"model_name": "m", "at": datetime.datetime(2024, 1, 2, 3, 4, 5)},
        additional_kwargs={"refusal": None, "reasoning_content": "because"},
        id="run-1",
    ),
    generation_info={"finish_reason": "stop", "logprobs": None},
)


@pytest.fixture
def l1(name: str) -> L1Config:
    return L1Config(name=name, memory_bytes=4 * MiB)


@pytest.fixture
def cache(l1: L1Config) -> Iterator[LLMEdgeCache]:
    cache = LLMEdgeCache(l1)
    yield cache
    cache.close()


class TestItsSyncSuite(SyncCacheTestSuite):
    @pytest.fixture
    def cache(self, l1: L1Config) -> Iterator[BaseCache]:
        cache = LLMEdgeCache(l1)
        yield cache
        cache.close()


@pytest.mark.filterwarnings("ignore:.*is not an async function")  # one of them is none
@pytest.mark.asyncio
class TestItsAsyncSuite(AsyncCacheTestSuite):
    @pytest.fixture
    def cache(self, l1: L1Config) -> Iterator[BaseCache]:
        cache = LLMEdgeCache(l1)
        yield cache
        cache.close()


# ---- what comes back ----


@pytest.mark.parametrize(
    "generation",
    [
        Generation(text="a"),
        Generation(text="a", generation_info={"n": 1}),
        GenerationChunk(text="b"),
        CHAT,
        ChatGenerationChunk(message=AIMessageChunk(content="c", tool_call_chunks=[], chunk_position="last")),
    ],
)
def test_what_comes_back_is_what_was_stored(cache: LLMEdgeCache, generation: Generation) -> None:
    cache.update("p", "l", [generation])
    (found,) = cache.lookup("p", "l") or ()
    assert found == generation
    assert type(found) is type(generation)


def test_tool_calls_and_usage_survive(cache: LLMEdgeCache) -> None:
    cache.update("p", "l", [CHAT])
    (found,) = cache.lookup("p", "l") or ()
    assert isinstance(found, ChatGeneration)
    assert isinstance(found.message, AIMessage)
    assert isinstance(CHAT.message, AIMessage)
    assert found.message.tool_calls == CHAT.message.tool_calls
    assert found.message.usage_metadata == CHAT.message.usage_metadata


def test_every_look_up_returns_a_list_of_its_own(cache: LLMEdgeCache) -> None:
    cache.update("p", "l", [CHAT])
    first = cache.lookup("p", "l")
    assert first is not None
    first[0].message.content = "changed"  # type: ignore[attr-defined]
    first.clear()
    assert cache.lookup("p", "l") == [CHAT]


def test_the_whole_llm_string_counts(cache: LLMEdgeCache) -> None:
    long = "x" * 5000
    cache.update("p", long + "1", [Generation(text="1")])
    assert cache.lookup("p", long + "2") is None
    assert cache.lookup("p" + "x", long[1:] + "1") is None
    assert cache.lookup("p", long + "1") == [Generation(text="1")]


def test_a_subclass_comes_back_as_what_it_is_of_langchain_core(cache: LLMEdgeCache) -> None:
    class Mine(Generation):
        pass

    cache.update("p", "l", [Mine(text="a")])
    assert cache.lookup("p", "l") == [Generation(text="a")]


def test_no_answers_is_an_answer(cache: LLMEdgeCache) -> None:
    cache.update("p", "l", [])
    assert cache.lookup("p", "l") == []


# ---- what is not stored, or not believed ----


def test_what_cannot_be_carried_is_not_stored_and_the_old_is_gone(
    cache: LLMEdgeCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.update("p", "l", [Generation(text="old")])
    with caplog.at_level(logging.WARNING, "llm_edge_cache"):
        cache.update("p", "l", [Generation(text="secret", generation_info={"o": object()})])
    assert cache.lookup("p", "l") is None
    assert "object" in caplog.text
    assert "secret" not in caplog.text


def dumped(*generations: list[Any]) -> bytes:
    return MsgspecSerializer().dumps([*generations])


@pytest.mark.parametrize(
    "raw",
    [
        b"\xc1",
        None,
        "text",
        [["Generation", "text", None, None]],
        dumped(["PromptTemplate", "text", None, None]),
        dumped(["ChatGeneration", "", None, ["os.system", {"command": "true"}]]),
        dumped(["ChatGeneration", "", None, None]),
    ],
)
def test_what_is_no_answer_of_ours_is_a_miss(cache: LLMEdgeCache, raw: Any) -> None:
    cache._faces.threads.store(cache._request("p", "l"), CachedResponse("", "m", raw=raw))
    assert cache.lookup("p", "l") is None


# ---- real models ----


def test_a_chat_model_is_asked_once(cache: LLMEdgeCache) -> None:
    model = FakeMessagesListChatModel(responses=[AIMessage("one"), AIMessage("two")], cache=cache)
    assert [model.invoke("why").content for _ in range(3)] == ["one"] * 3
    assert model.invoke("why else").content == "two"


def test_a_chat_model_is_asked_once_asynchronously(cache: LLMEdgeCache) -> None:
    model = FakeMessagesListChatModel(responses=[AIMessage("one"), AIMessage("two")], cache=cache)

    async def ask() -> list[Any]:
        return [(await model.ainvoke("why")).content for _ in range(3)]

    assert asyncio.run(ask()) == ["one"] * 3


def test_a_text_model_is_asked_once_for_each_prompt(cache: LLMEdgeCache) -> None:
    model = FakeListLLM(responses=["one", "two", "three"], cache=cache)
    assert model.batch(["a", "b"]) == ["one", "two"]
    assert model.batch(["b", "c", "a"]) == ["two", "three", "one"]


def test_another_process_finds_the_answer(cache: LLMEdgeCache, name: str, run_python: Callable[..., str]) -> None:
    cache.update("p", "l", [CHAT])
    program = """
import sys
from llm_edge_cache import L1Config
from llm_edge_cache.adapters.langchain import LLMEdgeCache
(found,) = LLMEdgeCache(L1Config(name=sys.argv[1], memory_bytes=4 << 20)).lookup("p", "l")
print(found.message.tool_calls[0]["args"])
"""
    assert run_python(program, name) == "{'lc': 1, 'type': 'constructor', 'x': [1.5, None]}"


def test_another_host_finds_the_answer_in_redis(redis_server: Any, name: str) -> None:
    l2 = L2Config(redis_url=redis_server.unix_url, key_prefix=f"{name}:", operation_timeout_ms=5000)
    cache = LLMEdgeCache(L1Config(name=name, memory_bytes=4 * MiB), l2)
    cache.update("p", "l", [CHAT])
    cache.close()
    other = LLMEdgeCache(L1Config(name=name, memory_bytes=4 * MiB), l2)
    other._faces.engine.slab.clear()  # a host of its own, so to speak

    async def look_up() -> Any:
        try:
            return await other.alookup("p", "l")
        finally:
            await other.aclose()

    assert asyncio.run(look_up()) == [CHAT]


# ---- its parts ----


def test_clear_takes_only_what_is_its_own(l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager:
        one, other = LLMEdgeCache(manager=manager), LLMEdgeCache(manager=manager, namespace="other")
        for cache in (one, other):
            cache.update("p", "l", [Generation(text="a")])
        one.clear()
        assert one.lookup("p", "l") is None
        assert other.lookup("p", "l") == [Generation(text="a")]


def test_a_ttl_ends(l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager:
        cache = LLMEdgeCache(manager=manager, ttl=100.0)
        cache.update("p", "l", [Generation(text="a")])
        (entry,) = manager.slab.scan()
        assert 99 < (entry.ttl_left or 0) <= 100


def test_tokens_saved_are_counted(l1: L1Config) -> None:
    with SyncCacheManager(l1) as manager:
        cache = LLMEdgeCache(manager=manager)
        cache.update("p", "l", [CHAT])
        found = manager.lookup(cache._request("p", "l")).response
        assert found is not None
        assert found.tokens is not None
        assert found.tokens.total_tokens == 7


def test_an_asynchronous_manager_will_do(l1: L1Config) -> None:
    async def use() -> Any:
        async with CacheManager(l1) as manager:
            cache = LLMEdgeCache(manager=manager)
            await cache.aupdate("p", "l", [CHAT])
            assert cache.lookup("p", "l") == [CHAT]
            await cache.aclear()
            return await cache.alookup("p", "l")

    assert asyncio.run(use()) is None


def test_without_langchain_core_the_error_names_the_extra(run_python: Callable[..., str]) -> None:
    program = """
import sys
sys.modules["langchain_core"] = None
try:
    import llm_edge_cache.adapters.langchain
except ImportError as error:
    print(error)
"""
    assert "llm-edge-cache[langchain]" in run_python(program)
