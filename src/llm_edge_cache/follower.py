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
from llm_edge_cache.redis_client import Call, RedisTrouble, Script
from llm_edge_cache.redis_commands import sound_answer
from llm_edge_cache.redis_records import DISCARD_STREAM, RAISE, pack_id, parse_id, stream_id, text_of_id
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

    @property
    def has_place(self) -> bool:
        """Whether its place in the stream is known; not for a reader that has just been elected."""
        return self._has_established

    def follow(self, *, waits: bool = True) -> Steps[None]:
        """Read what is new and apply it; waits up to BLOCK_MS for it, unless told not to. Only for the elected.

        Raises:
            RedisTrouble: Redis did not answer.
        """
        try:
            yield from self._read_on(waits)
        except RedisTrouble as trouble:
            # Whatever happened to Redis meanwhile: 1 it is restarted empty  2 its clock is behind  3 its new ids are
            # below our place, and would be passed over.
            self._has_established = False
            if not trouble.is_wrong_type:
                raise
            yield from self._discard_stream(Script(DISCARD_STREAM, self._tier.names.events))
        except ValueError:  # an id above all that a clock makes: nothing of ours could ever be added
            self._has_established = False
            yield from self._discard_stream(Call((b"DEL", self._tier.names.events)))

    def _discard_stream(self, command: Call | Script) -> Steps[None]:
        """Remove what a stranger wrote in place of the stream, or into it."""
        self._slab._count(Counter.BAD_FORMAT)
        yield from self._tier.ask(command)

    def _read_on(self, waits: bool) -> Steps[None]:
        yield from self.establish()
        cursor = self._slab._word(Word.CURSOR)
        asked_ns = time.monotonic_ns()
        entries = _entries_of((yield from self._tier.ask(self._question(cursor, waits=waits))))
        # Asked after the read, also where nothing was new: 1 the stream is trimmed or lost beyond our place, with what
        # was announced  2 others add  3 we read on from there. While the entry at our place is there, so is everything
        # that came after it.
        if not (yield from self._is_in_stream(cursor)):
            self._has_established = False
            return
        for identifier, fields in entries:
            packed = pack_id(identifier)
            self._apply(packed, fields)
            # After it is applied: a reader killed in between leaves it to its successor.
            self._slab._word_raise(Word.CURSOR, packed)
            self._slab._word_raise(Word.BEGIN, packed)
        if len(entries) < _BATCH:
            self._slab._word_raise(Word.CONTACT, asked_ns)

    def _question(self, cursor: int, *, waits: bool) -> Call | BlockingCall:
        """Return the command that reads what is new."""
        what = (b"STREAMS", self._tier.names.events, stream_id(cursor))
        if not waits:
            return Call((b"XREAD", b"COUNT", _BATCH, *what))
        return BlockingCall(Call((b"XREAD", b"COUNT", _BATCH, b"BLOCK", BLOCK_MS, *what)), BLOCK_MS / 1000)

    def _apply(self, packed: int, fields: dict[bytes, bytes]) -> None:
        what, origin = applied(fields)
        if what is not None and what.kind == "all":
            # Before L1 is cleared: 1 L1 is cleared  2 Q misses, reads from Redis what the clear_all made void, and
            # fills L1  3 the word says so.
            self._slab._word_raise(Word.CLEARED, packed)
        # This host's own were applied before they were announced and after: once more would throw out what came since.
        if what is None or origin == b"%d" % self._slab._mapping.nonce:
            return
        self._invalidator.apply(what)
        self._slab._count(Counter.INVALIDATED_REMOTE)

    def establish(self) -> Steps[None]:
        """Find the place in the stream from which to go on; where that is lost, go on from its end with an empty L1.

        Done once by whoever is elected, before it follows. Raises as follow() does.
        """
        cursor = self._slab._word(Word.CURSOR)
        if self._has_established and cursor:
            return
        has_place = yield from self._is_in_stream(cursor)
        newest = cursor if has_place else (yield from self._newest())
        # After the place in the stream is known: 1 read `cleared`  2 a clear_all  3 take the newest entry, which is
        # that one's, for the place: its id would be known from neither.
        yield from self._learn_cleared()
        if not has_place:
            self._start_over(newest, is_first=not cursor)
        self._has_established = True

    def _learn_cleared(self) -> Steps[None]:
        """Learn the id of the last clear_all.

        One that is gone was never there, or Redis lost it, and tombstones with it: it is recreated at the newest id; so
        is one that a stranger wrote over. 1 A's write of an old K hangs  2 K is invalidated  3 Redis loses everything
        4 the write arrives, and no tombstone refuses it: but it began before what is now taken for the last clear_all.
        """
        cleared = yield from self._tier.get(self._tier.names.cleared)
        identifier = parse_id(cleared)
        if identifier is None:
            self._slab._count(Counter.BAD_FORMAT, int(cleared is not None))
            identifier = yield from self._newest()
            recreate = Script(RAISE, self._tier.names.cleared, (text_of_id(identifier), 0))
            identifier = parse_id((yield from self._tier.ask(recreate))) or identifier
        self._slab._word_raise(Word.CLEARED, identifier)

    def _is_in_stream(self, packed: int) -> Steps[bool]:
        name = stream_id(packed)
        return packed != 0 and bool((yield from self._tier.ask(Call((b"XRANGE", self._tier.names.events, name, name)))))

    def _newest(self) -> Steps[int]:
        """Return the last id of the stream. From then on it has an entry, which tells that none was trimmed."""
        names, ask = self._tier.names, self._tier.ask
        newest = yield from ask(Call((b"XREVRANGE", names.events, b"+", b"-", b"COUNT", 1)))
        entries = _entries_of([(b"", newest)])
        if entries:
            return pack_id(entries[0][0])
        hello = (b"XADD", names.events, b"MAXLEN", b"~", STREAM_LENGTH, b"*", b"kind", b"hello")
        return pack_id((yield from ask(Call(hello))))

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
    with sound_answer("Redis"):
        entries = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        return [(identifier, _fields_of(fields)) for identifier, fields in entries or ()]


def _fields_of(fields: Any) -> dict[bytes, bytes]:
    if isinstance(fields, dict):
        return fields
    return dict(zip(fields[::2], fields[1::2], strict=False)) if fields else {}
