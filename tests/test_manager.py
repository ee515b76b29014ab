"""The managers' own promises, in both faces: results, refusals, counts, lives, sizes, health, opening and closing."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from manager_faces import KINDS, Face, MiB, answer, ask
from redis_servers import RedisServer

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    CacheHealthStatus,
    L1Config,
    L1Hit,
    L2Hit,
    Miss,
    SharedSlab,
    SlabClosedError,
    SlabConfig,
    SlabConfigError,
    TokenUsage,
)
from llm_edge_cache.keys import tier_key
from llm_edge_cache.regions import Counter

NOWHERE = "unix:///nonexistent/redis.sock"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def cache(kind: str, name: str) -> Iterator[Face]:
    """L1 alone."""
    with Face(kind, name) as face:
        yield face
        assert face.slab.closed or face.slab.check() == []


@pytest.fixture
def prefix() -> str:
    return f"manager-{secrets.token_hex(4)}:"


@pytest.fixture
def both(kind: str, name: str, prefix: str, redis_server: RedisServer) -> Iterator[Face]:
    """Both tiers, with time enough for a busy machine."""
    with Face(kind, name, redis_server.unix_url, key_prefix=prefix) as face:
        yield face


def counted(face: Face, act: Callable[[], object]) -> dict[str, int]:
    """Return by how much the counts moved, those that did."""
    before = face.metrics_snapshot()
    act()
    after = face.metrics_snapshot()
    moved = {field: getattr(after, field) - getattr(before, field) for field in after.__struct_fields__}
    return {field: by for field, by in moved.items() if by}


# ---- what lookup and store answer ----


def test_what_is_not_there_is_a_miss(cache: Face) -> None:
    found = cache.lookup(ask("x"))
    assert isinstance(found, Miss)
    assert (found.is_hit, found.tier, found.response) == (False, None, None)


def test_what_was_stored_is_a_hit_as_it_was(cache: Face) -> None:
    response = CachedResponse(
        "Paris", "gpt-4o", TokenUsage(9, 1, 10), raw={"id": [1, None]}, finish_reason="stop", metadata={"a": b"b"}
    )
    before = time.time()
    assert cache.store(ask("x"), response) is True
    found = cache.lookup(ask("x"))
    assert isinstance(found, L1Hit)
    assert (found.is_hit, found.tier) == (True, "l1")
    assert before <= found.response.cached_at <= time.time()
    for field in ("content", "model", "tokens", "raw", "finish_reason", "metadata"):
        assert getattr(found.response, field) == getattr(response, field)


def test_a_time_of_storing_that_the_caller_gave_is_kept(cache: Face) -> None:
    cache.store(ask("x"), CachedResponse("a", "m", cached_at=12.5))
    assert cache.lookup(ask("x")).response.cached_at == 12.5


def test_the_last_response_counts(cache: Face) -> None:
    for content in ("one", "two"):
        cache.store(ask("x"), CachedResponse(content, "m"))
    assert cache.lookup(ask("x")).response.content == "two"


def test_tenants_never_meet(cache: Face) -> None:
    cache.store(ask("x").with_namespace("a"), answer(ask("x")))
    assert not cache.lookup(ask("x").with_namespace("b")).is_hit
    assert not cache.lookup(ask("x")).is_hit


def test_a_value_too_large_is_not_stored_and_the_old_one_is_gone(cache: Face) -> None:
    cache.store(ask("x"), answer(ask("x")))
    assert cache.store(ask("x"), CachedResponse("x" * MiB, "m")) is False
    assert not cache.lookup(ask("x")).is_hit
    assert cache.count(Counter.L1_REFUSED) == 1


def test_what_was_only_in_redis_is_an_l2_hit_once_and_then_an_l1_hit(both: Face) -> None:
    both.put_in_redis(ask("x"))
    found = both.lookup(ask("x"))
    assert isinstance(found, L2Hit)
    assert (found.is_hit, found.tier, found.response.content) == (True, "l2", answer(ask("x")).content)
    assert isinstance(both.lookup(ask("x")), L1Hit)


def test_a_response_to_a_request_that_was_invalidated_since_its_miss_is_refused(cache: Face) -> None:
    request = ask("x")
    cache.lookup(request)
    cache.invalidate(ask("x"))
    assert cache.store(request, answer(request)) is False
    assert cache.store(request, answer(request)) is True  # this one is new


def test_what_is_in_l1_that_is_no_entry_is_a_miss_that_is_counted_and_deleted(cache: Face) -> None:
    cache.slab.set(tier_key(ask("x")), b"garbage")
    assert not cache.lookup(ask("x")).is_hit
    assert cache.count(Counter.BAD_CONTENT) == 1
    assert cache.l1_entry_count() == 0


def test_compressed_entries_are_read_by_every_manager(kind: str, name: str) -> None:
    pytest.importorskip("backports.zstd" if not _has_zstd() else "compression.zstd")
    with Face(kind, name, NOWHERE, compress_above=100) as packer, Face(kind, name) as reader:
        packer.store(ask("x"), CachedResponse("ab" * 1000, "m"))
        assert packer.slab.stats().payload_bytes < 500
        for face in (packer, reader):
            assert face.lookup(ask("x")).response.content == "ab" * 1000


def _has_zstd() -> bool:
    try:
        __import__("compression.zstd")
    except ImportError:
        return False
    return True


# ---- what is refused ----


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["l1_ttl", "l2_ttl"])
def test_a_life_that_is_none_is_refused_by_name(cache: Face, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        cache.store(ask("x"), answer(ask("x")), **{field: value})
    with pytest.raises(ValueError, match=field):
        cache.get_or_compute(ask("x"), lambda: answer(ask("x")), **{field: value})
    assert cache.l1_entry_count() == 0


@pytest.mark.parametrize("value", ["1", True, [1]])
def test_a_life_of_a_wrong_type_is_refused(cache: Face, value: object) -> None:
    with pytest.raises(TypeError, match="l1_ttl"):
        cache.store(ask("x"), answer(ask("x")), l1_ttl=value)
    with pytest.raises(TypeError, match="ttl"):
        cache.store_with_ttl(ask("x"), answer(ask("x")), value)


@pytest.mark.parametrize("tags", ["geography", b"geography", [1], [None], ["a", 2]])
def test_tags_are_strings_in_a_list_and_not_one_string(cache: Face, tags: object) -> None:
    with pytest.raises(TypeError, match="tags"):
        cache.store(ask("x"), answer(ask("x")), tags=tags)
    with pytest.raises(TypeError, match="tags"):
        cache.get_or_compute(ask("x"), lambda: answer(ask("x")), tags=tags)
    assert cache.l1_entry_count() == 0


@pytest.mark.parametrize("tag", [None, 1, b"geography", ["geography"]])
def test_a_tag_to_invalidate_is_a_string(cache: Face, tag: object) -> None:
    with pytest.raises(TypeError, match="tag"):
        cache.invalidate_tag(tag)


@pytest.mark.parametrize("request_", ["prompt", None, {"model": "m"}])
def test_only_a_request_is_one(cache: Face, request_: object) -> None:
    for act in (
        lambda: cache.lookup(request_),
        lambda: cache.store(request_, answer(ask("x"))),
        lambda: cache.get_or_compute(request_, lambda: answer(ask("x"))),
        lambda: cache.invalidate(request_),
    ):
        with pytest.raises(TypeError, match="CacheableRequest"):
            act()


@pytest.mark.parametrize("response", ["text", None, {"content": "a"}])
def test_only_a_response_is_one(cache: Face, response: object) -> None:
    with pytest.raises(TypeError, match="CachedResponse"):
        cache.store(ask("x"), response)
    with pytest.raises(TypeError, match="CachedResponse"):
        cache.get_or_compute(ask("x"), lambda: response)
    assert not cache.lookup(ask("x")).is_hit


@pytest.mark.parametrize(
    ("option", "value"),
    [("stale_while_revalidate", -1), ("stale_if_error", float("inf")), ("ttl_jitter", 1.5), ("negative_ttl", 0)],
)
def test_an_option_out_of_bounds_is_refused_by_name(cache: Face, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=option):
        cache.get_or_compute(ask("x"), lambda: answer(ask("x")), **{option: value})


def test_a_response_that_cannot_be_kept_is_an_error_of_the_caller(cache: Face) -> None:
    with pytest.raises(TypeError):
        cache.store(ask("x"), CachedResponse("a", "m", raw=object()))
    with pytest.raises(ValueError, match="cannot be kept"):
        cache.store(ask("x"), CachedResponse("a", "m", raw=2**70))


# ---- what is counted ----


def test_a_miss_a_write_and_a_hit_in_l1(cache: Face) -> None:
    assert counted(cache, lambda: cache.lookup(ask("x"))) == {"l1_misses": 1, "total_requests": 1}
    assert counted(cache, lambda: cache.store(ask("x"), answer(ask("x")))) == {"l1_writes": 1}
    assert counted(cache, lambda: cache.lookup(ask("x"))) == {"l1_hits": 1, "total_requests": 1}


def test_a_miss_in_both_tiers_counts_in_both(both: Face) -> None:
    moved = counted(both, lambda: both.lookup(ask("x")))
    assert moved == {"l1_misses": 1, "l2_misses": 1, "total_requests": 1}


def test_an_l2_hit_costs_one_l1_miss_one_l2_hit_and_one_l1_write(both: Face) -> None:
    both.put_in_redis(ask("x"))
    moved = counted(both, lambda: both.lookup(ask("x")))
    assert moved == {"l1_misses": 1, "l2_hits": 1, "l1_writes": 1, "total_requests": 1}


def test_so_does_one_of_get_or_compute(both: Face) -> None:
    both.put_in_redis(ask("x"))
    moved = counted(both, lambda: both.get_or_compute(ask("x"), _never))
    assert moved == {"l1_misses": 1, "l2_hits": 1, "l1_writes": 1, "total_requests": 1}


def test_a_computation_counts_as_a_miss_and_a_write_in_each_tier(both: Face) -> None:
    def act() -> None:
        both.get_or_compute(ask("x"), lambda: answer(ask("x")))
        both.flush()

    moved = counted(both, act)
    assert moved == {"l1_misses": 1, "l2_misses": 1, "l1_writes": 1, "l2_writes": 1, "total_requests": 1}
    assert both.count(Counter.COMPUTATIONS) == 1


def _never() -> CachedResponse:
    raise AssertionError("there is a value")


def test_an_unreachable_redis_is_neither_hit_nor_miss(kind: str, name: str) -> None:
    with Face(kind, name, NOWHERE) as face:
        assert counted(face, lambda: face.lookup(ask("x"))) == {"l1_misses": 1, "total_requests": 1}


def test_rates_are_shares_of_what_each_tier_was_asked(both: Face) -> None:
    empty = both.metrics_snapshot()
    assert (empty.l1_hit_rate, empty.l2_hit_rate, empty.overall_hit_rate) == (0.0, 0.0, 0.0)
    both.put_in_redis(ask("x"))
    for prompt in ("x", "x", "x", "y"):  # L2, L1, L1, nowhere
        both.lookup(ask(prompt))
    rates = both.metrics_snapshot()
    assert (rates.l1_hit_rate, rates.l2_hit_rate, rates.overall_hit_rate) == (0.5, 0.5, 0.75)
    assert rates.total_requests == 4


def test_what_a_hit_saved_is_counted(cache: Face) -> None:
    def compute() -> CachedResponse:
        time.sleep(0.02)
        return CachedResponse("a", "m", TokenUsage(7, 5, 12))

    for _ in range(3):
        cache.get_or_compute(ask("x"), compute)
    assert cache.count(Counter.PROMPT_TOKENS_SAVED) == 14
    assert cache.count(Counter.COMPLETION_TOKENS_SAVED) == 10
    assert cache.count(Counter.MICROSECONDS_SAVED) >= 2 * 20_000


# ---- how long values live ----


def test_a_short_life_is_short_in_l1(cache: Face) -> None:
    cache.store(ask("x"), answer(ask("x")), l1_ttl=0.1)
    time.sleep(0.12)
    assert not cache.lookup(ask("x")).is_hit


def test_a_short_life_in_redis_is_short_in_l1_too(both: Face) -> None:
    both.store(ask("x"), answer(ask("x")), l2_ttl=0.1)
    both.flush()
    time.sleep(0.12)
    assert not both.lookup(ask("x")).is_hit


def test_a_value_is_gone_from_both_tiers_at_its_time_however_it_was_promoted(both: Face) -> None:
    both.store_with_ttl(ask("x"), answer(ask("x")), 1.0)
    gone_at = time.monotonic() + 1.0
    both.flush()
    both.forget(ask("x"))
    assert both.lookup(ask("x")).tier in {"l2", None}  # None: a machine that took a second for this
    left = both.slab.ttl(tier_key(ask("x")))
    assert left is None or left <= 1.0
    time.sleep(max(0.0, gone_at - time.monotonic()) + 0.02)
    assert not both.lookup(ask("x")).is_hit
    both.forget(ask("x"))
    assert not both.lookup(ask("x")).is_hit


def test_an_l1_life_shorter_than_the_value_s_leaves_it_in_redis(both: Face) -> None:
    both.store(ask("x"), answer(ask("x")), l1_ttl=0.1)
    both.flush()
    time.sleep(0.12)
    assert both.lookup(ask("x")).tier == "l2"


def test_l1_keeps_a_value_for_its_configured_life_at_most(kind: str, name: str) -> None:
    with Face(kind, name, l1=L1Config(name=name, memory_bytes=4 * MiB, ttl_seconds=7)) as face:
        face.store(ask("x"), answer(ask("x")))
        left = face.slab.ttl(tier_key(ask("x")))
        assert 0 < left <= 7


def test_jitter_takes_off_and_never_adds(cache: Face) -> None:
    lives = []
    for number in range(30):
        request = ask(str(number))
        cache.get_or_compute(request, lambda: answer(ask("x")), l1_ttl=100, ttl_jitter=0.5)
        lives.append(cache.slab.ttl(tier_key(request)))
    assert all(49 < life <= 100 for life in lives)
    assert max(lives) - min(lives) > 1


# ---- get_or_compute ----


def test_a_value_is_computed_once(cache: Face) -> None:
    calls: list[int] = []

    def compute() -> CachedResponse:
        calls.append(1)
        return answer(ask("x"))

    for _ in range(3):
        assert cache.get_or_compute(ask("x"), compute).content == answer(ask("x")).content
    assert len(calls) == 1


def test_a_failure_is_the_caller_s_and_is_not_kept(cache: Face) -> None:
    def fail() -> CachedResponse:
        raise ZeroDivisionError("not this time")

    with pytest.raises(ZeroDivisionError, match="not this time"):
        cache.get_or_compute(ask("x"), fail)
    assert cache.get_or_compute(ask("x"), lambda: answer(ask("x"))).content == answer(ask("x")).content


def test_that_there_is_no_answer_is_kept_when_asked_for(cache: Face) -> None:
    calls: list[int] = []

    def nothing() -> None:
        calls.append(1)

    for _ in range(3):
        assert cache.get_or_compute(ask("x"), nothing, negative_ttl=60) is None
    assert len(calls) == 1
    assert isinstance(cache.lookup(ask("x")), Miss)
    assert cache.get_or_compute(ask("y"), nothing, negative_ttl=0.2) is None
    time.sleep(0.22)
    assert cache.get_or_compute(ask("y"), lambda: answer(ask("y"))) is not None


def test_a_stale_value_is_served_while_it_is_computed_anew(cache: Face) -> None:
    cache.get_or_compute(ask("x"), lambda: CachedResponse("old", "m"), l1_ttl=0.1, stale_while_revalidate=30)
    time.sleep(0.12)

    def fetch() -> Any:
        return cache.get_or_compute(ask("x"), lambda: CachedResponse("new", "m"), stale_while_revalidate=30)

    assert fetch().content == "old"
    deadline = time.monotonic() + 20
    while fetch().content == "old":
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert cache.count(Counter.STALE_REVALIDATE) >= 1


def test_a_stale_value_is_served_in_place_of_an_error_for_so_long(cache: Face) -> None:
    def fail() -> CachedResponse:
        raise ZeroDivisionError

    cache.get_or_compute(ask("x"), lambda: CachedResponse("old", "m"), l1_ttl=0.1, stale_if_error=0.5)
    stored_at = time.monotonic()
    time.sleep(0.12)
    try:
        assert cache.get_or_compute(ask("x"), fail, stale_if_error=0.5).content == "old"
        assert cache.count(Counter.STALE_ERROR) == 1
    except ZeroDivisionError:  # a machine that took half a second for this
        assert time.monotonic() - stored_at > 0.5
    time.sleep(max(0.0, stored_at + 0.62 - time.monotonic()))
    with pytest.raises(ZeroDivisionError):
        cache.get_or_compute(ask("x"), fail, stale_if_error=0.5)


def test_a_stale_value_is_a_miss_to_who_did_not_ask_for_it(cache: Face) -> None:
    cache.get_or_compute(ask("x"), lambda: CachedResponse("old", "m"), l1_ttl=0.1, stale_if_error=30)
    time.sleep(0.12)
    assert not cache.lookup(ask("x")).is_hit
    assert cache.get_or_compute(ask("x"), lambda: CachedResponse("new", "m")).content == "new"


# ---- invalidation ----


def test_what_was_invalidated_is_gone_and_others_stay(both: Face) -> None:
    for prompt in ("x", "y"):
        both.store(ask(prompt), answer(ask(prompt)))
    both.flush()
    both.invalidate(ask("x"))
    assert not both.lookup(ask("x")).is_hit
    both.forget(ask("y"))
    assert both.lookup(ask("y")).tier == "l2"


def test_a_tag_takes_all_that_bear_it_and_no_others(both: Face) -> None:
    both.store(ask("x"), answer(ask("x")), tags=["cities", "europe"])
    both.store(ask("y"), answer(ask("y")), tags=("europe",))
    both.store(ask("z"), answer(ask("z")), tags={"asia"})
    both.flush()
    both.invalidate_tag("europe")
    for request in (ask("x"), ask("y")):
        assert not both.lookup(request).is_hit
    both.forget(ask("z"))
    assert both.lookup(ask("z")).tier == "l2"
    both.store(ask("x"), answer(ask("x")), tags=["europe"])
    assert both.lookup(ask("x")).is_hit


def test_clear_all_takes_all(both: Face) -> None:
    for prompt in ("x", "y"):
        both.store(ask(prompt), answer(ask(prompt)))
    both.flush()
    both.clear_all()
    assert both.l1_entry_count() == 0
    assert not any(both.lookup(ask(prompt)).is_hit for prompt in ("x", "y"))
    both.store(ask("x"), answer(ask("x")))
    assert both.lookup(ask("x")).is_hit


def test_invalidating_works_without_redis(cache: Face) -> None:
    cache.store(ask("x"), answer(ask("x")), tags=["t"])
    cache.invalidate_tag("t")
    assert not cache.lookup(ask("x")).is_hit
    cache.store(ask("x"), answer(ask("x")))
    cache.invalidate(ask("x"))
    assert not cache.lookup(ask("x")).is_hit
    cache.store(ask("x"), answer(ask("x")))
    cache.clear_all()
    assert not cache.lookup(ask("x")).is_hit


# ---- sizes, health ----


def test_sizes_are_what_is_stored(both: Face) -> None:
    assert (both.l1_entry_count(), both.l2_approximate_size()) == (0, 0)
    for number in range(20):
        both.store(ask(str(number)), answer(ask("x")))
    both.flush()
    assert (both.l1_entry_count(), both.l2_approximate_size()) == (20, 20)
    both.invalidate(ask("0"))
    assert (both.l1_entry_count(), both.l2_approximate_size()) == (19, 19)
    both.clear_all()
    assert (both.l1_entry_count(), both.l2_approximate_size()) == (0, 0)


def test_without_redis_its_size_is_0_and_there_is_none(cache: Face) -> None:
    assert cache.l2_approximate_size() == 0
    assert cache.has_l2 is False


def test_health_with_l1_alone_is_full(cache: Face) -> None:
    status = cache.health_check()
    assert status == CacheHealthStatus(l1_healthy=True, l2_healthy=False, l2_configured=False)
    assert status.is_fully_healthy


def test_health_with_both_tiers(both: Face) -> None:
    status = both.health_check()
    assert status == CacheHealthStatus(l1_healthy=True, l2_healthy=True, l2_configured=True)
    assert status.is_fully_healthy
    assert both.has_l2 is True


def test_health_without_the_redis_that_was_configured(kind: str, name: str) -> None:
    with Face(kind, name, NOWHERE) as face:
        status = face.health_check()
        assert status == CacheHealthStatus(l1_healthy=True, l2_healthy=False, l2_configured=True)
        assert not status.is_fully_healthy


def test_health_after_the_slab_was_unlinked(cache: Face) -> None:
    cache.slab.unlink()
    status = cache.health_check()
    assert not status.l1_healthy
    assert not status.is_fully_healthy


# ---- opening and closing ----


def test_it_works_without_open(kind: str, name: str, prefix: str, redis_server: RedisServer) -> None:
    face = Face(kind, name, redis_server.unix_url, key_prefix=prefix)
    assert not face.lookup(ask("x")).is_hit
    face.put_in_redis(ask("x"))
    assert face.lookup(ask("x")).tier == "l2"
    face.cache.close()


def test_the_slab_stays_warm_after_close(kind: str, name: str) -> None:
    with Face(kind, name) as face:
        face.store(ask("x"), answer(ask("x")))
    with Face(kind, name) as face:
        assert face.lookup(ask("x")).tier == "l1"
        assert face.metrics_snapshot().l1_writes == 1


def test_a_closed_one_refuses_and_may_be_closed_again(name: str) -> None:
    face = Face("threads", name)
    for _ in range(2):
        face.cache.close()
    with pytest.raises(SlabClosedError):
        face.lookup(ask("x"))


def test_a_slab_that_was_given_stays_open(kind: str, slab: SharedSlab) -> None:
    with Face(kind, slab.name, slab=slab) as face:
        face.store(ask("x"), answer(ask("x")))
        assert face.slab is slab
    assert not slab.closed
    assert len(slab) == 1


def test_two_managers_on_one_slab_are_one_cache(name: str) -> None:
    with Face("threads", name) as one, Face("asyncio", name) as other:
        one.store(ask("x"), answer(ask("x")), tags=["t"])
        assert other.lookup(ask("x")).tier == "l1"
        assert one.metrics_snapshot() == other.metrics_snapshot()
        other.invalidate_tag("t")
        assert not one.lookup(ask("x")).is_hit


def test_a_configuration_that_says_nothing_of_size_takes_what_is_live(kind: str, name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=8 * MiB, max_entries=77)):
        with Face(kind, name, l1=L1Config(name=name)) as face:
            assert face.slab.config.max_entries == 77
        with Face(kind, name, l1=L1Config(name=name, max_capacity=77, memory_bytes=8 * MiB, ttl_seconds=9)) as face:
            assert face.slab.config.memory_bytes == 8 * MiB


def test_one_that_differs_in_size_is_an_error_while_the_slab_is_used(name: str) -> None:
    with SharedSlab(name, SlabConfig(memory_bytes=8 * MiB, max_entries=77)), pytest.raises(SlabConfigError, match="77"):
        Face("threads", name, l1=L1Config(name=name, max_capacity=78, memory_bytes=8 * MiB))


def test_requests_are_not_changed_by_the_cache(cache: Face) -> None:
    request = CacheableRequest("m", messages=[{"role": "user", "content": "x"}], parameters={"seed": 1})
    cache.lookup(request)
    cache.store(request, answer(ask("x")))
    assert request == CacheableRequest("m", messages=[{"role": "user", "content": "x"}], parameters={"seed": 1})


@pytest.mark.parametrize("has_looked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_before_anything_was_opened_is_there_for_other_hosts(
    name: str, redis_server: RedisServer, kind: str, has_looked: bool
) -> None:
    face = Face(kind, name, redis_server.url, key_prefix=f"{name}:")
    if has_looked:
        assert not face.lookup(ask("first")).is_hit
    face.store(ask("first"), answer(ask("first")))
    face.cache.close()
    with Face(kind, f"{name}-other", redis_server.url, key_prefix=f"{name}:") as other:
        assert other.lookup(ask("first")).is_hit
        other.slab.unlink()
