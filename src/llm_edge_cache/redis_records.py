"""What lies under a key in Redis, and the scripts that change it. Each script touches exactly one key.

Everything is ordered by one logical clock: the ids of the invalidation stream, as 16 hexadecimal digits. A computation
*begins* at the largest id that its host knew of; a value is void once something it depends on was invalidated under a
larger id.

    V <begin:16> <guard ms:13> <entry>             a value; the entry is `codec`'s
    X <floor:16>                                   a tombstone: whatever began before `floor` must not be stored
    L <floor:16> <token:32> <deadline ms:13>       a lease: its holder computes this value; keeps the floor meanwhile
    L <floor:16> <token:32> <deadline ms:13> V...  the same, and behind it the value that is stale: for who may serve
                                                   that meanwhile, and for all if the computation fails

A value takes the place of a tombstone and goes on refusing what the tombstone refused, also once it is stale: the
record stays until `guard`, the end of the tombstone's life. Otherwise: 1 A computes an old K, its write hangs  2 K is
invalidated  3 a new K with a ttl of a second is stored, and expires  4 A's write arrives, and nothing refuses it.

A writer without a lease is refused by a larger floor or a value that began later. The holder of a lease is refused when
the record is no longer its own lease or its deadline has passed: so eviction, a flush, an invalidation and another
host's take-over all refuse it, and nothing needs to be kept for ever. Deadlines are the server's own clock (TIME).

The lease is that of memcached: R. Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, section 3.2.1.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from llm_edge_cache.redis_client import LuaScript

__all__ = [
    "CLAIM",
    "DISCARD",
    "DISCARD_STREAM",
    "HEADER_BYTES",
    "IDENTITY_BYTES",
    "NO_ID",
    "RAISE",
    "RELEASE",
    "RENEW",
    "TOMBSTONE",
    "WRITE",
    "Value",
    "pack_id",
    "parse_id",
    "parse_value",
    "stream_id",
    "text_of_id",
]

HEADER_BYTES: Final = 30
IDENTITY_BYTES: Final = 39
"""What tells one value of a key from another: its header, and the checksum that its entry begins with."""
NO_ID: Final = b"0" * 16
_SEQUENCE_BITS: Final = 20  # beside 44 for milliseconds: until the year 2248 within a signed word
_VALUE: Final = re.compile(rb"V[0-7][0-9a-f]{15}[0-9]{13}")
_PLACEHOLDER: Final = re.compile(rb"X[0-9a-f]{16}|L[0-9a-f]{48}[0-9]{13}(?:V.*)?", re.DOTALL)
_ID: Final = re.compile(rb"[0-7][0-9a-f]{15}")


def pack_id(stream: object) -> int:
    """Return a stream id (b"1700000000000-5") as one integer of 64 bits that sorts alike.

    Where the server's clock steps back, its stream counts on within the last millisecond until the clock has come up
    again; a sequence number beyond 1,048,575 counts as that.

    Raises:
        ValueError: it is none, or none that a server made by its clock.
    """
    if not isinstance(stream, bytes):
        raise ValueError(f"a stream id is bytes, not {type(stream).__name__}")
    milliseconds, _, sequence = stream.partition(b"-")
    packed = int(milliseconds) << _SEQUENCE_BITS | min(int(sequence or b"0"), (1 << _SEQUENCE_BITS) - 1)
    if not 0 < packed < 1 << 63:
        raise ValueError("a stream id of no server's clock")
    return packed


def stream_id(packed: int) -> bytes:
    """Return the stream id of `pack_id`'s integer."""
    return b"%d-%d" % (packed >> _SEQUENCE_BITS, packed & ((1 << _SEQUENCE_BITS) - 1))


def text_of_id(packed: int) -> bytes:
    """Return the 16 digits that records hold; they compare as the integers do."""
    return b"%016x" % packed


def parse_id(text: object) -> int | None:
    """Return the id that `text_of_id` wrote down; None for anything else."""
    return int(text, 16) if isinstance(text, bytes) and _ID.fullmatch(text) else None


class Value(NamedTuple):
    """A value as it lay in Redis."""

    begin: int
    """The packed id at which its computation began."""
    data: bytes
    """The entry, as `codec` made it."""


def parse_value(record: bytes | None) -> Value | None:
    """Return the value that a record holds; None for none, a tombstone or a lease, whatever is behind that.

    Raises:
        TypeError: the record is not even bytes.
        ValueError: the record is none of ours.
    """
    if record is None:
        return None
    if _VALUE.match(record):
        return Value(int(record[1:17], 16), record[HEADER_BYTES:])
    if _PLACEHOLDER.fullmatch(record):
        return None
    raise ValueError("a record of an unknown kind")


# Shared by the scripts: the record's kind, floor and token, and whether its lease holds.
# A key of another type (a stranger's list) counts as absent, and is replaced; so does a record without a floor. A lease
# for much longer than any that is given out holds nobody up: a stranger wrote it, or the server's clock was set back.
_HEAD: Final = """
local head = redis.pcall('GETRANGE', KEYS[1], 0, 100)
local is_strange = type(head) ~= 'string'
if is_strange then redis.call('DEL', KEYS[1]); head = '' end
local kind, floor, token = string.sub(head, 1, 1), string.sub(head, 2, 17), string.sub(head, 18, 49)
if (kind ~= 'V' and kind ~= 'X' and kind ~= 'L') or #floor ~= 16 or string.find(floor, '[^0-9a-f]') or floor >= '8' then
  is_strange = is_strange or head ~= ''
  kind, floor = '', '0000000000000000'
end
local function now() local t = redis.call('TIME'); return t[1] * 1000 + math.floor(t[2] / 1000) end
local function left() return (tonumber(string.sub(head, 50, 62)) or 0) - now() end
local function leased() return kind == 'L' and left() > 0 and left() < 10000 end
local behind = kind == 'L' and string.sub(head, 63) or ''
-- Where the record has its guard, counted from 0: that of a value, or of the one behind a lease.
local guard_at = kind == 'V' and 17 or (string.sub(behind, 1, 1) == 'V' and 79) or nil
local function guard()
  if guard_at then return tonumber(string.sub(head, guard_at + 1, guard_at + 13)) or 0 end
  if kind == '' or floor == '0000000000000000' then return 0 end
  return now() + redis.call('PTTL', KEYS[1])
end
-- How long the record is to be kept: the floor's protection must not end before the tombstone's life would have. What a
-- stranger wrote is not kept for longer than any tombstone lives.
local function life(ms, guarded) return math.max(tonumber(ms), math.min(guarded - now(), 1000000)) end
"""

WRITE: Final = LuaScript(
    _HEAD
    + """
-- begin, token or '', milliseconds to live, entry -> 1 stored, 0 refused
local begin = ARGV[1]
if ARGV[2] ~= '' then
  if not leased() or token ~= ARGV[2] then return 0 end
  -- The lease was given after the floor was set, whatever id the holder's host knew of by then.
  if begin < floor then begin = floor end
elseif begin < floor then return 0 end
local guarded = guard()
redis.call('SET', KEYS[1], 'V' .. begin .. string.format('%013.0f', guarded) .. ARGV[4], 'PX', life(ARGV[3], guarded))
return 1
"""
)

CLAIM: Final = LuaScript(
    _HEAD
    + """
-- token, lease in milliseconds, identity of a value that the caller knows or '', 'stale' if that is to be kept behind
-- the lease, '' if it is void
-- -> a value's record; a negative number: leased to another, for so many milliseconds; that number and the record of
--    the value behind the lease; 1: leased to the caller; 2: the same, and what a stranger had written is gone
local function is_known(record) return ARGV[3] ~= '' and string.sub(record, 1, #ARGV[3]) == ARGV[3] end
if kind == 'V' and not is_known(head) then return redis.call('GET', KEYS[1]) end
local is_news = behind ~= '' and not is_known(behind)
if leased() and token ~= ARGV[1] then
  local busy = -math.max(1, left())
  if is_news then return {busy, redis.call('GETRANGE', KEYS[1], 62, -1)} end
  return busy
end
-- Its holder is gone, and the value would go with it: 1 A leases K, which is stale  2 A dies  3 B leases K, fails, and
-- would have served the stale one.
if is_news and token ~= ARGV[1] then return redis.call('GETRANGE', KEYS[1], 62, -1) end
local kept, ms = '', life(ARGV[2], guard())
if ARGV[4] == 'stale' and (kind == 'V' or behind ~= '') then
  kept = redis.call('GETRANGE', KEYS[1], kind == 'V' and 0 or 62, -1)
  ms = math.max(ms, redis.call('PTTL', KEYS[1]))
end
redis.call('SET', KEYS[1], 'L' .. floor .. ARGV[1] .. string.format('%013.0f', now() + ARGV[2]) .. kept, 'PX', ms)
return is_strange and 2 or 1
"""
)

RENEW: Final = LuaScript(
    _HEAD
    + """
-- token, lease in milliseconds -> 1 renewed, 0 lost
if not leased() or token ~= ARGV[1] then return 0 end
redis.call('SETRANGE', KEYS[1], 49, string.format('%013.0f', now() + ARGV[2]))
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[2]), redis.call('PTTL', KEYS[1])))
return 1
"""
)

RELEASE: Final = LuaScript(
    _HEAD
    + """
-- token -> 1 released, 0 was not the caller's
if kind ~= 'L' or token ~= ARGV[1] then return 0 end
local left = redis.call('PTTL', KEYS[1])
if left > 0 and behind ~= '' then redis.call('SET', KEYS[1], redis.call('GETRANGE', KEYS[1], 62, -1), 'PX', left)
elseif floor == '0000000000000000' or left <= 0 then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], 'X' .. floor, 'PX', left) end
return 1
"""
)

TOMBSTONE: Final = LuaScript(
    _HEAD
    + """
-- id, milliseconds to live -> 1 set, 0 what is there began later
if kind ~= '' and floor >= ARGV[1] then
  -- It stays, and refuses for as long as the tombstone would have.
  if guard_at then redis.call('SETRANGE', KEYS[1], guard_at, string.format('%013.0f', now() + ARGV[2])) end
  if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return 0
end
redis.call('SET', KEYS[1], 'X' .. ARGV[1], 'PX', ARGV[2])
return 1
"""
)

RAISE: Final = LuaScript("""
-- id, milliseconds to live or 0 (for ever) -> the id that stands now
local id = redis.pcall('GET', KEYS[1])
if type(id) ~= 'string' or #id ~= 16 or string.find(id, '[^0-9a-f]') or id >= '8' or id < ARGV[1] then id = ARGV[1] end
if ARGV[2] == '0' then redis.call('SET', KEYS[1], id)
else redis.call('SET', KEYS[1], id, 'PX', math.max(tonumber(ARGV[2]), redis.call('PTTL', KEYS[1]))) end
return id
""")

DISCARD: Final = LuaScript(
    _HEAD
    + """
-- first bytes and length of what was found to be nobody's -> 1 deleted, 0 something else is there by now
-- Not DEL: 1 P reads garbage  2 Q invalidates, sets a tombstone  3 P would delete the tombstone.
if string.sub(head, 1, #ARGV[1]) ~= ARGV[1] or redis.call('STRLEN', KEYS[1]) ~= tonumber(ARGV[2]) then return 0 end
return redis.call('DEL', KEYS[1])
"""
)

DISCARD_STREAM: Final = LuaScript("""
-- -> 1 deleted, 0 it is a stream by now
if redis.call('TYPE', KEYS[1]).ok == 'stream' then return 0 end
return redis.call('DEL', KEYS[1])
""")
