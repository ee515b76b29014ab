"""Invalidations: on the host at once, in Redis, on the stream, and in the journal while Redis is away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer

from llm_edge_cache import SharedSlab
from llm_edge_cache.invalidation import Invalidation, Invalidator, applied, tag_hash
from llm_edge_cache.redis_client import Call, RedisTrouble, Script
from llm_edge_cache.redis_records import RAISE, TOMBSTONE, pack_id, text_of_id
from llm_edge_cache.regions import Counter, Word

KEY = key_of()
JOURNAL = b"\0llm-edge-cache:journal"


@pytest.fixture
def host(redis_server: RedisServer) -> Iterator[HostParts]:
    with hosts(redis_server) as (made,):
        yield made


def entries(host: HostParts) -> list[tuple[bytes, dict[bytes, bytes]]]:
    found = host.client.run(Call((b"XRANGE", host.tier.names.events, b"-", b"+")))
    return [(identifier, dict(zip(fields[::2], fields[1::2], strict=True))) for identifier, fields in found]


def kinds(host: HostParts) -> list[tuple[bytes, bytes]]:
    return [(fields[b"kind"], fields.get(b"name", b"")) for _, fields in entries(host)][1:]  # the first is "hello"


def do(invalidator: Invalidator, what: Invalidation) -> None:
    """Where there is no Redis there is nothing to wait for."""
    with pytest.raises(StopIteration):
        next(invalidator.invalidate(what))


# ---- on the host ----


def test_a_key_is_deleted_and_its_fence_moved(slab: SharedSlab) -> None:
    slab.set(KEY, b"old")
    fence = slab._fence(KEY)
    do(Invalidator(slab, None), Invalidation("key", KEY.decode()))
    assert slab.get(KEY) is None
    assert slab._fence(KEY) != fence
    assert slab._counter_sums()[Counter.INVALIDATED_KEYS] == 1


def test_the_fence_moves_also_where_nothing_was_stored(slab: SharedSlab) -> None:
    fence = slab._fence(KEY)
    do(Invalidator(slab, None), Invalidation("key", KEY.decode()))
    assert not slab._fill_fenced(KEY, b"old", fence)


def test_a_tag_is_raised_above_all_that_began_before(slab: SharedSlab) -> None:
    invalidator = Invalidator(slab, None)
    for _ in range(3):
        before = slab._word(Word.TAG_EPOCH)
        do(invalidator, Invalidation("tag", "t"))
        assert before < slab._tag(tag_hash("t")) <= slab._word(Word.TAG_EPOCH)
    assert slab._counter_sums()[Counter.INVALIDATED_TAGS] == 3


def test_clear_all_clears(slab: SharedSlab) -> None:
    slab.set(b"a", b"1")
    do(Invalidator(slab, None), Invalidation("all"))
    assert len(slab) == 0
    assert slab._counter_sums()[Counter.INVALIDATED_ALL] == 1


# ---- to Redis ----


def test_the_tombstone_comes_between_announcement_and_confirmation(host: HostParts) -> None:
    steps = host.invalidator.invalidate(Invalidation("key", KEY.decode()))
    effects: list[Any] = [next(steps)]
    effects += [steps.send(reply) for reply in (b"5-1", 1)]
    with pytest.raises(StopIteration):
        steps.send(b"5-2")
    announcement, tombstone, confirmation = effects
    assert announcement.args[0] == confirmation.args[0] == b"XADD"
    assert isinstance(tombstone, Script)
    assert tombstone.source is TOMBSTONE
    assert tombstone.args[0] == text_of_id(pack_id(b"5-1"))


def test_a_key_is_announced_twice_and_leaves_a_tombstone_of_the_first_id(host: HostParts) -> None:
    host.invalidate("key", KEY.decode())
    assert kinds(host) == [(b"key", KEY)] * 2
    (_, first, second) = [pack_id(identifier) for identifier, _ in entries(host)]
    assert host.client.run(Call((b"GET", host.tier.names.value(KEY)))) == b"X" + text_of_id(first)
    assert host.word(Word.BEGIN) == second


def test_a_tags_id_is_raised(host: HostParts) -> None:
    host.invalidate("tag", "a tag")
    assert kinds(host) == [(b"tag", b"a tag")] * 2
    found = host.client.run(Call((b"GET", host.tier.names.tag("a tag"))))
    assert found == text_of_id(pack_id(entries(host)[1][0]))


def test_clear_all_is_remembered_in_redis_and_on_the_host(host: HostParts) -> None:
    host.invalidate("all")
    first = pack_id(entries(host)[1][0])
    assert host.client.run(Call((b"GET", host.tier.names.cleared))) == text_of_id(first)
    assert host.word(Word.CLEARED) == first


def test_what_is_filled_between_the_two_deletions_is_deleted(host: HostParts) -> None:
    steps = host.invalidator.invalidate(Invalidation("key", KEY.decode()))
    next(steps)
    host.slab.fill(KEY, b"old", host.slab._token(KEY))
    token = host.slab._token(KEY)
    for reply in (b"5-1", 1):
        steps.send(reply)
    with pytest.raises(StopIteration):
        steps.send(b"5-2")
    assert host.slab.get(KEY) is None
    assert not host.slab.fill(KEY, b"old", token)


# ---- the journal ----


def cut_off(host: HostParts, *invalidations: tuple[str, str]) -> None:
    host.is_cut = True
    for kind, name in invalidations:
        host.invalidate(kind, name)
    host.is_cut = False
    host.tier.breaker.succeed()


def test_what_redis_did_not_take_is_written_down_and_redis_not_trusted(host: HostParts) -> None:
    assert host.tier.is_usable()
    cut_off(host, ("key", KEY.decode()))
    assert host.word(Word.UNDELIVERED) == 1
    assert not host.tier.is_usable()
    assert kinds(host) == []


def test_an_open_breaker_is_reason_enough_not_to_ask(host: HostParts) -> None:
    for _ in range(3):
        host.tier.breaker.fail(1)
    host.invalidate("key", KEY.decode())  # would reach Redis
    assert kinds(host) == []
    assert host.word(Word.UNDELIVERED) == 1


def test_the_journal_is_delivered_once_and_redis_trusted_again(host: HostParts) -> None:
    cut_off(host, ("key", KEY.decode()), ("tag", "t"), ("key", KEY.decode()))
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"key", KEY)] * 2 + [(b"tag", b"t")] * 2
    assert host.tier.is_usable()
    host.perform(host.invalidator.deliver())
    assert len(kinds(host)) == 4


def test_delivery_stops_where_redis_goes_away_again(host: HostParts) -> None:
    cut_off(host, ("key", KEY.decode()))
    host.is_cut = True
    host.perform(host.invalidator.deliver())
    assert host.word(Word.UNDELIVERED) == 1
    host.is_cut = False
    host.perform(host.invalidator.deliver())
    assert host.tier.is_usable()


def test_another_process_of_the_host_delivers(host: HostParts) -> None:
    cut_off(host, ("key", KEY.decode()))
    other = Invalidator(host.slab, host.tier)
    host.perform(other.deliver())
    assert kinds(host) == [(b"key", KEY)] * 2


@pytest.mark.parametrize("damage", ["evicted", "garbage"])
def test_a_lost_journal_is_delivered_as_clear_all(host: HostParts, damage: str) -> None:
    cut_off(host, ("key", KEY.decode()))
    if damage == "evicted":
        host.slab.delete(JOURNAL)
    else:
        host.slab.set(JOURNAL, b"\xff\xff")
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"all", b"")] * 2
    assert host.tier.is_usable()


def test_clear_all_is_delivered_once_although_it_clears_the_journal_too(host: HostParts) -> None:
    cut_off(host, ("all", ""))
    for _ in range(2):
        host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"all", b"")] * 2
    assert host.word(Word.UNDELIVERED) == 0


def test_a_long_journal_becomes_clear_all(host: HostParts) -> None:
    host.is_cut = True
    for _ in range(3):
        host.tier.breaker.fail(1)
    for number in range(1001):
        host.invalidate("key", f"{number:064x}")
    host.is_cut = False
    host.tier.breaker.succeed()
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"all", b"")] * 2


def test_a_slab_without_room_for_the_journal_loses_nothing(host: HostParts, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("add", "cas"):
        monkeypatch.setattr(type(host.slab), name, lambda *_, **__: False)
    cut_off(host, ("key", KEY.decode()))
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"all", b"")] * 2


def test_an_invalidation_that_is_in_the_journal_already_is_delivered_again(host: HostParts) -> None:
    """1 D delivers K from the journal  2 P invalidates K again  3 D empties the journal: P's is still to come."""
    cut_off(host, ("key", KEY.decode()))
    delivery = host.invalidator.deliver()
    effect = next(delivery)
    for _ in range(2):
        effect = delivery.send(host.run(effect))
    reply = host.run(effect)
    cut_off(host, ("key", KEY.decode()))
    with pytest.raises(StopIteration):
        delivery.send(reply)
    assert not host.tier.is_usable()
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"key", KEY)] * 4
    assert host.tier.is_usable()


def test_what_is_appended_under_delivery_is_not_forgotten(host: HostParts) -> None:
    cut_off(host, ("tag", "t"))
    delivery = host.invalidator.deliver()
    effect = next(delivery)
    for _ in range(2):
        effect = delivery.send(host.run(effect))
    reply = host.run(effect)
    cut_off(host, ("tag", "u"))
    with pytest.raises(StopIteration):
        delivery.send(reply)
    host.perform(host.invalidator.deliver())
    assert kinds(host)[-2:] == [(b"tag", b"u")] * 2


# ---- what the stream says ----


def test_an_entry_is_read_back() -> None:
    fields = {b"kind": b"tag", b"name": "grün".encode(), b"origin": b"7"}
    assert applied(fields) == (Invalidation("tag", "grün"), b"7")


@pytest.mark.parametrize("fields", [{}, {b"kind": b"hello"}, {b"kind": b"\xff"}, {b"name": b"x"}])
def test_what_is_not_ours_means_nothing(fields: dict[bytes, bytes]) -> None:
    assert applied(fields)[0] is None


def test_a_reply_that_got_lost_is_made_up_for(host: HostParts) -> None:
    """The tombstone failed after the announcement: all of it comes again."""
    steps = host.invalidator.invalidate(Invalidation("key", KEY.decode()))
    effect = steps.send(host.run(next(steps)))
    assert effect.source is TOMBSTONE
    with pytest.raises(StopIteration):
        steps.throw(RedisTrouble("timeout", "lost"))
    assert not host.tier.is_usable()
    host.tier.breaker.succeed()
    host.perform(host.invalidator.deliver())
    assert kinds(host) == [(b"key", KEY)] * 3
    assert RAISE is not TOMBSTONE
