"""What lies under a key in Redis: every branch of every script, against a real server."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

import pytest
from redis_servers import RedisServer

from llm_edge_cache.redis_client import LuaScript, RedisClient, Script, parse_redis_url
from llm_edge_cache.redis_records import (
    CLAIM,
    HEADER_BYTES,
    IDENTITY_BYTES,
    NO_ID,
    RAISE,
    RELEASE,
    RENEW,
    TOMBSTONE,
    WRITE,
    pack_id,
    parse_value,
    stream_id,
    text_of_id,
)

ME, OTHER = b"1" * 32, b"2" * 32
LONG = 9_000  # ms; a lease for longer is taken for a stranger's
ENTRY = b"\x11checksum an entry"
NO_GUARD = b"0" * 13


def at(number: int) -> bytes:
    """The id of a moment."""
    return text_of_id(number)


class Record:
    """One key of a real Redis."""

    def __init__(self, server: RedisServer) -> None:
        self.key = b"records:" + secrets.token_hex(6).encode()
        self._client = RedisClient(parse_redis_url(server.unix_url), operation_timeout=5.0)
        self._server = server

    def run(self, script: LuaScript, *args: Any) -> Any:
        return self._client.run(Script(script, self.key, args))

    def write(self, begin: int, *, lease: bytes = b"", life: int = LONG, entry: bytes = ENTRY) -> int:
        stored: int = self.run(WRITE, at(begin), lease, life, entry)
        return stored

    def claim(self, token: bytes = ME, *, lease: int = LONG, void: bytes = b"", stale: bytes = b"") -> Any:
        return self.run(CLAIM, token, lease, void or stale, b"stale" if stale else b"")

    def claim_stale(self, token: bytes = ME, *, lease: int = LONG) -> None:
        """Lease what is there and stale."""
        assert self.claim(token, lease=lease, stale=self.ask("GET")[:IDENTITY_BYTES]) == 1

    def tombstone(self, number: int, life: int = LONG) -> int:
        placed: int = self.run(TOMBSTONE, at(number), life)
        return placed

    def ask(self, *command: Any) -> Any:
        return self._server.ask(command[0], self.key, *command[1:])

    @property
    def kind(self) -> bytes:
        return (self.ask("GET") or b"-")[:1]

    @property
    def floor(self) -> bytes:
        return bytes(self.ask("GET")[1:17])

    @property
    def life(self) -> int:
        left: int = self.ask("PTTL")
        return left

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def record(redis_server: RedisServer) -> Iterator[Record]:
    made = Record(redis_server)
    yield made
    made.ask("DEL")
    made.close()


# ---- ids ----


def test_packed_ids_sort_like_stream_ids_and_come_back() -> None:
    ids = [b"0-1", b"5-0", b"5-1", b"5-9", b"5-10", b"1700000000000-0", b"1700000000000-1048575", b"1700000000001-0"]
    packed = [pack_id(identifier) for identifier in ids]
    assert packed == sorted(packed)
    assert [stream_id(number) for number in packed] == ids
    texts = [text_of_id(number) for number in packed]
    assert texts == sorted(texts)
    assert {len(text) for text in texts} == {16}


def test_a_sequence_number_beyond_the_last_counts_as_the_last() -> None:
    assert pack_id(b"5-1048576") == pack_id(b"5-1048575") < pack_id(b"6-0")


def test_an_id_fits_a_word_until_the_year_2248() -> None:
    assert pack_id(b"8796093022207-1048575") == 2**63 - 1


# ---- parsing ----


def test_a_value_is_parsed_into_when_it_began_and_its_entry() -> None:
    value = parse_value(b"V" + at(77) + NO_GUARD + ENTRY)
    assert value is not None
    assert value == (77, ENTRY)


LEASE = b"L" + at(1) + ME + b"0" * 13


@pytest.mark.parametrize("nothing", [None, b"X" + at(1), LEASE, LEASE + b"V" + at(1) + NO_GUARD + b"\n\x00"])
def test_tombstones_and_leases_are_no_values(nothing: bytes | None) -> None:
    assert parse_value(nothing) is None


@pytest.mark.parametrize("garbage", [b"", b"?", b"Vnot a number....", b"hello", LEASE + b"?"])
def test_what_is_none_of_ours_is_said_to_be(garbage: bytes) -> None:
    with pytest.raises(ValueError, match=r"unknown kind|invalid literal"):
        parse_value(garbage)


# ---- writing without a lease ----


def test_a_write_is_stored_where_nothing_is(record: Record) -> None:
    assert record.write(5, life=5000) == 1
    assert record.ask("GET") == b"V" + at(5) + NO_GUARD + ENTRY
    assert 0 < record.life <= 5000
    assert len(b"V" + at(5) + NO_GUARD) == HEADER_BYTES


@pytest.mark.parametrize(("begin", "stored"), [(6, 0), (7, 1), (8, 1)])
def test_a_tombstone_refuses_what_began_before_it(record: Record, begin: int, stored: int) -> None:
    record.tombstone(7)
    assert record.write(begin) == stored
    assert record.kind == (b"V" if stored else b"X")


@pytest.mark.parametrize(("begin", "stored"), [(6, 0), (7, 1), (8, 1)])
def test_a_value_refuses_what_began_before_it(record: Record, begin: int, stored: int) -> None:
    record.write(7)
    assert record.write(begin) == stored


@pytest.mark.parametrize(("begin", "stored"), [(6, 0), (7, 1)])
def test_a_lease_over_a_tombstone_refuses_what_began_before_that(record: Record, begin: int, stored: int) -> None:
    record.tombstone(7)
    assert record.claim() == 1
    assert record.write(begin) == stored


def test_a_value_keeps_refusing_as_long_as_the_tombstone_it_replaced_would_have(record: Record) -> None:
    record.tombstone(7, life=LONG)
    assert record.write(8, life=1) == 1
    time.sleep(0.005)
    assert 8_000 < record.life <= LONG
    assert record.write(6) == 0
    assert record.write(9, life=1) == 1  # and so does the next one
    time.sleep(0.005)
    assert record.write(8) == 0


def test_a_value_that_outlives_the_tombstone_lives_as_long_as_asked(record: Record) -> None:
    record.tombstone(7, life=50)
    record.write(8, life=5000)
    assert 4000 < record.life <= 5000


@pytest.mark.parametrize("stranger", [b"", b"garbage", b"Vshort"])
def test_a_strangers_string_is_overwritten(record: Record, stranger: bytes) -> None:
    record.ask("SET", stranger)
    assert record.write(1) == 1
    assert record.kind == b"V"


def test_a_strangers_list_is_replaced(record: Record) -> None:
    record.ask("RPUSH", "a", "b")
    assert record.write(1) == 1
    assert record.kind == b"V"


# ---- writing under a lease ----


def test_the_holder_of_a_lease_stores_and_its_begin_is_never_below_the_floor(record: Record) -> None:
    record.tombstone(7)
    record.claim(ME)
    assert record.write(3, lease=ME) == 1
    assert record.floor == at(7)


def test_another_token_is_refused(record: Record) -> None:
    record.claim(ME)
    assert record.write(9, lease=OTHER) == 0
    assert record.kind == b"L"


def test_a_lease_that_lapsed_is_refused(record: Record) -> None:
    record.claim(ME, lease=1)
    time.sleep(0.005)
    assert record.write(9, lease=ME) == 0


def test_a_lease_that_an_invalidation_took_is_refused(record: Record) -> None:
    record.claim(ME)
    record.tombstone(7)
    assert record.write(9, lease=ME) == 0


def test_a_lease_that_redis_lost_is_refused(record: Record) -> None:
    record.claim(ME)
    record.ask("DEL")
    assert record.write(9, lease=ME) == 0


# ---- claiming ----


def test_who_claims_first_has_the_lease_and_the_next_one_learns_for_how_long(record: Record) -> None:
    assert record.claim(ME, lease=5000) == 1
    assert -5000 <= record.claim(OTHER) < 0
    assert record.claim(ME, lease=5000) == 1
    assert record.life <= 5000


def test_a_value_is_handed_out_instead_of_a_lease(record: Record) -> None:
    record.write(5)
    assert record.claim() == record.ask("GET")


def test_a_lease_replaces_the_value_that_is_known_to_be_void_and_no_other(record: Record) -> None:
    record.write(5, entry=b"\x11checksum old")
    void = record.ask("GET")[:IDENTITY_BYTES]
    record.write(5, entry=b"\x11checksUm new")
    assert record.claim(void=void) == record.ask("GET")
    void = record.ask("GET")[:IDENTITY_BYTES]
    assert record.claim(void=void) == 1
    assert record.floor == at(5)


def test_a_lapsed_lease_is_taken_over(record: Record) -> None:
    record.tombstone(7)
    record.claim(OTHER, lease=1)
    time.sleep(0.005)
    assert record.claim(ME) == 1
    assert record.floor == at(7)


def test_a_lease_keeps_the_tombstones_life(record: Record) -> None:
    record.tombstone(7, life=LONG)
    record.claim(ME, lease=10)
    assert 8_000 < record.life <= LONG
    time.sleep(0.015)
    assert record.write(6) == 0


def test_a_lease_over_a_value_keeps_what_the_value_kept(record: Record) -> None:
    record.tombstone(7, life=LONG)
    record.write(8)
    record.claim(ME, lease=10, void=record.ask("GET")[:IDENTITY_BYTES])
    assert 8_000 < record.life <= LONG


# ---- a stale value behind a lease ----


@pytest.fixture
def stale(record: Record) -> bytes:
    """The record of a value that began at 8, under a tombstone of 7."""
    record.tombstone(7, life=LONG)
    record.write(8, life=1000)
    return bytes(record.ask("GET"))


def test_a_stale_value_stays_behind_the_lease_and_whoever_waits_gets_it_once(record: Record, stale: bytes) -> None:
    record.claim_stale(lease=5000)
    left, behind = record.claim(OTHER)
    assert -5000 <= left < 0
    assert behind == stale
    assert -5000 <= record.claim(OTHER, stale=behind[:IDENTITY_BYTES]) < 0
    assert (record.floor, parse_value(record.ask("GET"))) == (at(8), None)


def test_a_lease_that_is_given_up_leaves_the_stale_value_as_it_was(record: Record, stale: bytes) -> None:
    before = record.life
    record.claim_stale()
    assert record.run(RENEW, ME, LONG) == 1
    assert record.run(RELEASE, ME) == 1
    assert record.ask("GET") == stale
    assert before - 5000 < record.life <= LONG


def test_a_lapsed_lease_hands_the_stale_value_on(record: Record, stale: bytes) -> None:
    record.claim_stale(OTHER, lease=1)
    time.sleep(0.005)
    assert record.claim() == stale
    assert record.claim(stale=stale[:IDENTITY_BYTES]) == 1
    assert record.run(RELEASE, ME) == 1
    assert record.ask("GET") == stale


def test_a_value_behind_a_lapsed_lease_that_is_void_goes(record: Record, stale: bytes) -> None:
    record.claim_stale(OTHER, lease=1)
    time.sleep(0.005)
    assert record.claim(void=stale[:IDENTITY_BYTES]) == 1
    assert record.run(RELEASE, ME) == 1
    assert record.kind == b"X"


def test_an_invalidation_takes_the_value_behind_a_lease_too(record: Record, stale: bytes) -> None:
    record.claim_stale()
    assert record.tombstone(9) == 1
    assert record.ask("GET") == b"X" + at(9)
    assert record.run(RELEASE, ME) == 0


def test_an_older_tombstone_leaves_the_value_behind_a_lease_which_then_refuses_in_its_place(record: Record) -> None:
    record.write(8, life=1000)
    record.claim_stale()
    assert record.tombstone(7, life=LONG) == 0
    assert record.run(RELEASE, ME) == 1
    assert parse_value(record.ask("GET")) == (8, ENTRY)
    assert 8_000 < record.life <= LONG
    record.write(8, life=1)
    time.sleep(0.005)
    assert record.write(6) == 0


@pytest.mark.parametrize("lease", [b"", ME])
def test_what_replaces_a_lease_goes_on_refusing_what_the_value_behind_it_refused(
    record: Record, stale: bytes, lease: bytes
) -> None:
    record.claim_stale()
    assert record.write(9, lease=lease, life=1) == 1
    assert 8_000 < record.life <= LONG
    assert record.write(8) == 0


# ---- renewing and releasing ----


def test_the_holder_renews(record: Record) -> None:
    record.tombstone(7, life=1000)
    record.claim(ME, lease=100)
    assert record.run(RENEW, ME, LONG) == 1
    assert record.claim(OTHER) < -8_000
    assert record.floor == at(7)


@pytest.mark.parametrize("token", [OTHER, ME])
def test_nobody_else_renews_nor_what_lapsed(record: Record, token: bytes) -> None:
    record.claim(ME, lease=1)
    time.sleep(0.005)
    assert record.run(RENEW, token, LONG) == 0


def test_a_released_lease_is_gone(record: Record) -> None:
    record.claim(ME)
    assert record.run(RELEASE, ME) == 1
    assert record.ask("EXISTS") == 0


def test_a_released_lease_leaves_the_tombstone_that_it_replaced(record: Record) -> None:
    record.tombstone(7, life=LONG)
    record.claim(ME)
    assert record.run(RELEASE, ME) == 1
    assert record.ask("GET") == b"X" + at(7)
    assert 8_000 < record.life <= LONG


def test_what_is_not_the_callers_is_not_released(record: Record) -> None:
    assert record.run(RELEASE, ME) == 0
    record.claim(OTHER)
    assert record.run(RELEASE, ME) == 0
    record.write(5)
    assert record.run(RELEASE, ME) == 0
    assert record.kind == b"V"


# ---- tombstones ----


def test_a_tombstone_replaces_what_began_before_it(record: Record) -> None:
    record.write(5)
    assert record.tombstone(7) == 1
    assert record.ask("GET") == b"X" + at(7)


def test_a_tombstone_replaces_an_older_one_and_a_lease(record: Record) -> None:
    assert record.tombstone(5) == 1
    record.claim()
    assert record.tombstone(7) == 1
    assert record.kind == b"X"


def test_a_tombstone_leaves_a_later_value_which_then_refuses_in_its_place(record: Record) -> None:
    record.write(8, life=1000)
    assert record.tombstone(7, life=LONG) == 0
    assert parse_value(record.ask("GET")) == (8, ENTRY)
    assert 8_000 < record.life <= LONG
    record.write(8, life=1)
    time.sleep(0.005)
    assert record.write(6) == 0


def test_a_tombstone_leaves_a_later_lease(record: Record) -> None:
    record.tombstone(8)
    record.claim(ME)
    assert record.tombstone(7, life=2 * LONG) == 0
    assert record.kind == b"L"
    assert record.life > LONG


# ---- ids that only grow ----


def test_an_id_is_raised_and_never_lowered(record: Record) -> None:
    assert record.run(RAISE, at(5), LONG) == at(5)
    assert record.run(RAISE, at(4), LONG) == at(5)
    assert record.run(RAISE, at(6), LONG) == at(6)
    assert record.ask("GET") == at(6)


def test_an_ids_life_is_prolonged_and_never_shortened(record: Record) -> None:
    record.run(RAISE, at(5), LONG)
    record.run(RAISE, at(6), 10)
    assert 8_000 < record.life <= LONG


def test_an_id_without_end_stays(record: Record) -> None:
    record.run(RAISE, at(5), 0)
    assert record.life == -1


@pytest.mark.parametrize("stranger", [b"", b"zzz", b"longer than sixteen digits"])
def test_an_id_that_is_none_is_replaced(record: Record, stranger: bytes) -> None:
    record.ask("SET", stranger)
    assert record.run(RAISE, at(5), LONG) == at(5)


def test_an_id_in_a_strangers_list_is_replaced(record: Record) -> None:
    record.ask("RPUSH", "a")
    assert record.run(RAISE, at(5), LONG) == at(5)


def test_no_id_is_below_every_other() -> None:
    assert at(1) > NO_ID
