"""What a process does for the cache beside its requests."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest
from redis_servers import RedisServer

from llm_edge_cache import L1Config, L2Config, follower, upkeep
from llm_edge_cache.effects import Pause, Steps, perform
from llm_edge_cache.engine import Engine
from llm_edge_cache.flight import Lead, Running
from llm_edge_cache.redis_client import Call, RedisTrouble

MiB = 1 << 20
KEY = b"5" * 64


@pytest.fixture
def engine(redis_server: RedisServer, name: str) -> Iterator[Engine]:
    """A cache whose upkeep has not begun."""
    l2 = L2Config(redis_server.unix_url, key_prefix=f"{secrets.token_hex(4)}:", operation_timeout_ms=1000)
    made = Engine(L1Config(name=name, memory_bytes=4 * MiB), l2, None)
    yield made
    made.close()


def lead(engine: Engine) -> Lead:
    found = engine.flights.join(KEY)
    assert isinstance(found, Lead)
    return found


def test_opening_does_not_wait_for_news(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "BLOCK_MS", 2000)  # how long the first read of the stream waits
    engine.upkeep.start()
    assert engine.upkeep.wait_established(1.5)


def test_flights_are_renewed_between_the_steps_of_long_upkeep(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "_RENEWAL_NS", 1)

    def long_upkeep() -> Steps[None]:
        for _ in range(4):
            engine.slab._advance_clock(1.0)  # each within a term of 2 s, all together not
            yield Pause(0.001)

    mine = lead(engine)
    engine.upkeep._perform(long_upkeep())
    assert engine.flights.is_running(Running(mine.record, mine.token))


def test_steps_that_fail_meet_their_failure(engine: Engine) -> None:
    met = []

    def failing() -> Steps[str]:
        try:
            yield Call((b"NO-SUCH-COMMAND",))
        except RedisTrouble as trouble:
            met.append(trouble.reason)
        yield Pause(0.0)
        return "done"

    engine.upkeep._perform(failing())
    assert met == ["response"]


def test_leases_are_renewed_and_known_to_be(engine: Engine, redis_server: RedisServer) -> None:
    engine.open()
    assert engine.tier is not None
    mine = lead(engine)
    perform(engine.tier.claim(KEY, b"1" * 32), engine.world())
    redis_server.ask("PEXPIRE", engine.tier.names.value(KEY), 1500)
    mine.lease = b"1" * 32
    engine.upkeep._renew(10**9)
    assert redis_server.ask("PTTL", engine.tier.names.value(KEY)) > 1500
    assert mine.lease_until_ns == 3 * 10**9


def test_a_lease_that_was_lost_is_not_taken_for_renewed(engine: Engine) -> None:
    engine.open()
    mine = lead(engine)
    mine.lease = b"1" * 32
    engine.upkeep._renew(10**9)
    assert mine.lease_until_ns == 0


@pytest.mark.parametrize(
    ("record", "state"), [(b"V" + b"0" * 16 + b"x", "taken"), (b"X" + b"0" * 16, "taken"), (None, "gone")]
)
def test_what_became_of_a_lease_is_asked_of_redis(
    engine: Engine, redis_server: RedisServer, record: bytes | None, state: str
) -> None:
    engine.open()
    assert engine.tier is not None
    if record is not None:
        redis_server.ask("SET", engine.tier.names.value(KEY), record)
    assert perform(engine.tier.check_lease(KEY, b"1" * 32), engine.world()) == state


def test_a_lease_is_taken_for_held_while_redis_cannot_be_asked(engine: Engine) -> None:
    assert engine.tier is not None
    assert not engine.tier.is_usable()  # it was not opened
    assert perform(engine.tier.check_lease(KEY, b"1" * 32), engine.world()) == "held"
