"""Deferred writes: a bounded queue that counts what it drops, and batches of which each item is judged for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from redis_parts import HostParts, hosts, key_of
from redis_servers import RedisServer

from llm_edge_cache import CachedResponse, SharedSlab, SlabClosedError
from llm_edge_cache.codec import Entry
from llm_edge_cache.deferred import DeferredWrites, Item, Release, Write, write_all
from llm_edge_cache.redis_client import Call, Script
from llm_edge_cache.redis_records import CLAIM, TOMBSTONE, text_of_id
from llm_edge_cache.regions import Counter, Word

KEY = key_of()
LEASE = b"1" * 32
LIVENESS = 20.0


@pytest.fixture
def host(redis_server: RedisServer) -> Iterator[HostParts]:
    with hosts(redis_server) as (made,):
        yield made


def write(host: HostParts, key: bytes = KEY, **changes: object) -> Write:
    data = host.codec.encode(Entry(CachedResponse("42", "model"), time.time() + 60))
    made = Write(key, data, host.word(Word.BEGIN), time.monotonic_ns(), time.time() + 60)
    return made._replace(**changes)  # type: ignore[arg-type]


def send(host: HostParts, *items: Item) -> None:
    host.perform(write_all(host.tier, host.slab, list(items)))


def stored(host: HostParts, key: bytes = KEY) -> bool:
    return (host.client.run(Call((b"GET", host.tier.names.value(key)))) or b"-")[:1] == b"V"


# ---- sending ----


def test_a_batch_is_stored_and_counted(host: HostParts) -> None:
    keys = [key_of(str(number)) for number in range(5)]
    send(host, *(write(host, key) for key in keys))
    assert all(stored(host, key) for key in keys)
    assert host.count(Counter.L2_WRITES) == 5
    left = host.client.run(Call((b"PTTL", host.tier.names.value(keys[0]))))
    assert 50_000 < left <= 60_000


def test_what_an_invalidation_overtook_is_refused_and_counted(host: HostParts) -> None:
    late = write(host)
    host.invalidate("key", KEY.decode())
    send(host, late, write(host, key_of("other")))
    assert not stored(host)
    assert stored(host, key_of("other"))
    assert host.count(Counter.DROPPED_FENCED) == 1
    assert host.count(Counter.L2_WRITES) == 1


def test_an_old_write_is_not_sent_unless_it_holds_a_lease(host: HostParts) -> None:
    hour_ago = time.monotonic_ns() - 3600 * 10**9
    host.client.run(Script(CLAIM, host.tier.names.value(KEY), (LEASE, 5_000, b"", b"")))
    send(host, write(host, key_of("other"), began_ns=hour_ago), write(host, began_ns=hour_ago, lease=LEASE))
    assert not stored(host, key_of("other"))
    assert stored(host)
    assert host.count(Counter.DROPPED_LATE) == 1


def test_nothing_is_sent_through_an_open_breaker(host: HostParts) -> None:
    for _ in range(3):
        host.tier.breaker.fail(time.monotonic_ns())
    send(host, write(host), Release(KEY, LEASE))
    assert not stored(host)
    assert host.count(Counter.DROPPED_UNAVAILABLE) == 1


def test_what_redis_did_not_answer_is_dropped_and_counted(host: HostParts) -> None:
    host.is_cut = True
    send(host, write(host), write(host, key_of("other")))
    assert host.count(Counter.DROPPED_UNAVAILABLE) == 2


def test_a_lease_is_released(host: HostParts) -> None:
    host.client.run(Script(CLAIM, host.tier.names.value(KEY), (LEASE, 5_000, b"", b"")))
    send(host, Release(KEY, LEASE))
    assert host.client.run(Call((b"EXISTS", host.tier.names.value(KEY)))) == 0


def test_a_write_whose_time_is_up_is_gone_at_once(host: HostParts) -> None:
    send(host, write(host, gone_at=time.time() - 5))
    time.sleep(0.005)
    assert not stored(host)


# ---- the ids of tags ----


def tag_id(host: HostParts, tag: str = "t") -> bytes | None:
    found: bytes | None = host.client.run(Call((b"GET", host.tier.names.tag(tag))))
    return found


def drop_tag(host: HostParts) -> None:
    host.client.run(Call((b"DEL", host.tier.names.tag("t"))))


def newest(host: HostParts) -> bytes:
    host.follow()
    return text_of_id(host.word(Word.CURSOR))


def test_a_new_tag_gets_the_id_at_which_its_first_value_began(host: HostParts) -> None:
    begin = host.word(Word.BEGIN)
    send(host, write(host, tags=("t",)))
    assert tag_id(host) == text_of_id(begin)


def test_a_tag_that_has_an_id_keeps_it(host: HostParts) -> None:
    host.invalidate("tag", "t")
    before = tag_id(host)
    send(host, write(host, tags=("t",)))
    assert tag_id(host) == before


@pytest.mark.parametrize("kind", ["tag", "all"])
def test_a_lost_id_is_recreated_above_the_invalidations_since(host: HostParts, kind: str) -> None:
    late = write(host, tags=("t",))
    host.invalidate(kind, "t" if kind == "tag" else "")
    drop_tag(host)
    send(host, late)
    assert tag_id(host) == newest(host)


def test_invalidations_of_other_things_do_not_raise_it(host: HostParts) -> None:
    late = write(host, tags=("t",))
    host.invalidate("tag", "u")
    host.invalidate("key", key_of("other").decode())
    send(host, late)
    assert tag_id(host) == text_of_id(late.begin)


def test_where_the_stream_went_on_for_long_it_is_the_newest_id(host: HostParts) -> None:
    late = write(host, tags=("t",))
    for _ in range(120):
        host.invalidate("tag", "u")
    send(host, late)
    assert tag_id(host) == newest(host)


def test_where_the_place_in_the_stream_is_lost_it_is_the_newest_id(host: HostParts) -> None:
    late = write(host, tags=("t",))
    host.invalidate("tag", "t")
    drop_tag(host)
    host.client.run(Call((b"DEL", host.tier.names.events)))
    host.invalidate("tag", "u")
    send(host, late)
    assert tag_id(host) is not None
    assert tag_id(host) > text_of_id(late.begin)


def test_without_a_stream_it_is_above_the_value(host: HostParts) -> None:
    late = write(host, tags=("t",))
    host.client.run(Call((b"DEL", host.tier.names.events)))
    send(host, late)
    assert tag_id(host) == text_of_id(late.begin + 1)


# ---- the queue ----


def item(number: int = 0, size: int = 10) -> Write:
    return Write(b"%d" % number, b"x" * size, 0, 0, 0.0)


class Sink:
    """Takes batches; `gate` holds it up."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, batch: list[Item]) -> None:
        self.entered.set()
        assert self.gate.wait(LIVENESS)
        self.batches.append(batch)


@pytest.fixture
def sink() -> Sink:
    return Sink()


def test_what_is_put_is_sent_in_order_and_flush_waits_for_it(slab: SharedSlab, sink: Sink) -> None:
    queue = DeferredWrites(slab, 100, sink)
    items = [item(number) for number in range(10)]
    assert all(queue.put(one) for one in items)
    assert queue.flush(LIVENESS)
    assert [one for batch in sink.batches for one in batch] == items
    assert queue.close(LIVENESS)


def test_a_full_queue_drops_and_counts(slab: SharedSlab, sink: Sink) -> None:
    sink.gate.clear()
    queue = DeferredWrites(slab, 3, sink)
    queue.put(item())
    assert sink.entered.wait(LIVENESS)  # that one is in hand
    assert [queue.put(item()) for _ in range(5)] == [True, True, True, False, False]
    assert slab._counter_sums()[Counter.DROPPED_QUEUE_FULL] == 2
    sink.gate.set()
    assert queue.close(LIVENESS)
    assert sum(map(len, sink.batches)) == 4


@pytest.mark.parametrize(("count", "size", "longest"), [(100, 10, 64), (5, 600_000, 2)])
def test_batches_are_bounded(slab: SharedSlab, sink: Sink, count: int, size: int, longest: int) -> None:
    sink.gate.clear()
    queue = DeferredWrites(slab, 1000, sink)
    queue.put(item())
    assert sink.entered.wait(LIVENESS)
    for number in range(count):
        queue.put(item(number, size))
    sink.gate.set()
    assert queue.close(LIVENESS)
    assert max(map(len, sink.batches)) == longest


def test_close_drops_what_cannot_be_sent_in_time_and_counts(slab: SharedSlab, sink: Sink) -> None:
    sink.gate.clear()
    queue = DeferredWrites(slab, 100, sink)
    queue.put(item())
    assert sink.entered.wait(LIVENESS)
    queue.put(item())
    queue.put(item())
    assert not queue.close(0.01)
    assert slab._counter_sums()[Counter.DROPPED_UNAVAILABLE] == 2
    assert not queue.put(item())
    sink.gate.set()


def test_a_batch_that_fails_does_not_end_the_queue(slab: SharedSlab) -> None:
    sent: list[Item] = []

    def send(batch: list[Item]) -> None:
        if batch[0].key == b"0":
            raise SlabClosedError("closed under our feet")
        sent.extend(batch)

    queue = DeferredWrites(slab, 100, send)
    queue.put(item(0))
    assert queue.flush(LIVENESS)
    queue.put(item(1))
    assert queue.close(LIVENESS)
    assert sent == [item(1)]


def test_it_needs_no_thread_before_the_first_item(slab: SharedSlab, sink: Sink) -> None:
    before = threading.active_count()
    queue = DeferredWrites(slab, 100, sink)
    assert queue.flush(0)
    assert queue.close(0)
    assert threading.active_count() == before


def test_a_tombstone_is_what_refuses(host: HostParts) -> None:
    host.client.run(Script(TOMBSTONE, host.tier.names.value(KEY), (text_of_id(host.word(Word.BEGIN) + 1), 10_000)))
    send(host, write(host))
    assert host.count(Counter.DROPPED_FENCED) == 1
