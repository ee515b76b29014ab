"""The cache's decisions in L1 and between the tiers, without I/O: what both faces of the manager share.

A response is *fresh* until its entry's `expires_at`; L1 holds an entry for at most its own ttl, so its life there can
only be shorter. An entry that carries tags is void once one of them was invalidated after it began (`Word.TAG_EPOCH`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from llm_edge_cache.codec import UNREADABLE, CodecError, Entry, EntryCodec, seal, unsealed
from llm_edge_cache.deferred import Write
from llm_edge_cache.effects import Steps
from llm_edge_cache.errors import SlabBusyError
from llm_edge_cache.invalidation import tag_hash
from llm_edge_cache.lookup import L1Hit, L2Hit, LookupResult, Miss
from llm_edge_cache.model import CachedResponse
from llm_edge_cache.redis_tier import BAD, Found, RedisTier
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.settings import L1Config, L2Config

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["Begun", "Core", "Lives", "Look"]

_MISS: Final = Miss()

# As plain ints: an IntEnum's member costs the hot path a conversion each.
_L1_HITS: Final = int(Counter.L1_HITS)
_L1_MISSES: Final = int(Counter.L1_MISSES)
_L1_TIMES: Final = int(Histogram.L1)
_TIME_SAVED: Final = int(Counter.MICROSECONDS_SAVED)
_PROMPT_SAVED: Final = int(Counter.PROMPT_TOKENS_SAVED)
_ANSWER_SAVED: Final = int(Counter.COMPLETION_TOKENS_SAVED)
_CONTACT: Final = int(Word.CONTACT)


class Begun(NamedTuple):
    """When something began that may be stored later, on every clock that an invalidation moves."""

    fence: int
    """The slab's fence of the key: moved by a deletion, a clear, and a take-over of its flight."""
    epoch: int
    """`Word.TAG_EPOCH`."""
    begin: int
    """`Word.BEGIN`."""
    began_ns: int


class Look(NamedTuple):
    """What L1 said where it had no response that could be served."""

    key: bytes
    token: int
    """For filling L1 with what L2 has: moved by whatever changes the key."""
    begun: Begun
    entry: Entry | None
    """An entry that is stale, or needs to be verified in L2."""
    is_unverified: bool = False


class Lives(NamedTuple):
    """How long a value lives, in seconds from now; None = without end."""

    l1: float | None
    """In L1."""
    l2: float
    """In Redis."""
    valid_l1: float | None
    """Until the copy in L1 is stale."""
    valid_l2: float
    """Until the copy in Redis is stale."""


class Core:
    """L1 of one process, and the rules between the tiers."""

    def __init__(
        self, slab: SharedSlab, l1: L1Config, l2: L2Config | None, tier: RedisTier | None, codec: EntryCodec
    ) -> None:
        """Keep entries in this slab, and promote from this tier."""
        self.slab: Final = slab
        self.codec: Final = codec
        self._l1 = l1
        self._l2 = l2
        self._tier = tier
        self._read = codec.read
        self._get = slab.get
        self._record = slab._record
        self.trusted_ns: Final = 0 if l2 is None else round(l2.staleness_seconds * 1e9)
        """For how long after the last contact with Redis nothing in L1 needs to be verified; 0: nothing ever does."""

    # ---- L1 ----

    def look(self, key: bytes) -> L1Hit | Look | None:  # noqa: PLR0911 - the hot path: one check, one way out
        """Look a key up in L1, and count it.

        Returns:
            The hit; None for a negative entry that holds; else what the slow path needs.
        """
        start = time.monotonic_ns()
        get, read, record = self._get, self._read, self._record  # Python 3.11 is slow at calling an instance's values
        data = get(key)
        if data is None:
            return self._missed(key, data, start, None)
        try:
            entry = read(data)
        except UNREADABLE:  # compressed, or no entry
            other = self._unpacked(key, data)
            if other is None:
                return self._missed(key, data, start, None)
            entry = other
        if entry.generations and self._is_overtaken(entry):
            self.slab._count(Counter.L1_EXPIRED_TAGS)
            return self._missed(key, data, start, None)
        is_unverified = self.trusted_ns != 0 and self._needs_verifying(start)
        expires_at = entry.expires_at
        if expires_at is not None and expires_at <= time.time():
            # What is stale must not be served unverified either: Redis, which answers, has something newer or nothing.
            return self._missed(key, data, start, None if is_unverified else entry)
        if is_unverified:
            return self._missed(key, data, start, entry, is_unverified=True)
        if entry.is_negative:
            record(_L1_HITS, _L1_TIMES, start)
            return None
        response = entry.response
        tokens = response.tokens
        if tokens is None:
            record(_L1_HITS, _L1_TIMES, start, _TIME_SAVED, entry.microseconds)
        else:
            prompt, answer = tokens.prompt_tokens, tokens.completion_tokens
            record(
                _L1_HITS,
                _L1_TIMES,
                start,
                _TIME_SAVED,
                entry.microseconds,
                _PROMPT_SAVED,
                prompt,
                _ANSWER_SAVED,
                answer,
            )
        return L1Hit(response)

    def count_saved(self, entry: Entry) -> None:
        """Count what a computation that was not needed would have cost."""
        count, tokens = self.slab._count, entry.response.tokens
        count(_TIME_SAVED, entry.microseconds)
        if tokens is not None:
            count(_PROMPT_SAVED, tokens.prompt_tokens)
            count(_ANSWER_SAVED, tokens.completion_tokens)

    def _missed(
        self, key: bytes, data: bytes | None, start: int, entry: Entry | None, *, is_unverified: bool = False
    ) -> L1Hit | Look | None:
        begun, token = self.begin(key), self.slab._token(key)
        # The token cost a hit too much, so it comes late, and what was seen is looked at again: 1 R finds nothing
        # 2 W stores  3 R takes the token  4 R reads what Redis had before, and its fill fits the token.
        if key in self.slab if data is None else self._get(key) != data:
            return self.look(key)
        self._record(_L1_MISSES, _L1_TIMES, start)
        return Look(key, token, begun, entry, is_unverified)

    def begin(self, key: bytes) -> Begun:
        """Note the time on every clock that an invalidation moves, before anything is looked up or computed."""
        word = self.slab._word
        return Begun(self.slab._fence(key), word(Word.TAG_EPOCH), word(Word.BEGIN), time.monotonic_ns())

    def peek(self, key: bytes) -> tuple[Entry | None, Look]:
        """Look a key up in L1 without counting. Returns the entry if it is fresh, and what a computation needs."""
        begun = self.begin(key)
        data, token = self.slab.get_or_token(key)
        entry = None if data is None else self._unpacked(key, data)
        if entry is None or self._is_overtaken(entry):
            return None, Look(key, token, begun, None)
        is_stale = entry.expires_at is not None and entry.expires_at <= time.time()
        is_unverified = self.trusted_ns != 0 and self._needs_verifying(begun.began_ns)
        if is_stale:
            return None, Look(key, token, begun, None if is_unverified else entry)
        if is_unverified:
            return None, Look(key, token, begun, entry, is_unverified=True)
        return entry, Look(key, token, begun, None)

    def _is_overtaken(self, entry: Entry) -> bool:
        """Tell whether one of the entry's tags was invalidated after it began."""
        tag = self.slab._tag
        return any(tag(tag_hash(name)) > epoch for name, epoch in entry.generations.items())

    def has_overtaken(self, begun: Begun, key: bytes, tags: tuple[str, ...]) -> bool:
        """Tell whether the key or one of the tags was invalidated since."""
        tag = self.slab._tag
        return self.slab._fence(key) != begun.fence or any(tag(tag_hash(name)) > begun.epoch for name in tags)

    def _needs_verifying(self, now_ns: int) -> bool:
        """Tell whether an invalidation of another host may have been missed, while Redis could have told.

        The bound on staleness: while Redis can be asked, nothing is served unasked for longer than `staleness_seconds`
        after the last contact. New entries are no exception: 1 this host computes K  2 another invalidates K, which is
        not heard here  3 K is stored here.
        """
        if now_ns - self.slab._word(_CONTACT) <= self.trusted_ns:
            return False
        assert self._tier is not None
        if not self._tier.breaker.is_closed():
            return False
        self.slab._count(Counter.UNVERIFIED)
        return True

    def _unpacked(self, key: bytes, data: bytes) -> Entry | None:
        """Return the entry that L1 holds; what is none is counted and deleted."""
        try:
            return self.codec.unpack(data)
        except CodecError as error:
            self.slab._count(BAD[error.reason])
        try:
            self.slab.delete(key)
        except SlabBusyError:
            self.slab._count(Counter.L1_REFUSED)
        return None

    # ---- between the tiers ----

    def lookup_l2(self, look: Look) -> Steps[LookupResult]:
        """Go on with a look-up that L1 did not answer. An unverified entry is served if Redis does not answer."""
        if self._tier is None:
            return _MISS
        found = yield from self._tier.read(look.key)
        if isinstance(found, Found):
            self.promote(look, found)
            self.count_saved(found.entry)
            return _MISS if found.entry.is_negative else L2Hit(found.entry.response)
        if found is not None and look.is_unverified and look.entry is not None and not look.entry.is_negative:
            return L1Hit(look.entry.response)  # Redis did not answer: better this than nothing
        return _MISS

    def promote(self, look: Look, found: Found, *, stale: float = 0.0) -> None:
        """Fill L1 with what L2 had, for the rest of its life there, and so many seconds of staleness."""
        entry = found.entry
        left = None if entry.expires_at is None else entry.expires_at + stale - time.time()
        life = _shorter(self._l1.ttl_seconds, left)
        if life is not None and life <= 0:
            return
        data = unsealed(found.data)
        if entry.generations:
            generations = dict.fromkeys(entry.generations, look.begun.epoch)
            data = self.codec.pack(msgspec.structs.replace(entry, generations=generations))
        try:
            is_stored = self.slab.fill(look.key, data, look.token, ttl=life, tti=self._l1.tti_seconds)
        except SlabBusyError:
            self.slab._count(Counter.L1_REFUSED)
            return
        self.slab._count(Counter.L1_WRITES if is_stored else Counter.L1_FENCED)

    # ---- storing ----

    def lives(self, l1_ttl: float | None, l2_ttl: float | None, *, jitter: float = 1.0, stale: float = 0.0) -> Lives:
        """Work out how long a value lives.

        Without `l1_ttl` L1 keeps it for its configured ttl or as long as it is valid, whichever ends first.

        Args:
            l1_ttl: seconds in L1, or None.
            l2_ttl: seconds in Redis, or None for the configured ones.
            jitter: what all of them are multiplied by.
            stale: seconds that it is kept beyond its validity.
        """
        configured = self._l1.ttl_seconds if self._l2 is None else self._l2.ttl_seconds
        valid = l2_ttl if l2_ttl is not None and self._l2 is not None else configured
        if l1_ttl is not None:
            in_l1: float | None = l1_ttl
            valid_l1: float | None = l1_ttl if self._l2 is None or valid is None else max(l1_ttl, valid)
        else:
            in_l1 = _shorter(self._l1.ttl_seconds, valid)
            valid_l1 = valid
        if in_l1 is not None and valid_l1 is not None:
            in_l1 = in_l1 * jitter + (stale if in_l1 >= valid_l1 else 0.0)
            valid_l1 = valid_l1 * jitter
        in_l2 = 0.0 if valid is None else valid * jitter
        return Lives(in_l1, in_l2 + stale, valid_l1, in_l2)

    def keep(
        self, key: bytes, begun: Begun, entry: Entry, lives: Lives, tags: tuple[str, ...], *, lease: bytes = b""
    ) -> tuple[bool, Write | None]:
        """Store a value in L1, unless it was overtaken since it began.

        Args:
            key: 64 hexadecimal digits.
            begun: when its computation began.
            entry: without expiry and tags; those come from the next two.
            lives: how long it lives.
            tags: its tags.
            lease: the lease in Redis, if one is held.

        Returns:
            Whether it is in L1 now, and what is to be written to Redis; None when that would be refused.
        """
        now = time.time()
        stamped = _stamped(entry, now)
        local = _with(stamped, now, lives.valid_l1, dict.fromkeys(tags, begun.epoch))
        packed = self.codec.pack(local)
        is_stored = self._keep_l1(key, packed, begun, lives, tags)
        if self._l2 is None or (not is_stored and self.has_overtaken(begun, key, tags)):
            return is_stored, None
        if tags or lives.valid_l1 != lives.valid_l2:
            packed = self.codec.pack(_with(stamped, now, lives.valid_l2, dict.fromkeys(tags, begun.begin)))
        return is_stored, Write(key, seal(packed), begun.begin, begun.began_ns, now + lives.l2, tags, lease)

    def _keep_l1(self, key: bytes, data: bytes, begun: Begun, lives: Lives, tags: tuple[str, ...]) -> bool:
        if tags and self.has_overtaken(begun, key, tags):
            self.slab._count(Counter.L1_FENCED)
            return False
        try:
            is_stored = self.slab._fill_fenced(key, data, begun.fence, ttl=lives.l1, tti=self._l1.tti_seconds)
        except SlabBusyError:
            self.slab._count(Counter.L1_REFUSED)
            return False
        if is_stored:
            self.slab._count(Counter.L1_WRITES)
        else:
            is_fenced = self.slab._fence(key) != begun.fence
            self.slab._count(Counter.L1_FENCED if is_fenced else Counter.L1_REFUSED)
        return is_stored


def _shorter(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _stamped(entry: Entry, now: float) -> Entry:
    if entry.response.cached_at is not None:
        return entry
    return msgspec.structs.replace(entry, response=msgspec.structs.replace(entry.response, cached_at=now))


def _with(entry: Entry, now: float, valid: float | None, generations: dict[str, int]) -> Entry:
    expires_at = None if valid is None else now + valid
    return msgspec.structs.replace(entry, expires_at=expires_at, generations=generations)


def negative_entry(microseconds: int) -> Entry:
    """Return what stands for "there is no answer"."""
    return Entry(CachedResponse("", ""), microseconds=microseconds, is_negative=True)
