"""What a worker writes down of every call, and how it is read back: five 64-bit words a record.

    start (ns) | end (ns) | operation + result << 8 + key << 16 | value | extra

CLOCK_MONOTONIC is one clock for all processes of a host: a call whose end lies before another one's start came first.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

WORDS = 5
EVERY_KEY = 0xFFFF  # the key of a clear


class Op(IntEnum):
    """`value` and `extra` by operation; a value is a values.value_id(), 0 for none."""

    SET = 0  # value: stored. NO = refused: the old value is gone
    DELETE = 1
    ADD = 2  # value: offered
    CAS = 3  # value: offered; extra: the value whose version was expected
    INCR = 4  # value: the sum; NO = KeyError
    GET = 5  # value: returned, 0 = miss; extra: version, where gets() told it
    POP = 6  # value: returned, 0 = miss
    FILL = 7  # value: offered; extra: when the call that handed out the token had returned, ns
    CLEAR = 8
    TOUCH = 9
    CONTAINS = 10


class Result(IntEnum):
    NO = 0
    YES = 1
    BUSY = 2  # SlabBusyError: nothing changed


class Record(NamedTuple):
    start: int
    end: int
    op: Op
    result: Result
    key: int
    value: int
    extra: int


_OPS = tuple(Op)
_RESULTS = tuple(Result)


class Log:
    """Records in memory; appending one is a single call, so that logging hardly spreads the calls."""

    def __init__(self) -> None:
        self._words = array("Q")

    def add(self, start: int, end: int, op: int, result: int, key: int, value: int = 0, extra: int = 0) -> None:  # noqa: PLR0917
        self._words.extend((start, end, op | result << 8 | key << 16, value, extra))

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            self._words.tofile(file)
        self._words = array("Q")


def read(path: Path) -> Iterator[Record]:
    words = array("Q")
    words.frombytes(path.read_bytes())
    for i in range(0, len(words), WORDS):
        start, end, code, value, extra = words[i : i + WORDS]
        yield Record(start, end, _OPS[code & 0xFF], _RESULTS[code >> 8 & 0xFF], code >> 16, value, extra)


def by_key(records: Iterable[Record], part: int = 0, parts: int = 1) -> dict[int, list[Record]]:
    """Records of every key with key % parts == part; a clear is in the list of each of them."""
    keys: dict[int, list[Record]] = {}
    clears = []
    for record in records:
        if record.key == EVERY_KEY:
            clears.append(record)
        elif record.key % parts == part:
            keys.setdefault(record.key, []).append(record)
    for mine in keys.values():
        mine.extend(clears)
    return keys
