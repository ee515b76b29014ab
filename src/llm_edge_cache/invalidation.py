"""What makes an old value disappear everywhere: on this host at once, in Redis, and in the L1 of every other host.

An invalidation of a key goes in four steps:

1. delete it in L1, which voids the tokens of fills under way;
2. announce it on the stream (XADD): its id orders it against all computations;
3. put a tombstone of that id in place of the value, which refuses writes that began before; then confirm on the stream;
4. delete it in L1 again.

Each step is there because of an interleaving:

- without 4:  1 P deletes K in L1  2 Q misses, reads the old K from Redis  3 P sets the tombstone, returns  4 Q fills L1
  with the old K under a token from after 1.
- without the confirmation:  1 P announces  2 host B applies it  3 B's Q misses, reads the old K from Redis  4 P sets
  the tombstone  5 Q fills B's L1, and nobody tells B again.
- with the tombstone before the announcement there would be no id to order it by.

Tags and clear_all are the same with an id in Redis (`Names.tag`, `Names.cleared`) in place of the tombstone; on the
host they are one word each, so they cost the same whatever is stored.

When Redis cannot be reached, the invalidation is written to a journal in the slab, and no value from Redis is trusted
on this host (`RedisTier.is_usable`) until a process has delivered it. A journal that is gone is delivered as clear_all:
too much, never too little.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec
import xxhash

from llm_edge_cache.effects import Steps
from llm_edge_cache.keys import is_tier_key, tier_key
from llm_edge_cache.model import CacheableRequest
from llm_edge_cache.redis_client import Call, RedisTrouble, Script
from llm_edge_cache.redis_records import RAISE, TOMBSTONE, pack_id, text_of_id
from llm_edge_cache.redis_tier import RedisTier
from llm_edge_cache.regions import Counter, Word

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = [
    "TOMBSTONE_SECONDS",
    "Invalidation",
    "Invalidator",
    "key_invalidation",
    "namespace_tag",
    "tag_hash",
    "tag_invalidation",
    "tags_of",
]

_log = logging.getLogger("llm_edge_cache")

TOMBSTONE_SECONDS: Final = 900
"""How long a tombstone refuses writes that began before it."""
TAG_SECONDS: Final = 30 * 24 * 3600
"""How long the id of a tag that nobody uses is kept; longer than values of the usual ttl live."""
STREAM_LENGTH: Final = 10_000
"""Invalidations that the stream keeps; a host that missed more clears its L1."""

_JOURNAL: Final = b"\0llm-edge-cache:journal"
_LONGEST_JOURNAL: Final = 1000  # invalidations; more are as good as clear_all

Kind = Literal["key", "tag", "all"]


class Invalidation(msgspec.Struct, frozen=True, array_like=True):
    """What becomes void."""

    kind: Kind
    name: str = ""
    """The cache key or the tag."""


_ALL: Final = Invalidation("all")
_decode_journal: Final = msgspec.msgpack.Decoder(list[Invalidation]).decode
_encode_journal: Final = msgspec.msgpack.Encoder().encode
_COUNTERS: Final = {
    "key": Counter.INVALIDATED_KEYS,
    "tag": Counter.INVALIDATED_TAGS,
    "all": Counter.INVALIDATED_ALL,
}


def tag_hash(tag: str) -> int:
    """Return what the slab's table knows a tag by."""
    return xxhash.xxh3_64_intdigest(tag.encode())


def namespace_tag(namespace: str) -> str:
    """Return the tag under which the gateway keeps the answers of a namespace."""
    return f"namespace:{namespace}"


class Invalidator:
    """Applies invalidations to the slab, and carries them to Redis if there is one."""

    def __init__(self, slab: SharedSlab, tier: RedisTier | None) -> None:
        """Work on this slab and tier."""
        self._slab = slab
        self._tier = tier

    def invalidate(self, what: Invalidation) -> Steps[None]:
        """Make something void on this host now, in Redis and on the other hosts; never raises for Redis."""
        self.apply(what)
        if self._tier is not None:
            if not (yield from self._publish(what)):
                self._write_down(what)
            self.apply(what)
        self._slab._count(_COUNTERS[what.kind])

    def apply(self, what: Invalidation) -> None:
        """Make something void in this host's L1."""
        slab = self._slab
        if what.kind == "key":
            slab.delete(what.name.encode())
        elif what.kind == "tag":
            # An entry is valid while its tags' epochs are not above the one at which it began, so the epoch moves
            # first: 1 A moves the epoch to 8  2 B begins at 8  3 A raises the tag to 8: B's entry is valid, what began
            # at 7 is not. The other way round two that invalidate at once could leave the tag at an epoch that B began
            # at before.
            slab._tag_raise(tag_hash(what.name), slab._word_add(Word.TAG_EPOCH, 1))
        else:
            slab.clear()

    # ---- to Redis ----

    def _publish(self, what: Invalidation) -> Steps[bool]:
        """Carry it to Redis. Returns whether all of it arrived."""
        assert self._tier is not None
        if not self._tier.breaker.is_closed():
            return False
        try:
            packed = yield from self._announce(what)
            yield from self._tier.ask(self._void(what, packed))
            # A round trip of its own: a Batch promises no order.
            newest = yield from self._announce(what)
        except (RedisTrouble, ValueError):  # a stranger's id, above all that a clock makes: `follower` removes it
            return False
        if what.kind == "all":
            self._slab._word_raise(Word.CLEARED, packed)
        # What begins on this host from here on began after the announcement, whether or not the stream's reader has
        # come so far: else 1 invalidate(K) returns  2 store(K) of this host begins under an older id and is refused.
        self._slab._word_raise(Word.BEGIN, newest)
        return True

    def _announce(self, what: Invalidation) -> Steps[int]:
        """Tell the other hosts. Returns the id under which they are told."""
        assert self._tier is not None
        origin = self._slab._mapping.nonce
        fields = (b"kind", what.kind.encode(), b"name", what.name.encode(), b"origin", b"%d" % origin)
        announcement = (b"XADD", self._tier.names.events, b"MAXLEN", b"~", STREAM_LENGTH, b"*", *fields)
        return pack_id((yield from self._tier.ask(Call(announcement))))

    def _void(self, what: Invalidation, packed: int) -> Script:
        assert self._tier is not None
        names, text = self._tier.names, text_of_id(packed)
        if what.kind == "key":
            return Script(TOMBSTONE, names.value(what.name.encode()), (text, TOMBSTONE_SECONDS * 1000))
        if what.kind == "tag":
            return Script(RAISE, names.tag(what.name), (text, TAG_SECONDS * 1000))
        return Script(RAISE, names.cleared, (text, 0))

    # ---- the journal ----

    def _write_down(self, what: Invalidation) -> None:
        """Keep an invalidation until it can be delivered. The journal first, then the word that says there is one."""
        while not self._add_to_journal(what):
            pass
        self._slab._word_add(Word.UNDELIVERED, 1)

    def _add_to_journal(self, what: Invalidation) -> bool:
        """Return False when another process was faster.

        Where the journal is gone although invalidations are undelivered, or there is no room for one, it stays absent:
        then all is to be cleared.
        """
        slab = self._slab
        found = slab.gets(_JOURNAL)
        if found is None:
            is_lost = slab._word(Word.UNDELIVERED) != 0
            return is_lost or slab.add(_JOURNAL, _encode_journal([what]), ttl=None, tti=None) or _JOURNAL not in slab
        entries = _journal_entries(found[0])
        if what not in entries and _ALL not in entries:
            entries = [*entries, what] if len(entries) < _LONGEST_JOURNAL else [_ALL]
        # Also where it stands there already: 1 D delivers K  2 P invalidates K again, and finds it in the journal  3 D
        # empties the journal. A new version tells D that there is more to deliver.
        return any(
            slab.cas(_JOURNAL, _encode_journal(kept), found[1], ttl=None, tti=None) for kept in (entries, [_ALL])
        )

    def deliver(self) -> Steps[None]:
        """Carry what could not be delivered to Redis. Called while Redis answers."""
        undelivered = self._slab._word(Word.UNDELIVERED)
        if not undelivered:
            return
        found = self._slab.gets(_JOURNAL)
        for what in [_ALL] if found is None else _journal_entries(found[0]):
            if not (yield from self._publish(what)):
                return
            self.apply(what)
        if found is not None:
            self._slab.cas(_JOURNAL, _encode_journal([]), found[1], ttl=None, tti=None)
        # 1 D reads word and journal  2 P appends to the journal, then moves the word  3 D must not forget P's: if P has
        # moved the word, this does nothing; if not, P does so after this, and what P appended is still there or lost.
        self._slab._word_exchange(Word.UNDELIVERED, undelivered, 0)


def _journal_entries(data: bytes) -> list[Invalidation]:
    try:
        entries = _decode_journal(data)
    except msgspec.MsgspecError:
        return [_ALL]
    return entries if all(map(_is_sound, entries)) else [_ALL]


def _is_sound(what: Invalidation) -> bool:
    """Tell whether this can have been asked for; what is read from shared places need not be ours."""
    return what.kind != "key" or is_tier_key(what.name.encode())


def applied(fields: dict[bytes, bytes]) -> tuple[Invalidation | None, bytes]:
    """Return what a stream entry makes void, and the slab that it came from; None for what is not ours."""
    kind: Any = fields.get(b"kind", b"").decode(errors="replace")
    if kind not in _COUNTERS:
        return None, b""
    what = Invalidation(kind, fields.get(b"name", b"").decode(errors="replace"))
    return (what if _is_sound(what) else None), fields.get(b"origin", b"")


# ---- what callers name ----


def tags_of(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags as a tuple, and refuse what are none. A single str is one: it would be taken for its letters."""
    if isinstance(tags, (str, bytes)):
        raise TypeError(f"tags must be a list of strings, not one {type(tags).__name__}")
    found = tuple(tags)
    for tag in found:
        if not isinstance(tag, str):
            raise TypeError(f"tags must be strings, not {type(tag).__name__}")
    return found


def key_invalidation(request: CacheableRequest) -> Invalidation:
    """Return what makes a request's response void."""
    what = Invalidation("key", tier_key(request).decode())
    request.__dict__.pop("_begun", None)  # what is stored from here on is new
    return what


def tag_invalidation(tag: str) -> Invalidation:
    """Return what makes every response of a tag void."""
    (name,) = tags_of([tag])
    return Invalidation("tag", name)
