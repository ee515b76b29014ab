"""L2: entries in Redis, read, claimed and written. Every operation is a generator of effects (`effects`).

Whatever Redis does, nothing is raised from here: an operation that it did not answer says so, and the failure is
counted by its reason and told to the breaker.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from llm_edge_cache.breaker import Breaker
from llm_edge_cache.codec import CodecError, Entry, EntryCodec
from llm_edge_cache.effects import BlockingCall, Steps
from llm_edge_cache.redis_client import Batch, Call, RedisTrouble, Script
from llm_edge_cache.redis_records import (
    CLAIM,
    DISCARD,
    HEADER_BYTES,
    IDENTITY_BYTES,
    RELEASE,
    RENEW,
    WRITE,
    parse_id,
    parse_value,
    text_of_id,
)
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.settings import L2Config

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["LEASE_MS", "UNANSWERED", "Busy", "Found", "Leased", "Names", "RedisTier", "Unanswered"]

_log = logging.getLogger("llm_edge_cache")

LEASE_MS: Final = 2000
"""How long a host keeps the right to compute a value without renewing it."""

_CLAIMS: Final = 3
"""How often one claim asks Redis: again after a value that turned out to be void."""

_ERRORS: Final = {
    "timeout": Counter.L2_ERROR_TIMEOUT,
    "connection": Counter.L2_ERROR_CONNECTION,
    "auth": Counter.L2_ERROR_AUTH,
    "oom": Counter.L2_ERROR_OOM,
    "readonly": Counter.L2_ERROR_READONLY,
    "loading": Counter.L2_ERROR_LOADING,
    "cluster": Counter.L2_ERROR_CLUSTER,
    "response": Counter.L2_ERROR_RESPONSE,
}
BAD: Final = {
    "truncated": Counter.BAD_TRUNCATED,
    "format": Counter.BAD_FORMAT,
    "checksum": Counter.BAD_CHECKSUM,
    "compression": Counter.BAD_COMPRESSION,
    "content": Counter.BAD_CONTENT,
}
"""The counter of each reason for which bytes are no entry."""


class Found(NamedTuple):
    """A value that may be served, or one that is only stale."""

    entry: Entry
    data: bytes
    identity: bytes
    """What tells its record from any other value of the key."""
    is_stale: bool

    def __repr__(self) -> str:
        return f"<Found {len(self.data)} bytes>"


class Leased(NamedTuple):
    """The caller computes the value for all hosts."""

    token: bytes


class Busy(NamedTuple):
    """Another host computes it."""

    seconds_left: float
    found: Found | None = None
    """What was there before, and is stale; None where the caller knows it."""


class Unanswered(NamedTuple):
    """Redis was not asked, or did not answer: nothing is known."""


UNANSWERED: Final = Unanswered()


class Names:
    """The names of everything that this cache keeps in Redis."""

    def __init__(self, prefix: str) -> None:
        """Begin each with the prefix."""
        self.prefix: Final = prefix.encode()
        self.events: Final = self.prefix + b"events"
        """The invalidation stream."""
        self.cleared: Final = self.prefix + b"cleared"
        """Id of the last clear_all."""

    def value(self, key: bytes) -> bytes:
        """Return where the value of a cache key lies."""
        return self.prefix + key

    def tag(self, tag: str) -> bytes:
        """Return where the id of a tag's last invalidation lies. Tags may be long, and are nobody's business."""
        return self.prefix + b"tag:" + hashlib.sha256(tag.encode()).hexdigest()[:32].encode()


class RedisTier:
    """The tier as one process sees it; what all processes of the host must agree on is in the slab."""

    def __init__(self, slab: SharedSlab, config: L2Config, codec: EntryCodec) -> None:
        """Use this slab's words and counters."""
        self.config: Final = config
        self.names: Final = Names(config.key_prefix)
        self.breaker: Final = Breaker(slab)
        self._slab = slab
        self._codec = codec
        self._has_warned = False

    # ---- asking ----

    def is_usable(self) -> bool:
        """Tell whether its values can be had and trusted now.

        They cannot be trusted before this host has read the stream once (a clear_all would be unknown to it), nor while
        invalidations of this host have not been delivered: 1 P invalidates K while Redis is away, deletes it in L1 and
        returns  2 Redis is back  3 Q misses in L1 and finds the old K in Redis.
        """
        word = self._slab._word
        return self.breaker.is_closed() and word(Word.CURSOR) != 0 and word(Word.UNDELIVERED) == 0

    def ask(self, command: Call | Script | Batch | BlockingCall) -> Steps[Any]:
        """Perform a command, and let the breaker know; failures are counted.

        Raises:
            RedisTrouble: it failed. Within a batch, failures stand in place of the replies instead.
        """
        try:
            reply = yield command
        except RedisTrouble as trouble:
            self.note(trouble)
            raise
        replies = reply if isinstance(command, Batch) else ()
        # Each once: a connection that failed took several commands of a batch with it, and stands in all their places.
        failed = dict.fromkeys(item for item in replies if isinstance(item, RedisTrouble))
        for item in failed:
            self.note(item)
        if not any(item.is_outage for item in failed):
            self.breaker.succeed()
        return reply

    def note(self, trouble: RedisTrouble) -> None:
        """Count a failure, and tell the breaker if Redis could not serve.

        A key of a wrong type is no failure of Redis: whoever asked counts it as what a stranger wrote.
        """
        if trouble.is_wrong_type:
            return
        self._slab._count(_ERRORS[trouble.reason])
        if trouble.is_denied and not self._has_warned:
            self._has_warned = True
            _log.warning("the user lacks a right that the cache needs (see docs/failures.md): %s", trouble)
        _log.debug("Redis: %s", trouble)
        if trouble.is_outage:
            self.breaker.fail(time.monotonic_ns())

    # ---- reading ----

    def read(self, key: bytes, *, stale: bool = False) -> Steps[Found | Unanswered | None]:
        """Read the value of a cache key.

        Args:
            key: 64 hexadecimal digits.
            stale: return a value past its expiry too, as stale.

        Returns:
            The value; None for a miss; UNANSWERED.
        """
        if not self.is_usable():
            self._slab._count(Counter.L2_SKIPPED)
            return UNANSWERED
        start = time.monotonic_ns()
        try:
            record = yield from self.get(self.names.value(key))
            found = yield from self._judge(key, record)
        except RedisTrouble:
            return UNANSWERED
        if found is not None and found.is_stale and not stale:
            found = None
        is_hit = found is not None and not found.is_stale
        self._slab._record(Counter.L2_HITS if is_hit else Counter.L2_MISSES, Histogram.L2, start)
        return found

    def claim(self, key: bytes, token: bytes, stale: bytes = b"") -> Steps[Found | Leased | Busy | Unanswered]:
        """Read the value, or take the lease to compute it. Counts neither hit nor miss: a caller may ask many times.

        Args:
            key: 64 hexadecimal digits.
            token: 32 hexadecimal digits that nobody else uses.
            stale: the identity of a value that the caller knows to be stale; it stays behind the lease.
        """
        if not self.is_usable():
            self._slab._count(Counter.L2_SKIPPED)
            return UNANSWERED
        known, what = stale, b"stale" if stale else b""
        try:
            for _ in range(_CLAIMS):
                reply = yield from self.ask(Script(CLAIM, self.names.value(key), (token, LEASE_MS, known, what)))
                if isinstance(reply, int):
                    if reply == 2:
                        self._slab._count(BAD["format"])
                    return Leased(token) if reply > 0 else Busy(-reply / 1000)
                left, record = _behind_lease(reply)
                found = yield from self._judge(key, record)
                if left is not None:
                    return Busy(-left / 1000, found)
                if found is not None:
                    return found
                known, what = record[:IDENTITY_BYTES] if isinstance(record, bytes) else b"", b""
        except RedisTrouble:
            pass
        return UNANSWERED

    def get(self, name: bytes) -> Steps[bytes | None]:
        """Read a key; what is no string reads as an empty one, which is nobody's."""
        try:
            record: bytes | None = yield from self.ask(Call((b"GET", name)))
        except RedisTrouble as trouble:
            if trouble.is_wrong_type:
                return b""
            raise
        return record

    def discard(self, name: bytes, record: bytes, reason: str = "format") -> Steps[None]:
        """Count what a stranger wrote under a name of ours, and delete it if it is still there."""
        self._slab._count(BAD[reason])
        with contextlib.suppress(RedisTrouble):
            yield from self.ask(Script(DISCARD, name, (record[:HEADER_BYTES], len(record))))

    def _judge(self, key: bytes, record: bytes | None) -> Steps[Found | None]:
        """Return the value of a record if nothing that it depends on was invalidated since it began."""
        try:
            value = parse_value(record)
            entry = None if value is None else self._codec.decode(value.data)
        except (TypeError, ValueError, CodecError) as error:
            reason = error.reason if isinstance(error, CodecError) else "format"
            yield from self.discard(self.names.value(key), record if isinstance(record, bytes) else b"", reason)
            return None
        if record is None or value is None or entry is None or value.begin < self._slab._word(Word.CLEARED):
            return None
        if entry.generations and not (yield from self._are_tags_valid(tuple(entry.generations), value.begin)):
            return None
        is_stale = entry.expires_at is not None and entry.expires_at <= time.time()
        return Found(entry, value.data, record[:IDENTITY_BYTES], is_stale)

    def _are_tags_valid(self, tags: tuple[str, ...], begin: int) -> Steps[bool]:
        """Tell whether no tag was invalidated after `begin`. One whose id is gone may have been: Redis evicts."""
        names = [self.names.tag(tag) for tag in tags]
        texts = yield from self.ask(Batch(tuple(Call((b"GET", name)) for name in names)))
        ids = [parse_id(text) for text in texts]
        for name, text, found in zip(names, texts, ids, strict=True):
            is_garbage = isinstance(text, bytes) or (isinstance(text, RedisTrouble) and text.is_wrong_type)
            if found is None and is_garbage:
                yield from self.discard(name, text if isinstance(text, bytes) else b"")
        return all(found is not None and found <= begin for found in ids)

    # ---- leases ----

    def check_lease(self, key: bytes, lease: bytes) -> Steps[Literal["held", "gone", "taken"]]:
        """Renew a lease that may have run out. Takes it for held where Redis cannot be asked: then none can be taken.

        Returns:
            Whether it is held; gone, with nothing in its place (Redis forgot it); or taken: by another host's lease,
            its value, or a tombstone.
        """
        if not self.is_usable():
            return "held"
        try:
            if (yield from self.ask(self.renew_command(key, lease))) == 1:
                return "held"
            kind = yield from self.ask(Call((b"GETRANGE", self.names.value(key), 0, 0)))
        except RedisTrouble:
            return "held"
        return "taken" if kind else "gone"

    # ---- writing ----

    def write_command(self, key: bytes, data: bytes, begin: int, seconds: float, lease: bytes = b"") -> Script:
        """Return the command that stores a value unless something newer is there, or its lease was lost."""
        milliseconds = max(1, round(seconds * 1000))
        return Script(WRITE, self.names.value(key), (text_of_id(begin), lease, milliseconds, data))

    def renew_command(self, key: bytes, lease: bytes) -> Script:
        """Return the command that keeps a lease for another term."""
        return Script(RENEW, self.names.value(key), (lease, LEASE_MS))

    def release_command(self, key: bytes, lease: bytes) -> Script:
        """Return the command that gives a lease up."""
        return Script(RELEASE, self.names.value(key), (lease,))


def _behind_lease(reply: Any) -> tuple[int | None, Any]:
    """What CLAIM found: the lease's milliseconds, negative, where another one's is before the record; and the record.

    Any other list is what no Redis answers, and a record of nobody's.
    """
    if isinstance(reply, list) and len(reply) == 2 and isinstance(reply[0], int):
        return reply[0], reply[1]
    return None, reply
