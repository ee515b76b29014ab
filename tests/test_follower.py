"""The stream's reader: elected, resumed by its successor, and sure of having missed nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer

from llm_edge_cache.follower import Follower
from llm_edge_cache.invalidation import tag_hash
from llm_edge_cache.redis_client import Call, RedisTrouble
from llm_edge_cache.redis_records import pack_id
from llm_edge_cache.regions import Counter, Word

KEY = key_of()
SECOND = 10**9


@pytest.fixture
def pair(redis_server: RedisServer) -> Iterator[list[HostParts]]:
    with hosts(redis_server, 2) as made:
        yield made


@pytest.fixture
def here(pair: list[HostParts]) -> HostParts:
    return pair[0]


@pytest.fixture
def there(pair: list[HostParts]) -> HostParts:
    return pair[1]


def another_follower(host: HostParts) -> Follower:
    return Follower(host.slab, host.tier, host.invalidator)


def newest(host: HostParts) -> int:
    return pack_id(host.client.run(Call((b"XREVRANGE", host.tier.names.events, b"+", b"-", b"COUNT", 1)))[0][0])


# ---- election ----


def test_one_process_reads_while_it_beats(here: HostParts) -> None:
    other = another_follower(here)
    assert here.follower.elect(SECOND)
    assert not other.elect(SECOND + SECOND // 2)
    assert here.follower.elect(SECOND + SECOND // 2)


def test_a_silent_reader_is_replaced_within_a_second_and_steps_back(here: HostParts) -> None:
    other = another_follower(here)
    assert here.follower.elect(SECOND)
    assert other.elect(2 * SECOND - SECOND // 5)
    assert not here.follower.elect(2 * SECOND)


def test_of_many_candidates_one_is_elected(here: HostParts) -> None:
    candidates = [another_follower(here) for _ in range(8)]
    assert sum(candidate.elect(SECOND) for candidate in candidates) == 1


def test_who_resigns_is_replaced_at_once(here: HostParts) -> None:
    other = another_follower(here)
    here.follower.elect(SECOND)
    other.resign()  # is nobody
    assert not other.elect(SECOND)
    here.follower.resign()
    assert other.elect(SECOND)


# ---- applying ----


def test_a_key_of_another_host_is_deleted_and_what_began_before_refused(here: HostParts, there: HostParts) -> None:
    there.slab.set(KEY, b"old")
    fence = there.slab._fence(KEY)
    here.invalidate("key", KEY.decode())
    there.follow()
    assert there.slab.get(KEY) is None
    assert not there.slab._fill_fenced(KEY, b"old", fence)
    assert there.count(Counter.INVALIDATED_REMOTE) == 2  # announcement and confirmation
    assert there.word(Word.CURSOR) == there.word(Word.BEGIN) == newest(here)


def test_a_tag_of_another_host_is_raised(here: HostParts, there: HostParts) -> None:
    there.slab._word_add(Word.TAG_EPOCH, 5)
    here.invalidate("tag", "t")
    there.follow()
    assert there.slab._tag(tag_hash("t")) > 5


def test_a_clear_all_of_another_host_voids_what_redis_still_has(here: HostParts, there: HostParts) -> None:
    there.slab.set(KEY, b"old")
    here.invalidate("all")
    there.follow()
    assert len(there.slab) == 0
    assert there.word(Word.CLEARED) >= here.word(Word.CLEARED) > 0


def test_a_hosts_own_are_not_applied_again(here: HostParts) -> None:
    here.invalidate("key", KEY.decode())
    here.slab.set(KEY, b"new")
    here.follow()
    assert here.slab.get(KEY) == b"new"
    assert here.word(Word.CURSOR) == newest(here)


def test_what_is_not_ours_is_passed_over(here: HostParts) -> None:
    here.client.run(Call((b"XADD", here.tier.names.events, b"*", b"something", b"else")))
    here.follow()
    assert here.word(Word.CURSOR) == newest(here)


def test_there_is_contact_once_the_place_is_found(here: HostParts) -> None:
    assert 0 < here.word(Word.CONTACT) <= time.monotonic_ns()


def test_contact_is_dated_before_the_question(here: HostParts) -> None:
    steps = here.follower.follow()
    effect = next(steps)
    asked = time.monotonic_ns()
    effect = steps.send(here.run(effect.call, blocking=effect.seconds))
    with pytest.raises(StopIteration):
        steps.send(here.run(effect))
    assert 0 < here.word(Word.CONTACT) <= asked


def test_a_full_batch_is_no_contact_yet(here: HostParts, there: HostParts) -> None:
    contact = there.word(Word.CONTACT)
    for _ in range(128):
        here.invalidate("tag", "t")
    there.follow()
    assert there.count(Counter.INVALIDATED_REMOTE) == 256
    assert there.word(Word.CONTACT) == contact
    there.follow()
    assert there.word(Word.CONTACT) > contact


# ---- successors ----


def test_a_successor_goes_on_from_the_cursor(here: HostParts, there: HostParts) -> None:
    there.slab.set(b"other", b"kept")
    there.slab.set(KEY, b"old")
    here.invalidate("key", KEY.decode())
    there.perform(another_follower(there).follow())
    assert there.slab.get(KEY) is None
    assert there.slab.get(b"other") == b"kept"
    assert there.count(Counter.STREAM_FLUSHES) == 0


def test_a_reader_killed_before_the_cursor_moved_leaves_the_entry_to_its_successor(
    here: HostParts, there: HostParts
) -> None:
    there.slab.set(KEY, b"old")
    here.invalidate("key", KEY.decode())
    killed = there.follower.follow()
    effect = next(killed)  # XREAD
    effect = killed.send(there.run(effect.call, blocking=effect.seconds))
    there.run(effect)  # and is never heard of again
    there.perform(another_follower(there).follow())
    assert there.slab.get(KEY) is None


# ---- losing the place ----


@pytest.mark.parametrize("loss", ["trimmed", "deleted"])
@pytest.mark.parametrize("reader", ["the same", "a successor"])
def test_a_lost_place_clears_l1_and_replays_nothing(here: HostParts, there: HostParts, loss: str, reader: str) -> None:
    there.slab.set(KEY, b"perhaps old")
    here.invalidate("tag", "missed")
    command = (b"XTRIM", b"MAXLEN", b"0") if loss == "trimmed" else (b"DEL",)
    here.client.run(Call((command[0], here.tier.names.events, *command[1:])))
    here.invalidate("tag", "another")
    if reader == "a successor":
        there.follower = another_follower(there)
    for _ in range(2):
        there.follow()
    assert len(there.slab) == 0
    assert there.count(Counter.STREAM_FLUSHES) == 1
    assert there.count(Counter.INVALIDATED_REMOTE) == 0
    assert there.word(Word.CURSOR) == newest(here)


def test_one_trimmed_entry_too_many_is_a_lost_place(here: HostParts, there: HostParts) -> None:
    here.invalidate("key", KEY.decode())
    here.invalidate("key", KEY.decode())
    here.client.run(Call((b"XTRIM", here.tier.names.events, b"MAXLEN", 2)))
    there.slab.set(KEY, b"perhaps old")
    for _ in range(2):
        there.follow()
    assert there.count(Counter.STREAM_FLUSHES) == 1


def test_after_a_flush_values_from_before_are_void_though_no_tombstone_is_left(
    here: HostParts, there: HostParts
) -> None:
    begin = there.word(Word.BEGIN)
    for name in here.client.run(Call((b"KEYS", here.tier.names.prefix + b"*"))):
        here.client.run(Call((b"DEL", name)))
    for host in (here, there):
        for _ in range(2):
            host.follow()
    assert here.word(Word.CLEARED) == there.word(Word.CLEARED) > begin


def test_a_reader_killed_before_l1_is_cleared_leaves_that_to_its_successor(
    here: HostParts, there: HostParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Kill(BaseException):
        pass

    def kill(_: object) -> None:
        raise Kill

    there.slab.set(KEY, b"perhaps old")
    here.client.run(Call((b"DEL", here.tier.names.events)))
    there.follow()
    with monkeypatch.context() as patch:
        patch.setattr(type(there.slab), "clear", kill)
        with pytest.raises(Kill):
            there.follow()
    there.perform(another_follower(there).follow())
    assert len(there.slab) == 0


def test_a_new_host_learns_of_the_last_clear_all(redis_server: RedisServer) -> None:
    with hosts(redis_server, 2, follows=False) as (here, late):
        here.follow()
        here.invalidate("all")
        late.slab.set(KEY, b"from another life")
        late.follow()
        assert late.word(Word.CLEARED) == here.word(Word.CLEARED)
        assert len(late.slab) == 0
        assert late.count(Counter.STREAM_FLUSHES) == 0  # the first time is no loss


def test_redis_is_not_trusted_before_the_stream_was_read_once(redis_server: RedisServer) -> None:
    with hosts(redis_server, 1, follows=False) as (host,):
        assert not host.tier.is_usable()
        host.is_cut = True
        with pytest.raises(RedisTrouble):
            host.follow()
        assert not host.tier.is_usable()
        host.is_cut = False
        host.follow()
        assert host.tier.is_usable()


def test_a_cursor_that_another_process_took_back_is_found_anew(here: HostParts) -> None:
    here.slab._word_set(Word.CURSOR, 0)
    here.slab._word_set(Word.CLEARED, 0)
    here.follow()
    assert here.word(Word.CURSOR) == newest(here)
    assert here.word(Word.CLEARED) > 0
