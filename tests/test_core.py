"""L1's decisions: what is a hit, how long a value lives where, what a promotion keeps, what is refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer

from llm_edge_cache import CachedResponse, L1Config, L2Config, SharedSlab
from llm_edge_cache.codec import Entry, EntryCodec
from llm_edge_cache.core import Core, Lives, Look
from llm_edge_cache.deferred import write_all
from llm_edge_cache.invalidation import tag_hash
from llm_edge_cache.lookup import L1Hit, L2Hit, Miss
from llm_edge_cache.redis_tier import Found, RedisTier
from llm_edge_cache.regions import Counter, Word

KEY = key_of()
ANSWER = Entry(CachedResponse("42", "model"))
LIVES = Lives(60, 60, 60, 60)
LONG_AGO = 1


def core(slab: SharedSlab, l1: L1Config | None = None, l2: L2Config | None = None) -> Core:
    codec = EntryCodec()
    return Core(slab, l1 or L1Config(), l2, None if l2 is None else RedisTier(slab, l2, codec), codec)


@pytest.fixture
def host(redis_server: RedisServer) -> Iterator[HostParts]:
    with hosts(redis_server) as (made,):
        yield made


def look(made: Core) -> Look:
    found = made.look(KEY)
    assert isinstance(found, Look)
    return found


def keep(made: Core, entry: Entry = ANSWER, lives: Lives = LIVES, tags: tuple[str, ...] = (), **more: Any) -> Any:
    return made.keep(KEY, made.begin(KEY), entry, lives, tags, **more)


# ---- looking ----


def test_what_was_kept_is_a_hit(slab: SharedSlab) -> None:
    made = core(slab)
    assert keep(made) == (True, None)
    found = made.look(KEY)
    assert isinstance(found, L1Hit)
    assert found.response.content == "42"
    assert found.response.cached_at == pytest.approx(time.time(), abs=60)


def test_a_stale_entry_is_no_hit_but_handed_on(slab: SharedSlab) -> None:
    made = core(slab)
    keep(made, lives=Lives(60, 60, 0.001, 0.001))
    time.sleep(0.002)
    found = look(made)
    assert found.entry is not None
    assert not found.is_unverified
    assert made.peek(KEY)[0] is None


def test_an_entry_is_void_once_its_tag_is_raised_stale_or_not(slab: SharedSlab) -> None:
    for lives in (LIVES, Lives(60, 60, 0.001, 0.001)):
        made = core(slab)
        keep(made, lives=lives, tags=("t", "u"))
        from_before = made.begin(KEY)
        slab._tag_raise(tag_hash("u"), slab._word_add(Word.TAG_EPOCH, 1))
        time.sleep(0.002)
        assert look(made).entry is None
        assert made.peek(KEY)[1].entry is None
        assert made.has_overtaken(from_before, KEY, ("u",))
        assert not made.has_overtaken(from_before, KEY, ("t",))


def test_a_negative_entry_is_an_answer_without_a_response(slab: SharedSlab) -> None:
    made = core(slab)
    keep(made, Entry(CachedResponse("", ""), is_negative=True))
    assert made.look(KEY) is None


def test_bytes_that_are_no_entry_are_a_counted_miss_and_deleted(slab: SharedSlab) -> None:
    made = core(slab)
    slab.set(KEY, b"no entry of ours")
    look(made)
    assert KEY not in slab
    assert slab._counter_sums()[Counter.BAD_CONTENT] == 1


# ---- out of contact ----


def test_out_of_contact_an_entry_is_asked_for_in_redis_first(host: HostParts) -> None:
    keep(host.core)
    assert isinstance(host.core.look(KEY), L1Hit)
    host.slab._word_set(Word.CONTACT, LONG_AGO)
    found = look(host.core)
    assert found.is_unverified
    assert found.entry is not None
    assert host.count(Counter.UNVERIFIED) == 1
    assert isinstance(host.perform(host.core.lookup_l2(found)), Miss)  # Redis has none: it may be void


def test_out_of_contact_what_redis_confirms_is_served(host: HostParts) -> None:
    _, write = keep(host.core)
    send(host, write)
    host.slab._word_set(Word.CONTACT, LONG_AGO)
    assert isinstance(host.perform(host.core.lookup_l2(look(host.core))), L2Hit)


def test_an_unverified_entry_is_served_where_redis_does_not_answer(host: HostParts) -> None:
    keep(host.core)
    host.slab._word_set(Word.CONTACT, LONG_AGO)
    found = look(host.core)
    host.is_cut = True
    assert isinstance(host.perform(host.core.lookup_l2(found)), L1Hit)


def test_while_redis_is_known_to_be_away_l1_is_served_as_it_is(host: HostParts) -> None:
    keep(host.core)
    host.slab._word_set(Word.CONTACT, LONG_AGO)
    for _ in range(3):
        host.tier.breaker.fail(time.monotonic_ns())
    assert isinstance(host.core.look(KEY), L1Hit)


def test_a_stale_entry_is_not_handed_on_out_of_contact(host: HostParts) -> None:
    keep(host.core, lives=Lives(60, 60, 0.001, 0.001))
    host.slab._word_set(Word.CONTACT, LONG_AGO)
    time.sleep(0.002)
    assert look(host.core).entry is None
    assert host.core.peek(KEY)[1].entry is None


def test_without_redis_nothing_needs_to_be_verified(slab: SharedSlab) -> None:
    made = core(slab)
    keep(made)
    slab._word_set(Word.CONTACT, LONG_AGO)
    assert isinstance(made.look(KEY), L1Hit)


# ---- lives ----

TWO_TIERS = L2Config(ttl_seconds=3600)


@pytest.mark.parametrize(
    ("l1_ttl", "l2_ttl", "lives"),
    [
        (None, None, Lives(300, 3600, 3600, 3600)),
        (None, 2, Lives(2, 2, 2, 2)),  # short in both tiers
        (2, None, Lives(2, 3600, 3600, 3600)),
        (2, 2, Lives(2, 2, 2, 2)),
        (10, 2, Lives(10, 2, 10, 2)),
        (2, 10, Lives(2, 10, 10, 10)),
        (600, None, Lives(600, 3600, 3600, 3600)),
        (None, 7200, Lives(300, 7200, 7200, 7200)),
    ],
)
def test_lives_with_two_tiers(slab: SharedSlab, l1_ttl: float | None, l2_ttl: float | None, lives: Lives) -> None:
    assert core(slab, L1Config(ttl_seconds=300), TWO_TIERS).lives(l1_ttl, l2_ttl) == lives


@pytest.mark.parametrize(("l1_ttl", "in_l1"), [(None, 300), (2, 2), (600, 600)])
def test_lives_with_l1_alone(slab: SharedSlab, l1_ttl: float | None, in_l1: float) -> None:
    lives = core(slab, L1Config(ttl_seconds=300)).lives(l1_ttl, 2)
    assert (lives.l1, lives.valid_l1) == (in_l1, in_l1)


def test_without_a_configured_ttl_l1_keeps_what_is_valid(slab: SharedSlab) -> None:
    made = core(slab, L1Config(ttl_seconds=None), TWO_TIERS)
    assert made.lives(None, None) == Lives(3600, 3600, 3600, 3600)
    assert core(slab, L1Config(ttl_seconds=None)).lives(None, None).l1 is None


def test_jitter_shortens_all_and_staleness_prolongs_what_is_kept(slab: SharedSlab) -> None:
    made = core(slab, L1Config(ttl_seconds=300), TWO_TIERS)
    assert made.lives(None, 100, jitter=0.5) == Lives(50, 50, 50, 50)
    assert made.lives(None, 100, stale=10) == Lives(110, 110, 100, 100)
    assert made.lives(2, 100, stale=10) == Lives(2, 110, 100, 100)


# ---- promotion ----


def found(host: HostParts, entry: Entry) -> Found:
    data = host.codec.encode(entry)
    return Found(entry, data, b"", False)


@pytest.mark.parametrize("hops", [1, 3])
def test_a_promotion_keeps_the_remaining_life(host: HostParts, hops: int) -> None:
    expires_at = time.time() + 2
    for _ in range(hops):  # a fresh ttl at each would add up
        host.slab.delete(KEY)
        host.core.promote(look(host.core), found(host, Entry(ANSWER.response, expires_at)))
    left = host.slab.ttl(KEY)
    assert left is not None
    assert 0 < left <= 2
    entry, _ = host.core.peek(KEY)
    assert entry is not None
    assert entry.expires_at == expires_at


def test_a_promotion_lives_no_longer_than_l1_lets_it(host: HostParts) -> None:
    host.core.promote(look(host.core), found(host, Entry(ANSWER.response, time.time() + 3600)))
    left = host.slab.ttl(KEY)
    assert left is not None
    assert left <= 300


def test_what_expired_on_the_way_is_not_promoted(host: HostParts) -> None:
    host.core.promote(look(host.core), found(host, Entry(ANSWER.response, time.time() - 1)))
    assert KEY not in host.slab


def test_a_promotion_that_a_deletion_overtook_is_refused(host: HostParts) -> None:
    begun = look(host.core)
    host.slab.delete(KEY)
    host.core.promote(begun, found(host, ANSWER))
    assert KEY not in host.slab
    assert host.count(Counter.L1_FENCED) == 1


def test_a_promotion_that_a_tag_overtook_is_void(host: HostParts) -> None:
    begun = look(host.core)
    host.slab._tag_raise(tag_hash("t"), host.slab._word_add(Word.TAG_EPOCH, 1))
    host.core.promote(begun, found(host, Entry(ANSWER.response, None, {"t": 7})))
    assert look(host.core).entry is None


# ---- keeping ----


def send(host: HostParts, write: Any) -> None:
    host.perform(write_all(host.tier, host.slab, [write]))


def test_what_a_deletion_overtook_is_kept_nowhere(host: HostParts) -> None:
    begun = host.core.begin(KEY)
    host.slab.delete(KEY)
    assert host.core.keep(KEY, begun, ANSWER, LIVES, ()) == (False, None)
    assert host.count(Counter.L1_FENCED) == 1


def test_what_a_tag_overtook_is_kept_nowhere(host: HostParts) -> None:
    begun = host.core.begin(KEY)
    host.slab._tag_raise(tag_hash("t"), host.slab._word_add(Word.TAG_EPOCH, 1))
    assert host.core.keep(KEY, begun, ANSWER, LIVES, ("t",)) == (False, None)


def test_what_a_clear_overtook_is_kept_nowhere(host: HostParts) -> None:
    begun = host.core.begin(KEY)
    host.slab.clear()
    assert host.core.keep(KEY, begun, ANSWER, LIVES, ()) == (False, None)


def test_another_set_of_the_key_overtakes_nothing(host: HostParts) -> None:
    begun = host.core.begin(KEY)
    host.slab.set(KEY, b"newer")
    assert host.core.keep(KEY, begun, ANSWER, LIVES, ())[0]


def test_what_l1_cannot_hold_goes_to_redis_all_the_same(host: HostParts) -> None:
    large = Entry(CachedResponse("x" * (1 << 20), "model"))
    is_kept, write = keep(host.core, large)
    assert not is_kept
    assert write is not None
    assert host.count(Counter.L1_REFUSED) == 1


def test_the_copy_for_redis_says_how_long_it_is_valid_there_and_when_it_began(host: HostParts) -> None:
    _, write = keep(host.core, lives=Lives(10, 2, 10, 2), tags=("t",), lease=b"1" * 32)
    entry = host.codec.decode(write.data)
    assert entry.expires_at == pytest.approx(write.gone_at)
    assert entry.generations == {"t": host.word(Word.BEGIN)}
    assert (write.key, write.tags, write.lease) == (KEY, ("t",), b"1" * 32)
    local, _ = host.core.peek(KEY)
    assert local is not None
    assert local.expires_at == pytest.approx(entry.expires_at + 8, abs=1)
