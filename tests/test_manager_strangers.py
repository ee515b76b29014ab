"""What others wrote under the names of the cache: counted, removed, and never served."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from manager_faces import KINDS, Face, answer, ask, judge
from redis_servers import RedisServer, wait_for

from llm_edge_cache import CacheableRequest, generate_cache_key
from llm_edge_cache.effects import World, perform
from llm_edge_cache.invalidation import _JOURNAL
from llm_edge_cache.redis_records import pack_id
from llm_edge_cache.redis_tier import UNANSWERED
from llm_edge_cache.regions import Counter, Word

BAD = [counter for counter in Counter if counter.name.startswith("BAD_")]
ERRORS = [counter for counter in Counter if counter.name.startswith("L2_ERROR_")]
REQUEST = ask("what others wrote over")
NEVER = b"7" + b"f" * 15  # an id far in the future
LEASE = b"L" + b"0" * 16 + b"a" * 32 + b"%013d"

GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"hello",
    "JSON": b'{"content": "another cache\'s answer"}',
    "a pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00K\x01.",
    "a value without a beginning": b"V" + b"\xff" * 40,
    "a value of another format": b"V" + b"0" * 16 + b"\x21" + b"x" * 40,
    "a tombstone of garbage": b"X" + b"z" * 16,
    "a tombstone with a tail": b"X" + b"0" * 16 + b"tail",
    "a tombstone cut off": b"X0000",
    "a lease cut off": b"L" + b"0" * 20,
    "a lease of garbage": b"L" + b"0" * 16 + b"z" * 32 + b"x" * 13,
    "noise": os.urandom(300),
    "much": b"x" * (8 << 20),
}


@pytest.fixture(scope="module", params=KINDS)
def face(request: pytest.FixtureRequest, redis_server: RedisServer) -> Iterator[Face]:
    """A cache for all tests that leave the stream alone."""
    name = f"test-{os.getpid()}-strangers-{request.param}"
    with Face(request.param, name, redis_server.url, key_prefix=f"{name}:") as made:
        made.wait_usable()
        yield made
        assert made.count(*ERRORS) == 0
        made.slab.unlink()


@pytest.fixture
def own_face(name: str, redis_server: RedisServer) -> Iterator[Face]:
    """A cache for one test."""
    with Face("threads", name, redis_server.url, key_prefix=f"{name}:") as made:
        made.wait_usable()
        yield made


def heals(face: Face, server: RedisServer, request: CacheableRequest = REQUEST) -> None:
    """An answer stored now is served from Redis."""
    face.put_in_redis(request)
    assert judge(request, face.lookup(request).response)
    face.forget(request)


def is_counted_miss(face: Face, server: RedisServer, request: CacheableRequest = REQUEST) -> None:
    """A look-up misses, counts what it found as bad and not as an error, and leaves nothing of it."""
    face.forget(request)
    bad, misses = face.count(*BAD), face.count(Counter.L2_MISSES)
    assert not face.lookup(request).is_hit
    assert face.count(*BAD) == bad + 1
    assert face.count(Counter.L2_MISSES) == misses + 1
    assert not server.ask("EXISTS", face.redis_name(request))


def is_computed_over(face: Face, *, is_counted: bool = True) -> None:
    """get_or_compute computes at once, counts what it found as bad, and its answer goes to Redis."""
    face.forget(REQUEST)
    bad, written = face.count(*BAD), face.count(Counter.L2_WRITES)
    assert judge(REQUEST, face.get_or_compute(REQUEST, lambda: answer(REQUEST), timeout=30))
    assert face.count(*BAD) == bad + is_counted
    wait_for(lambda: face.count(Counter.L2_WRITES) == written + 1, "the answer is in Redis")
    face.forget(REQUEST)
    assert judge(REQUEST, face.lookup(REQUEST).response)


def test_garbage_in_place_of_a_value_is_a_counted_miss_and_goes(face: Face, redis_server: RedisServer) -> None:
    for garbage in GARBAGE.values():
        redis_server.ask("SET", face.redis_name(REQUEST), garbage)
        is_counted_miss(face, redis_server)
    heals(face, redis_server)


# To the scripts the first is nothing at all, the others are leases and tombstones of long ago.
COUNTED_BY_READERS_ONLY = {"nothing", "a tombstone with a tail", "a lease cut off", "a lease of garbage"}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_in_place_of_a_value_keeps_nobody_from_computing_it(
    face: Face, redis_server: RedisServer, what: str
) -> None:
    redis_server.ask("SET", face.redis_name(REQUEST), GARBAGE[what])
    is_computed_over(face, is_counted=what not in COUNTED_BY_READERS_ONLY)


def test_garbage_in_place_of_a_value_is_written_over(face: Face, redis_server: RedisServer) -> None:
    for garbage in GARBAGE.values():
        redis_server.ask("SET", face.redis_name(REQUEST), garbage)
        heals(face, redis_server)


def test_a_value_of_every_other_length_is_a_counted_miss(face: Face, redis_server: RedisServer) -> None:
    face.put_in_redis(REQUEST)
    key = face.redis_name(REQUEST)
    whole = redis_server.ask("GET", key)
    with redis_server.client() as client:
        for length in range(len(whole)):
            client.set(key, whole[:length])
            is_counted_miss(face, redis_server)
        for longer in (whole + b"x", whole + whole):
            client.set(key, longer)
            is_counted_miss(face, redis_server)
        client.set(key, whole)
    assert judge(REQUEST, face.lookup(REQUEST).response)


def test_a_value_with_any_byte_changed_is_never_served(face: Face, redis_server: RedisServer) -> None:
    """In its first 17 bytes it may become something else of ours; from there on the checksum sees it."""
    face.put_in_redis(REQUEST)
    key = face.redis_name(REQUEST)
    whole = redis_server.ask("GET", key)
    with redis_server.client() as client:
        for place in range(17, len(whole)):
            client.set(key, whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
            is_counted_miss(face, redis_server)


OTHER_TYPES = {
    "list": ("RPUSH", "x"),
    "hash": ("HSET", "field", "x"),
    "set": ("SADD", "x"),
    "sorted set": ("ZADD", "1", "x"),
    "stream": ("XADD", "*", "x", "y"),
}


@pytest.mark.parametrize("other", OTHER_TYPES)
def test_another_type_in_place_of_a_value_is_a_counted_miss_and_goes(
    face: Face, redis_server: RedisServer, other: str
) -> None:
    command, *arguments = OTHER_TYPES[other]
    for check in (is_counted_miss, lambda face, _: is_computed_over(face), heals):
        redis_server.ask("DEL", face.redis_name(REQUEST))
        redis_server.ask(command, face.redis_name(REQUEST), *arguments)
        check(face, redis_server)


@pytest.mark.parametrize("deadline", [9_999_999_999_999, 0])
def test_a_lease_for_years_holds_nobody_up(face: Face, redis_server: RedisServer, deadline: int) -> None:
    redis_server.ask("SET", face.redis_name(REQUEST), LEASE % deadline)
    assert judge(REQUEST, face.get_or_compute(REQUEST, lambda: answer(REQUEST), timeout=30))


@pytest.mark.parametrize("reply", [[], [-5], [b"one", b"two"], [None, None], [-5, b"two", b"three"], {}])
def test_an_answer_to_a_claim_that_no_script_gives_is_none(face: Face, reply: object) -> None:
    assert face.engine.tier is not None
    redis: Any = SimpleNamespace(run=lambda *_, **__: reply)
    bad = face.count(*BAD)
    claim = face.engine.tier.claim(generate_cache_key(REQUEST).encode(), b"1" * 32)
    assert perform(claim, World(redis, lambda _: None)) is UNANSWERED
    assert face.count(*BAD) > bad


def test_garbage_is_removed_only_while_it_is_there(face: Face, redis_server: RedisServer) -> None:
    """An invalidation between the reading of garbage and its removal stands."""
    assert face.engine.tier is not None
    assert face.engine.redis is not None
    steps = face.engine.tier.read(generate_cache_key(REQUEST).encode())
    next(steps)
    removal = steps.send(b"garbage")
    face.invalidate(REQUEST)
    assert face.engine.redis.run(removal) == 0  # type: ignore[arg-type]
    assert redis_server.ask("GET", face.redis_name(REQUEST))[:1] == b"X"


# ---- tags, the id of the last clear_all, the stream, the journal ----


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"0" * 15 + b"g", b"f" * 16, None])
def test_garbage_in_place_of_a_tag_voids_its_values_once(
    face: Face, redis_server: RedisServer, garbage: bytes | None
) -> None:
    assert face.engine.tier is not None
    name = face.engine.tier.names.tag("tag")
    face.put_in_redis(REQUEST, tags=("tag",))
    redis_server.ask("DEL", name)
    redis_server.ask(*(("RPUSH", name, "x") if garbage is None else ("SET", name, garbage)))
    bad = face.count(*BAD)
    assert not face.lookup(REQUEST).is_hit
    assert face.count(*BAD) == bad + 1
    assert not redis_server.ask("EXISTS", name)
    face.put_in_redis(REQUEST, tags=("tag",))
    assert judge(REQUEST, face.lookup(REQUEST).response)
    face.invalidate_tag("tag")
    assert not face.lookup(REQUEST).is_hit


@pytest.mark.parametrize("garbage", [b"garbage", None])
def test_a_store_or_an_invalidation_puts_a_tag_right(
    face: Face, redis_server: RedisServer, garbage: bytes | None
) -> None:
    assert face.engine.tier is not None
    name = face.engine.tier.names.tag("tag")
    for put_right in (lambda: face.put_in_redis(REQUEST, tags=("tag",)), lambda: face.invalidate_tag("tag")):
        redis_server.ask("DEL", name)
        redis_server.ask(*(("RPUSH", name, "x") if garbage is None else ("SET", name, garbage)))
        put_right()
        assert len(redis_server.ask("GET", name)) == 16


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"f" * 16, None])
def test_garbage_in_place_of_the_last_clear_all_voids_everything_for_who_comes_new(
    name: str, redis_server: RedisServer, garbage: bytes | None
) -> None:
    with Face("threads", f"{name}-one", redis_server.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        face.put_in_redis(REQUEST)
        face.invalidate(ask("another"))  # an id above that at which the value began
        assert face.engine.tier is not None
        cleared = face.engine.tier.names.cleared
        face.slab.unlink()
    redis_server.ask("DEL", cleared)
    redis_server.ask(*(("RPUSH", cleared, "x") if garbage is None else ("SET", cleared, garbage)))
    with Face("threads", name, redis_server.url, key_prefix=f"{name}:") as face:
        face.wait_usable()
        assert face.count(*BAD) == 1
        assert not face.lookup(REQUEST).is_hit
        assert len(redis_server.ask("GET", cleared)) == 16
        heals(face, redis_server)


def _is_whole_again(face: Face, redis_server: RedisServer) -> None:
    assert face.engine.tier is not None
    events = face.engine.tier.names.events
    wait_for(lambda: redis_server.ask("TYPE", events) == b"stream", "there is a stream")
    face.invalidate(REQUEST)
    face.wait_usable()
    newest = redis_server.ask("XREVRANGE", events, "+", "-", "COUNT", 1)[0][0]
    wait_for(lambda: face.engine.slab._word(Word.CURSOR) == pack_id(newest), "the stream is read on")
    heals(face, redis_server)


@pytest.mark.parametrize("other", ["string", "list"])
def test_something_else_in_place_of_the_stream_is_replaced(
    own_face: Face, redis_server: RedisServer, other: str
) -> None:
    assert own_face.engine.tier is not None
    events = own_face.engine.tier.names.events
    redis_server.ask(*(("SET", b"other", "x") if other == "string" else ("RPUSH", b"other", "x")))
    redis_server.ask("RENAME", b"other", events)  # in one step: the stream is never seen to be gone
    wait_for(lambda: own_face.count(*BAD), "it is noticed")
    _is_whole_again(own_face, redis_server)
    assert own_face.count(Counter.STREAM_FLUSHES) == 1


STRANGE_ENTRIES = [
    ("kind", "key", "name", ""),
    ("kind", "key", "name", "x" * 5000),
    ("kind", "key", "name", b"\xff\xfe"),
    ("kind", "unheard of", "name", "x"),
    ("kind", "tag"),
    ("nothing", "of ours"),
]


def test_entries_of_the_stream_that_are_not_ours_are_passed_over(own_face: Face, redis_server: RedisServer) -> None:
    assert own_face.engine.tier is not None
    for entry in STRANGE_ENTRIES:
        redis_server.ask("XADD", own_face.engine.tier.names.events, "*", *entry)
    _is_whole_again(own_face, redis_server)
    assert own_face.count(Counter.STREAM_FLUSHES) == 0


def test_a_stream_id_beyond_all_clocks_does_not_end_invalidation(own_face: Face, redis_server: RedisServer) -> None:
    assert own_face.engine.tier is not None
    redis_server.ask("XADD", own_face.engine.tier.names.events, "18446744073709551615-7", "kind", "hello")
    wait_for(lambda: own_face.count(*BAD), "it is noticed")
    _is_whole_again(own_face, redis_server)


def test_a_stream_that_lost_our_place_while_its_reader_lived_is_not_read_on(
    own_face: Face, redis_server: RedisServer
) -> None:
    assert own_face.engine.tier is not None
    events = own_face.engine.tier.names.events
    local = ask("in L1")
    own_face.store(local, answer(local))
    with redis_server.client() as client, client.pipeline() as pipeline:  # a transaction: the reader sees its end
        pipeline.xadd(events, {"kind": "key", "name": generate_cache_key(local).encode(), "origin": "1"})
        pipeline.delete(events)
        pipeline.xadd(events, {"kind": "hello"})
        pipeline.execute()
    wait_for(lambda: own_face.count(Counter.STREAM_FLUSHES), "L1 is cleared")
    own_face.forget(REQUEST)
    assert own_face.l1_entry_count() == 0


@pytest.mark.parametrize("garbage", [b"", b"\xc1garbage", b"\x91\x92\xa3key\xa0", b"\x91\x92\xa3key\xa1x"])
def test_a_journal_of_garbage_is_delivered_as_clear_all(
    own_face: Face, redis_server: RedisServer, garbage: bytes
) -> None:
    own_face.put_in_redis(REQUEST)
    own_face.engine.slab.set(_JOURNAL, garbage, ttl=None, tti=None)
    own_face.engine.slab._word_add(Word.UNDELIVERED, 1)
    own_face.wait_usable()
    assert own_face.engine.slab._word(Word.CLEARED) != 0
    assert not own_face.lookup(REQUEST).is_hit
    heals(own_face, redis_server)
