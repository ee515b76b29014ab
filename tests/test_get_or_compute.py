"""What get_or_compute() may be told: stale answers, lives, negative results, how long to wait."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from callers import (
    FACES,
    LIVENESS,
    Face,
    Outcome,
    Provider,
    crew,
    make_face,
    outcome_of,
    request,
    wait_joined,
    wait_until,
)
from redis_servers import RedisServer

from llm_edge_cache import CachedResponse, L1Config, L2Config
from llm_edge_cache.codec import EntryCodec
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter

MiB = 1 << 20
SOON = 0.05  # seconds; a ttl whose end a test waits for
STALE = {"l1_ttl": SOON, "l2_ttl": SOON}


@pytest.fixture(params=FACES)
def kind(request: pytest.FixtureRequest) -> str:
    """Which face."""
    return str(request.param)


@pytest.fixture
def l1(name: str) -> L1Config:
    """A tier of its own."""
    return L1Config(name=name, memory_bytes=4 * MiB)


@pytest.fixture
def l2(redis_server: RedisServer) -> L2Config:
    """A prefix of its own in the shared Redis."""
    return L2Config(redis_server.unix_url, key_prefix=f"{secrets.token_hex(4)}:", operation_timeout_ms=10_000)


@pytest.fixture
def face(kind: str, l1: L1Config) -> Iterator[Face]:
    """A manager without Redis."""
    made = make_face(kind, l1)
    yield made
    made.close()


@pytest.fixture
def tiered(kind: str, l1: L1Config, l2: L2Config) -> Iterator[Face]:
    """A manager with Redis."""
    made = make_face(kind, l1, l2)
    yield made
    made.close()


@pytest.fixture
def old(tmp_path: Path) -> Provider:
    """What answers at first."""
    return Provider(tmp_path / "old", content="old")


@pytest.fixture
def new(tmp_path: Path) -> Provider:
    """What answers later, once it is opened."""
    return Provider(tmp_path / "new", content="new", gate=tmp_path / "gate")


def ask(face: Face, provider: Provider, **options: Any) -> Outcome:
    return outcome_of(face.start(provider, **options))


def counted(face: Face, counter: Counter) -> int:
    return face.manager.slab._counter_sums()[counter]


def wait_fresh(face: Face) -> None:
    wait_until(lambda: face.do("lookup", request()).is_hit, "the new answer is stored")


def forget_in_l1(face: Face) -> None:
    face.manager.slab.clear()


# ---- stale while it is computed anew ----


def test_a_stale_answer_is_given_at_once_while_one_call_computes_it_anew(
    face: Face, old: Provider, new: Provider
) -> None:
    options = {"stale_while_revalidate": 60.0}  # the new answer lives long
    ask(face, old, l1_ttl=SOON, **options)
    time.sleep(1.5 * SOON)
    assert [ask(face, new, **options).content for _ in range(5)] == ["old"] * 5  # the provider is shut
    new.wait_called()
    new.open()
    wait_fresh(face)
    assert ask(face, new, **options).content == "new"
    assert (len(old.calls()), len(new.calls())) == (1, 1)
    assert counted(face, Counter.STALE_REVALIDATE) == 5


def test_all_processes_revalidate_once(kind: str, l1: L1Config, old: Provider, new: Provider) -> None:
    options = {"stale_while_revalidate": 60.0}
    with crew(kind, 3, l1) as workers:
        workers[0].call(old, l1_ttl=SOON, **options).result(LIVENESS)
        time.sleep(1.5 * SOON)
        calls = [worker.call(new, callers=5, **options) for worker in workers]
        assert {outcome.content for call in calls for outcome in call.result(LIVENESS)} == {"old"}
        new.open()
        for worker in workers:
            wait_until(lambda worker=worker: worker.do("lookup", request()).is_hit, "it is fresh")  # type: ignore[misc]
    assert len(new.calls()) == 1


def test_too_stale_an_answer_is_waited_for(face: Face, old: Provider, new: Provider) -> None:
    ask(face, old, l1_ttl=SOON, stale_while_revalidate=60.0)
    time.sleep(3 * SOON)
    new.open()
    assert ask(face, new, stale_while_revalidate=SOON).content == "new"


def test_a_revalidation_that_fails_leaves_the_stale_answer(face: Face, old: Provider, new: Provider) -> None:
    options = {"l1_ttl": SOON, "stale_while_revalidate": 60.0}
    failing = new._replace(error="no credit")
    failing.open()
    ask(face, old, **options)
    time.sleep(1.5 * SOON)
    assert ask(face, failing, **options).content == "old"
    wait_until(lambda: counted(face, Counter.COMPUTE_ERRORS) == 1, "the revalidation fails")
    assert ask(face, failing, **options).content == "old"


def test_a_stale_answer_that_only_redis_has_is_given_at_once_too(tiered: Face, old: Provider, new: Provider) -> None:
    options = {"stale_while_revalidate": 60.0}
    ask(tiered, old, **STALE, **options)
    wait_until(lambda: counted(tiered, Counter.L2_WRITES) == 1, "Redis has it")
    forget_in_l1(tiered)
    time.sleep(1.5 * SOON)
    assert [ask(tiered, new, **options).content for _ in range(3)] == ["old"] * 3
    new.wait_called()
    new.open()
    wait_fresh(tiered)
    wait_until(lambda: counted(tiered, Counter.L2_WRITES) == 2, "Redis has the new one")
    assert len(new.calls()) == 1


def test_an_invalidated_answer_is_never_given_as_a_stale_one(face: Face, old: Provider, new: Provider) -> None:
    options = {"l1_ttl": SOON, "stale_while_revalidate": 60.0, "stale_if_error": 60.0, "tags": ("news",)}
    ask(face, old, **options)
    face.do("invalidate_tag", "news")
    failing = new._replace(error="no credit")
    failing.open()
    assert ask(face, failing, **options).error == "ProviderError"


# ---- stale if the computation fails ----


def test_a_stale_answer_excuses_a_failure(face: Face, old: Provider, new: Provider) -> None:
    options = {"l1_ttl": SOON, "stale_if_error": 60.0}
    failing = new._replace(error="no credit")
    failing.open()
    ask(face, old, **options)
    time.sleep(1.5 * SOON)
    assert [ask(face, failing, **options).content for _ in range(2)] == ["old"] * 2
    assert len(failing.calls()) == 2  # it was tried each time
    assert counted(face, Counter.STALE_ERROR) == 2
    assert ask(face, failing).error == "ProviderError"  # who does not want it does not get it


def test_it_excuses_the_failure_of_another_process(kind: str, l1: L1Config, old: Provider, new: Provider) -> None:
    options = {"l1_ttl": SOON, "stale_if_error": 60.0}
    failing = new._replace(error="no credit")
    with crew(kind, 2, l1) as workers:
        workers[0].call(old, **options).result(LIVENESS)
        time.sleep(1.5 * SOON)
        calls = [worker.call(failing, callers=3, **options) for worker in workers]
        failing.wait_called()
        wait_joined(workers, 6)
        failing.open()
        assert {outcome.content for call in calls for outcome in call.result(LIVENESS)} == {"old"}
    assert len(failing.calls()) == 1


def test_a_stale_answer_that_only_redis_has_excuses_every_failure(tiered: Face, old: Provider, new: Provider) -> None:
    options = {**STALE, "stale_if_error": 60.0}
    failing = new._replace(error="no credit")
    failing.open()
    ask(tiered, old, **options)
    wait_until(lambda: counted(tiered, Counter.L2_WRITES) == 1, "Redis has it")
    forget_in_l1(tiered)
    time.sleep(1.5 * SOON)
    assert [ask(tiered, failing, **options).content for _ in range(2)] == ["old"] * 2


# ---- lives ----


def test_jitter_takes_up_to_its_share_off_the_ttl(face: Face, old: Provider) -> None:
    for number in range(40):
        outcome_of(face.start(old, f"question {number}", l1_ttl=100.0, ttl_jitter=0.5))
    now = time.time()
    lives = [ends_at(face, f"question {number}") - now for number in range(40)]
    assert 49 < min(lives) <= max(lives) <= 100
    assert max(lives) - min(lives) > 10  # 40 draws from 50: less than once in 10**10


def ends_at(face: Face, name: str) -> float:
    data = face.manager.slab.get(tier_key(request(name)))
    assert data is not None
    ends = EntryCodec().unpack(data).expires_at
    assert ends is not None
    return ends


def test_that_there_is_no_answer_is_remembered_when_asked(face: Face, old: Provider) -> None:
    nothing = old._replace(content=None)
    for _ in range(3):
        assert ask(face, nothing, negative_ttl=60.0)[:2] == (None, None)
    assert len(nothing.calls()) == 1
    assert not face.do("lookup", request()).is_hit


def test_that_there_is_no_answer_is_forgotten_after_its_own_ttl(face: Face, old: Provider, new: Provider) -> None:
    ask(face, old._replace(content=None), negative_ttl=SOON)
    time.sleep(1.5 * SOON)
    new.open()
    assert ask(face, new, negative_ttl=SOON).content == "new"


def test_no_answer_is_an_error_when_nobody_said_what_to_do_with_it(face: Face, old: Provider) -> None:
    outcome = ask(face, old._replace(content=None))
    assert (outcome.error, outcome.text) == ("TypeError", "a response must be a CachedResponse, not NoneType")


# ---- misuse ----


@pytest.mark.parametrize("wrong", ["text", {"content": "x"}, 1])
def test_what_is_no_response_is_refused_and_not_stored(face: Face, wrong: object, old: Provider) -> None:
    outcome = ask(face, Wrong(old.log, content=wrong))  # type: ignore[arg-type]
    assert outcome.error == "TypeError"
    assert type(wrong).__name__ in outcome.text
    assert counted(face, Counter.COMPUTE_ERRORS) == 1
    assert ask(face, old).content == "old"


class Wrong(Provider):
    """A provider that gives what is no response."""

    def _answer(self) -> CachedResponse | None:
        return self.content  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("l1_ttl", 0, "ValueError"),
        ("l2_ttl", -1.0, "ValueError"),
        ("negative_ttl", math.nan, "ValueError"),
        ("l1_ttl", "60", "TypeError"),
        ("stale_while_revalidate", -1.0, "ValueError"),
        ("stale_if_error", math.inf, "ValueError"),
        ("ttl_jitter", 1.5, "ValueError"),
        ("timeout", math.nan, "ValueError"),
        ("timeout", "1", "TypeError"),
    ],
)
def test_options_out_of_bounds_are_refused_by_name(
    face: Face, old: Provider, option: str, value: object, error: str
) -> None:
    outcome = ask(face, old, **{option: value})
    assert outcome.error == error
    assert option in outcome.text
    assert old.calls() == []


# ---- how long to wait ----


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_who_has_no_time_is_not_kept_waiting(face: Face, new: Provider, timeout: float) -> None:
    leading = face.start(new)
    new.wait_called()
    assert ask(face, new, timeout=timeout).error == "TimeoutError"
    new.open()
    assert outcome_of(leading).content == "new"


@pytest.mark.parametrize("timeout", [1e300, math.inf])
def test_any_patience_is_allowed(face: Face, new: Provider, timeout: float) -> None:
    calls = [face.start(new, timeout=timeout) for _ in range(2)]
    new.wait_called()
    new.open()
    assert [outcome_of(call).content for call in calls] == ["new"] * 2


def test_an_answer_in_l1_needs_no_time(face: Face, old: Provider) -> None:
    ask(face, old)
    assert ask(face, old, timeout=0).content == "old"


def test_a_timeout_of_the_provider_is_its_own(face: Face, old: Provider) -> None:
    class Slow(Provider):
        def _answer(self) -> CachedResponse | None:
            raise TimeoutError("the provider's")

    assert ask(face, Slow(old.log), timeout=10.0).text == "the provider's"
