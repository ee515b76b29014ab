"""Writes to Redis that no caller waits for: a bounded queue, and one thread that empties it.

What cannot be written is dropped and counted by its reason, never retried for long: it is a cache. Order does not
matter: each write carries the id at which its computation began, or its lease, and Redis refuses what was overtaken.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_edge_cache.effects import Steps
from llm_edge_cache.errors import CacheError
from llm_edge_cache.invalidation import TAG_SECONDS, TOMBSTONE_SECONDS, applied
from llm_edge_cache.redis_client import Batch, Call, RedisTrouble, Script
from llm_edge_cache.redis_commands import sound_answer
from llm_edge_cache.redis_records import RAISE, pack_id, parse_id, stream_id, text_of_id
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Counter

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["DeferredWrites", "Release", "Write", "write_all"]

_log = logging.getLogger("llm_edge_cache")

_BATCH: Final = 64  # items of one round trip
_BATCH_BYTES: Final = 1 << 20
_LONGEST_LOOK_BACK: Final = 100  # stream entries looked through before a tag's id is recreated
_OLDEST_NS: Final = (TOMBSTONE_SECONDS - 300) * 1_000_000_000
"""The oldest write that is sent: well below the age at which a tombstone that should refuse it may be gone."""


class Write(NamedTuple):
    """A value on its way to Redis."""

    key: bytes
    data: bytes
    begin: int
    began_ns: int
    """When its computation began; CLOCK_MONOTONIC."""
    gone_at: float
    """When Redis is to forget it; seconds since the epoch."""
    tags: tuple[str, ...] = ()
    lease: bytes = b""

    def __repr__(self) -> str:
        return f"<Write {len(self.data)} bytes>"


class Release(NamedTuple):
    """A lease that is given up without a value."""

    key: bytes
    lease: bytes


Item = Write | Release


class DeferredWrites:
    """The queue of one process. Any thread may put; one thread of its own sends."""

    def __init__(self, slab: SharedSlab, limit: int, send: Callable[[list[Item]], None]) -> None:
        """Hold at most `limit` items; `send` takes a batch of them to Redis and raises nothing but CacheError."""
        self._slab = slab
        self._limit = limit
        self._send = send
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._in_hand = 0  # items taken out and not yet sent
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def put(self, item: Item) -> bool:
        """Take an item, and return at once. Returns False, with the drop counted, when the queue is full or closed."""
        with self._changed:
            if len(self._items) >= self._limit or self._is_closing:
                self._slab._count(Counter.DROPPED_QUEUE_FULL, _writes_among([item]))
                return False
            self._items.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llm-edge-cache-writes", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return True

    def flush(self, seconds: float) -> bool:
        """Wait until everything put so far has been sent or dropped. Returns False when that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._items and not self._in_hand, seconds)

    def close(self, seconds: float) -> bool:
        """Flush, and let the thread end. What is left after so many seconds is dropped and counted."""
        is_flushed = self.flush(seconds)
        with self._changed:
            self._is_closing = True
            if self._items:
                self._slab._count(Counter.DROPPED_UNAVAILABLE, _writes_among(self._items))
                self._items.clear()
            self._changed.notify_all()
        return is_flushed

    def _run(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                return
            try:
                self._send(batch)
            except CacheError as error:  # the slab was closed under our feet: nobody is left to count for
                _log.debug("deferred writes: %s", error)
            except Exception:
                _log.exception("deferred writes: %d dropped", len(batch))
            with self._changed:
                self._in_hand = 0
                self._changed.notify_all()

    def _take(self) -> list[Item]:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._is_closing)
            batch: list[Item] = []
            size = 0
            while self._items and len(batch) < _BATCH and size < _BATCH_BYTES:
                item = self._items.popleft()
                size += len(item.data) if isinstance(item, Write) else 0
                batch.append(item)
            self._in_hand = len(batch)
            return batch


def _writes_among(items: Iterable[Item]) -> int:
    """A lease that is not given up ends by itself: no loss."""
    return sum(isinstance(item, Write) for item in items)


def write_all(tier: RedisTier, slab: SharedSlab, items: list[Item]) -> Steps[None]:
    """Send a batch of items to Redis; each is stored, refused or dropped, and counted."""
    writes = [item for item in items if isinstance(item, Write)]
    if not tier.breaker.is_closed():
        slab._count(Counter.DROPPED_UNAVAILABLE, len(writes))
        return
    fit = [write for write in writes if time.monotonic_ns() - write.began_ns < _OLDEST_NS or write.lease]
    slab._count(Counter.DROPPED_LATE, len(writes) - len(fit))
    try:
        for write in fit:
            for tag in write.tags:
                yield from _keep_tag(tier, tag, write.begin)
        commands = [_write_command(tier, write) for write in fit]
        commands += [tier.release_command(item.key, item.lease) for item in items if isinstance(item, Release)]
        replies = yield from tier.ask(Batch(tuple(commands)))
    except RedisTrouble:
        slab._count(Counter.DROPPED_UNAVAILABLE, len(fit))
        return
    for _, reply in zip(fit, replies, strict=False):
        slab._count(_counter_of(reply))


def _write_command(tier: RedisTier, write: Write) -> Script:
    return tier.write_command(write.key, write.data, write.begin, write.gone_at - time.time(), write.lease)


def _counter_of(reply: object) -> Counter:
    if isinstance(reply, RedisTrouble):
        return Counter.DROPPED_UNAVAILABLE
    return Counter.L2_WRITES if reply == 1 else Counter.DROPPED_FENCED


def _keep_tag(tier: RedisTier, tag: str, begin: int) -> Steps[None]:
    """See to it that a tag's id is there, since values of a tag without one are void, and lives as long as they do.

    One that is gone was never there or has been evicted, with what it knew of invalidations: it is recreated at an id
    that no invalidation of this tag can be above. That is the value's own `begin` if no such one came since; else the
    newest.
    """
    name = tier.names.tag(tag)
    if parse_id((yield from tier.get(name))) is not None:
        return
    since = (b"XRANGE", tier.names.events, stream_id(begin), b"+", b"COUNT", _LONGEST_LOOK_BACK)
    found = yield from tier.ask(Call(since))
    with sound_answer("Redis"):
        ids = [pack_id(identifier) for identifier, _ in found]
        # Its own place must still be there: otherwise the stream was trimmed or lost, and who knows what it held.
        is_complete = ids[:1] == [begin] and len(ids) < _LONGEST_LOOK_BACK
        is_untouched = is_complete and not any(_concerns(fields, tag) for _, fields in found[1:])
    identifier = begin
    if not is_untouched:
        newest = yield from tier.ask(Call((b"XREVRANGE", tier.names.events, b"+", b"-", b"COUNT", 1)))
        with sound_answer("Redis"):
            identifier = pack_id(newest[0][0]) if newest else begin + 1
    yield from tier.ask(Script(RAISE, name, (text_of_id(identifier), TAG_SECONDS * 1000)))


def _concerns(fields: list[bytes], tag: str) -> bool:
    what, _ = applied(dict(zip(fields[::2], fields[1::2], strict=False)))
    return what is not None and (what.kind == "all" or (what.kind == "tag" and what.name == tag))
