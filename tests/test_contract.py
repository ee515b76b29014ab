"""What the tiers share, as one suite over each and over a dictionary: set, get, expire, overwrite, delete, clear.

Redis is used as the manager uses it: through RedisTier and Invalidator, on a real server.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_servers import RedisServer

from llm_edge_cache import CachedResponse, L2Config, SharedSlab
from llm_edge_cache.codec import Entry, EntryCodec
from llm_edge_cache.effects import World, perform
from llm_edge_cache.invalidation import Invalidation, Invalidator
from llm_edge_cache.redis_client import RedisClient, parse_redis_url
from llm_edge_cache.redis_tier import Found, RedisTier
from llm_edge_cache.regions import Word

SHORT = 0.1  # seconds; a life that ends within a test
LONG = 60.0
KEYS = [f"{number:064x}".encode() for number in range(6)]


class Tier(Protocol):
    """A tier, as far as all of them are one."""

    def set(self, key: bytes, content: str, seconds: float) -> None:
        """Store an answer for so many seconds."""

    def get(self, key: bytes) -> str | None:
        """Return the answer; None where there is none."""

    def delete(self, key: bytes) -> None:
        """Make one void."""

    def clear(self) -> None:
        """Make all void."""


class DictionaryTier:
    """What the others are measured by."""

    def __init__(self) -> None:
        self.entries: dict[bytes, tuple[str, float]] = {}

    def set(self, key: bytes, content: str, seconds: float) -> None:
        self.entries[key] = content, time.monotonic() + seconds

    def get(self, key: bytes) -> str | None:
        content, gone_at = self.entries.get(key, (None, 0.0))
        return content if time.monotonic() < gone_at else None

    def delete(self, key: bytes) -> None:
        self.entries.pop(key, None)

    def clear(self) -> None:
        self.entries.clear()


class SlabTier:
    def __init__(self, slab: SharedSlab) -> None:
        self._slab = slab
        self._codec = EntryCodec()

    def set(self, key: bytes, content: str, seconds: float) -> None:
        assert self._slab.set(key, self._codec.pack(Entry(CachedResponse(content, "m"))), ttl=seconds)

    def get(self, key: bytes) -> str | None:
        data = self._slab.get(key)
        return None if data is None else self._codec.unpack(data).response.content

    def delete(self, key: bytes) -> None:
        self._slab.delete(key)

    def clear(self) -> None:
        self._slab.clear()


class RedisBehind:
    """Redis through RedisTier; a slab holds the words that it is judged by."""

    def __init__(self, slab: SharedSlab, client: RedisClient, prefix: str) -> None:
        slab._word_set(Word.CURSOR, 1)  # this host has read the stream
        self._slab = slab
        self._codec = EntryCodec()
        self._tier = RedisTier(slab, L2Config(key_prefix=prefix), self._codec)
        self._invalidator = Invalidator(slab, self._tier)
        self._world = World(client, lambda flight: None)

    def set(self, key: bytes, content: str, seconds: float) -> None:
        data = self._codec.encode(Entry(CachedResponse(content, "m"), time.time() + seconds))
        command = self._tier.write_command(key, data, self._slab._word(Word.BEGIN), seconds)
        assert perform(self._tier.ask(command), self._world) == 1

    def get(self, key: bytes) -> str | None:
        found = perform(self._tier.read(key), self._world)
        assert found is None or isinstance(found, Found), "Redis did not answer"
        return None if found is None else found.entry.response.content

    def delete(self, key: bytes) -> None:
        self._void(Invalidation("key", key.decode()))

    def clear(self) -> None:
        self._void(Invalidation("all"))

    def _void(self, what: Invalidation) -> None:
        perform(self._invalidator.invalidate(what), self._world)
        assert self._slab._word(Word.UNDELIVERED) == 0


@pytest.fixture(params=["dictionary", "slab", "redis"])
def tier(request: pytest.FixtureRequest, slab: SharedSlab) -> Iterator[Tier]:
    if request.param == "dictionary":
        yield DictionaryTier()
    elif request.param == "slab":
        yield SlabTier(slab)
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        with RedisClient(parse_redis_url(server.unix_url), operation_timeout=10) as client:
            yield RedisBehind(slab, client, f"contract-{secrets.token_hex(4)}:")


def test_what_was_never_set_is_absent(tier: Tier) -> None:
    assert tier.get(KEYS[0]) is None


def test_what_was_set_is_there(tier: Tier) -> None:
    tier.set(KEYS[0], "one", LONG)
    assert tier.get(KEYS[0]) == "one"
    assert tier.get(KEYS[1]) is None


@pytest.mark.parametrize("content", ["", "ä€😀\0", "x" * 100_000])
def test_any_text_comes_back_as_it_was(tier: Tier, content: str) -> None:
    tier.set(KEYS[0], content, LONG)
    assert tier.get(KEYS[0]) == content


def test_the_last_value_counts(tier: Tier) -> None:
    for content in ("one", "a longer second one", "3"):
        tier.set(KEYS[0], content, LONG)
        assert tier.get(KEYS[0]) == content


def test_what_was_deleted_is_absent_and_others_stay(tier: Tier) -> None:
    tier.set(KEYS[0], "one", LONG)
    tier.set(KEYS[1], "two", LONG)
    tier.delete(KEYS[0])
    assert tier.get(KEYS[0]) is None
    assert tier.get(KEYS[1]) == "two"


def test_deleting_what_is_absent_does_nothing(tier: Tier) -> None:
    tier.delete(KEYS[0])
    assert tier.get(KEYS[0]) is None


def test_what_is_set_after_a_deletion_is_there(tier: Tier) -> None:
    tier.set(KEYS[0], "one", LONG)
    tier.delete(KEYS[0])
    tier.set(KEYS[0], "two", LONG)
    assert tier.get(KEYS[0]) == "two"


def test_clearing_makes_all_absent(tier: Tier) -> None:
    for key in KEYS:
        tier.set(key, "x", LONG)
    tier.clear()
    assert [tier.get(key) for key in KEYS] == [None] * len(KEYS)


def test_what_is_set_after_clearing_is_there(tier: Tier) -> None:
    tier.set(KEYS[0], "one", LONG)
    tier.clear()
    tier.set(KEYS[0], "two", LONG)
    assert tier.get(KEYS[0]) == "two"


def test_a_value_is_there_until_its_time_and_no_longer(tier: Tier) -> None:
    tier.set(KEYS[0], "short", SHORT)
    tier.set(KEYS[1], "long", LONG)
    assert tier.get(KEYS[1]) == "long"
    time.sleep(SHORT + 0.02)
    assert tier.get(KEYS[0]) is None
    assert tier.get(KEYS[1]) == "long"


@pytest.mark.parametrize(("first", "second", "expected"), [(SHORT, LONG, "two"), (LONG, SHORT, None)])
def test_the_last_life_counts(tier: Tier, first: float, second: float, expected: str | None) -> None:
    tier.set(KEYS[0], "one", first)
    tier.set(KEYS[0], "two", second)
    time.sleep(SHORT + 0.02)
    assert tier.get(KEYS[0]) == expected


steps = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(KEYS), st.text(st.characters(exclude_categories=["Cs"]), max_size=20)),
    st.tuples(st.just("get"), st.sampled_from(KEYS)),
    st.tuples(st.just("delete"), st.sampled_from(KEYS)),
    st.tuples(st.just("clear")),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(steps, max_size=30))
def test_any_sequence_of_operations_goes_as_in_the_dictionary(tier: Tier, sequence: list[tuple[Any, ...]]) -> None:
    tier.clear()
    reference = DictionaryTier()
    for operation, *arguments in sequence:
        if operation == "set":
            arguments.append(LONG)
        expected = getattr(reference, operation)(*arguments)
        assert getattr(tier, operation)(*arguments) == expected
    assert [tier.get(key) for key in KEYS] == [reference.get(key) for key in KEYS]
