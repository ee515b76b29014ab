"""Values that say whose they are: key, writer and number, under a checksum over every byte.

    0        8     10       12         16       20
    checksum | key | writer | sequence | length | a stretch of a fixed random pool

Neither half of another value nor another key's value passes for one; which write it came from can be read off.
"""

from __future__ import annotations

import random
import struct

import xxhash

SMALLEST = 20
LARGEST = 64 * 1024
TORN = (1 << 63) + 1  # what identify() says of bytes that no write ever stored
FOREIGN = (1 << 63) + 2  # and of another key's value
_HEAD = struct.Struct("<HHII")
_CHECKSUM = struct.Struct("<Q")
_POOL = random.Random(20).randbytes(1 << 20)
_STEP = 769  # odd: consecutive values begin at different places


def value_id(writer: int, sequence: int) -> int:
    return writer << 32 | sequence


def make(key: int, writer: int, sequence: int, size: int) -> bytes:
    """The one value of `size` bytes that this write stores."""
    begin = (key * 31 + writer * 7 + sequence) * _STEP % (len(_POOL) - LARGEST)
    rest = _HEAD.pack(key, writer, sequence, size) + _POOL[begin : begin + size - SMALLEST]
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(rest)) + rest


def identify(key: int, value: bytes) -> int:
    """The value_id() of the write that `value` came from, TORN or FOREIGN."""
    if len(value) < SMALLEST:
        return TORN
    owner, writer, sequence, size = _HEAD.unpack_from(value, 8)
    whole = size == len(value) and _CHECKSUM.unpack_from(value)[0] == xxhash.xxh3_64_intdigest(memoryview(value)[8:])
    if not whole:
        return TORN
    return value_id(writer, sequence) if owner == key else FOREIGN
