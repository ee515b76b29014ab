"""One process per host reads the invalidation stream and applies it to the slab that all of them share.

Who reads is a word in the slab, with a heartbeat beside it: a reader that has not beaten for `_SILENCE_NS` (killed,
stopped, or starved) is replaced by whoever sees it first. How far it had come is a word too, so a successor goes on
from there, and a worker that is recycled flushes nothing. An entry may be applied twice, which voids too much at worst.

Only where the stream no longer holds the last entry that was applied here (it was trimmed, flushed, or is another's) is
it unknown what was missed: then L1 is cleared, and nothing is replayed.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.effects import BlockingCall, Steps
from llm_edge_cache.invalidation import STREAM_LENGTH, Invalidator, applied
from llm_edge_cache.redis_client import Call, Script
from llm_edge_cache.redis_records import RAISE, pack_id, stream_id, text_of_id
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Counter, Word

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["BLOCK_MS", "Follower"]

_log = logging.getLogger("llm_edge_cache")

BLOCK_MS: Final = 200
"""How long one read of the stream waits for news; the heartbeat is at least as frequent."""
_SILENCE_NS: Final = 600_000_000
_BATCH: Final = 256  # entries of one read
_TOKEN_BITS: Final = 62


class Follower:
    """A process's candidacy for reading the stream. Used by one thread."""

    def __init__(self, slab: SharedSlab, tier: RedisTier, invalidator: Invalidator) -> None:
        """Apply what concerns this tier to this slab."""
        self._slab = slab
        self._tier = tier
        self._invalidator = invalidator
        self._me = secrets.randbits(_TOKEN_BITS) | 1
        self._has_established = False

    def elect(self, now_ns: int) -> bool:
        """Tell whether this process reads the stream now; it becomes the reader where there is none."""
        word = self._slab._word
        reader = word(Word.READER)
        if reader != self._me:
            self._has_established = False
            if reader != 0 and now_ns - word(Word.READER_BEAT) < _SILENCE_NS:
                return False
            if not self._slab._word_exchange(Word.READER, reader, self._me):
                return False
        self._slab._word_set(Word.READER_BEAT, now_ns)
        return True

    def resign(self) -> None:
        """Let another process read at once."""
        self._slab._word_exchange(Word.READER, self._me, 0)

    def follow(self) -> Steps[None]:
        """Read what is new and apply it; waits up to BLOCK_MS for it. Only for the elected.

        Raises:
            RedisTrouble: Redis did not answer.
        """
        cursor = self._slab._word(Word.CURSOR)
        is_new = not self._has_established or not cursor
        if is_new:
            yield from self._establish()
            cursor = self._slab._word(Word.CURSOR)
        asked_ns = time.monotonic_ns()
        entries = _entries_of((yield from self._tier.ask(self._question(cursor, waits=not is_new))))
        # After it was read: 1 the place is there  2 A announces, Redis loses the stream  3 nothing new is read.
        if not (yield from self._has_place(cursor)):
            self._has_established = False
            return
        for identifier, fields in entries:
            packed = pack_id(identifier)
            self._apply(fields, packed)
            # After it is applied: a reader killed in between leaves it to its successor.
            self._slab._word_raise(Word.CURSOR, packed)
            self._slab._word_raise(Word.BEGIN, packed)
        if len(entries) < _BATCH:
            self._slab._word_raise(Word.CONTACT, asked_ns)

    def _question(self, cursor: int, *, waits: bool) -> Call | BlockingCall:
        """Return the command that reads what is new. The first does not wait for news, so that contact is made."""
        what = (b"STREAMS", self._tier.names.events, stream_id(cursor))
        if not waits:
            return Call((b"XREAD", b"COUNT", _BATCH, *what))
        return BlockingCall(Call((b"XREAD", b"COUNT", _BATCH, b"BLOCK", BLOCK_MS, *what)), BLOCK_MS / 1000)

    def _apply(self, fields: dict[bytes, bytes], identifier: int) -> None:
        what, origin = applied(fields)
        # This host's own were applied before they were announced and after: once more would throw out what came since.
        if what is None or origin == b"%d" % self._slab._mapping.nonce:
            return
        if what.kind == "all":
            # First: 1 L1 is cleared  2 Q finds a value from before in Redis, and fills L1  3 such values become void.
            self._slab._word_raise(Word.CLEARED, identifier)
        self._invalidator.apply(what)
        self._slab._count(Counter.INVALIDATED_REMOTE)

    def _has_place(self, cursor: int) -> Steps[bool]:
        """Tell whether the stream still holds the entry that was applied last, and so everything since."""
        identifier = stream_id(cursor)
        found = yield from self._tier.ask(Call((b"XRANGE", self._tier.names.events, identifier, identifier)))
        return bool(found)

    def _establish(self) -> Steps[None]:
        """Find the place in the stream from which to go on; where that is lost, go on from its end with an empty L1."""
        cursor = self._slab._word(Word.CURSOR)
        has_place = cursor != 0 and (yield from self._has_place(cursor))
        newest = cursor if has_place else (yield from self._newest())
        # After the place in the stream is known: 1 read `cleared`  2 a clear_all  3 take the newest entry, which is
        # that one's, for the place: its id would be known from neither.
        yield from self._learn_cleared()
        if not has_place:
            self._start_over(newest, is_first=not cursor)
        self._has_established = True

    def _newest(self) -> Steps[int]:
        """Return the last id of the stream. From then on it has an entry, which tells that none was trimmed."""
        names, ask = self._tier.names, self._tier.ask
        newest = yield from ask(Call((b"XREVRANGE", names.events, b"+", b"-", b"COUNT", 1)))
        if newest:
            return pack_id(newest[0][0])
        hello = (b"XADD", names.events, b"MAXLEN", b"~", STREAM_LENGTH, b"*", b"kind", b"hello")
        return pack_id((yield from ask(Call(hello))))

    def _learn_cleared(self) -> Steps[None]:
        """Learn the id of the last clear_all.

        One that is gone was never there, or Redis lost it, and tombstones with it: it is recreated at the newest id.
        1 A's write of an old K hangs  2 K is invalidated  3 Redis loses everything  4 the write arrives, and no
        tombstone refuses it: but it began before what is now taken for the last clear_all.
        """
        names, ask = self._tier.names, self._tier.ask
        cleared = yield from ask(Call((b"GET", names.cleared)))
        if not cleared:
            newest = text_of_id((yield from self._newest()))
            cleared = yield from ask(Script(RAISE, names.cleared, (newest, 0)))
        self._slab._word_raise(Word.CLEARED, int(cleared, 16))

    def _start_over(self, newest: int, *, is_first: bool) -> None:
        if not is_first:
            _log.warning("invalidations may have been missed: L1 is cleared")
            self._slab._count(Counter.STREAM_FLUSHES)
        self._slab._word_set(Word.BEGIN, newest)
        # Before the cursor: a reader killed in between leaves the clearing to its successor. What is stored from here
        # on is told of by the entries after `newest`.
        self._slab.clear()
        self._slab._word_set(Word.CURSOR, newest)


def _entries_of(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Return the entries of an XREAD of one stream, in either version of the protocol."""
    if not reply:
        return []
    entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
    return [(identifier, _fields_of(fields)) for identifier, fields in entries]


def _fields_of(fields: Any) -> dict[bytes, bytes]:
    if isinstance(fields, dict):
        return fields
    return dict(zip(fields[::2], fields[1::2], strict=False)) if fields else {}
