"""The history checker accepts what a cache may do and finds every kind of planted fault."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "stress"))

from history_checker import COUNTER_BITS, KeyHistory
from history_records import Log, Op, Record, Result, by_key, read
from values import FOREIGN, TORN, identify, make, value_id

KEY = 9
A, B, C = value_id(1, 1), value_id(1, 2), value_id(2, 1)
YES, NO = Result.YES, Result.NO


def call(start: int, end: int, op: Op, value: int = 0, *, result: Result = YES, extra: int = 0) -> Record:
    return Record(start, end, op, result, KEY, value, extra)


def kinds(*records: Record, strict: bool = False, counter: bool = False) -> list[str]:
    return [violation.kind for violation in KeyHistory(KEY, records, strict=strict, counter=counter).check()]


def total(of: int, increments: int) -> int:
    return (of << COUNTER_BITS) + increments


SOUND = {
    "the last value": [call(1, 2, Op.SET, A), call(3, 4, Op.SET, B), call(5, 6, Op.GET, B)],
    "either of two concurrent values": [
        call(1, 5, Op.SET, A), call(2, 4, Op.SET, B), call(6, 7, Op.GET, A), call(8, 9, Op.GET, A),
    ],
    "the old value during a set": [
        call(1, 2, Op.SET, A), call(3, 9, Op.SET, B), call(4, 5, Op.GET, A), call(6, 7, Op.GET, B),
    ],
    "a miss at any time": [call(1, 2, Op.SET, A), call(3, 4, Op.GET), call(5, 6, Op.GET, A)],
    "a value read before its set returned": [call(1, 9, Op.SET, A), call(2, 3, Op.GET, A)],
    "a cas that follows its version": [call(1, 2, Op.SET, A), call(3, 4, Op.CAS, B, extra=A), call(5, 6, Op.GET, B)],
    "a cas read before it returned": [
        call(1, 2, Op.SET, A), call(3, 9, Op.CAS, B, extra=A), call(4, 5, Op.GET, B), call(6, 7, Op.CAS, C, extra=B),
    ],
    "two adds with an eviction between": [call(1, 2, Op.ADD, A), call(3, 4, Op.ADD, B)],
    "a fill with nothing in between": [call(1, 2, Op.GET), call(5, 6, Op.FILL, A, extra=2), call(7, 8, Op.GET, A)],
    "a fill that a concurrent set follows": [
        call(1, 2, Op.GET), call(3, 9, Op.SET, B), call(5, 6, Op.FILL, A, extra=2),
    ],
    "a refused fill": [
        call(1, 2, Op.GET), call(3, 4, Op.SET, C), call(5, 6, Op.FILL, A, result=NO, extra=2), call(7, 8, Op.GET, C),
    ],
    "a call that gave up": [call(1, 2, Op.SET, A), call(3, 4, Op.SET, B, result=Result.BUSY), call(5, 6, Op.GET, A)],
}  # fmt: skip

FAULTS = {
    "torn value": [call(1, 2, Op.SET, A), call(3, 4, Op.GET, TORN)],
    "another key's value": [call(1, 2, Op.SET, A), call(3, 4, Op.GET, FOREIGN)],
    "value that no completed write stored": [call(1, 2, Op.SET, A, result=NO), call(3, 4, Op.GET, A)],
    "value from the future": [call(1, 2, Op.GET, A), call(3, 4, Op.SET, A)],
    "stale value": [call(1, 2, Op.SET, A), call(3, 4, Op.SET, B), call(5, 6, Op.GET, A)],
    "value consumed twice": [
        call(1, 2, Op.SET, A), call(3, 9, Op.CAS, B, extra=A), call(3, 9, Op.CAS, C, extra=A),
    ],
    "two values current at once": [
        call(1, 20, Op.SET, A), call(2, 20, Op.SET, B), call(3, 4, Op.GET, A), call(5, 6, Op.GET, B),
        call(7, 8, Op.GET, B), call(9, 10, Op.GET, A),
    ],
    "a value read both before and after another one": [
        call(1, 2, Op.SET, A), call(3, 4, Op.DELETE), call(5, 6, Op.GET, A),
    ],
    "fill after a write that followed its token": [
        call(1, 2, Op.GET), call(3, 4, Op.SET, B), call(5, 6, Op.FILL, A, extra=2),
    ],
    "found, where nothing can have been": [call(1, 2, Op.SET, A), call(3, 4, Op.DELETE), call(5, 6, Op.CONTAINS)],
    "one version, two values": [
        call(1, 2, Op.SET, A), call(3, 4, Op.GET, A, extra=7), call(5, 6, Op.SET, B), call(7, 8, Op.GET, B, extra=7),
    ],
}  # fmt: skip

STRICT_FAULTS = {
    "not found, where nothing was removed": [call(1, 2, Op.ADD, A), call(3, 4, Op.ADD, B)],
    "found, where nothing can have been": [call(1, 2, Op.ADD, A, result=NO)],
}

COUNTER_FAULTS = {
    "one sum, two increments": [
        call(1, 2, Op.ADD, A), call(3, 9, Op.INCR, total(A, 1)), call(3, 9, Op.INCR, total(A, 1)),
    ],
    "increment lost": [
        call(1, 2, Op.ADD, A), call(3, 4, Op.INCR, total(A, 2)), call(5, 6, Op.INCR, total(A, 1)),
    ],
    "stale value": [
        call(1, 2, Op.ADD, A), call(3, 4, Op.DELETE), call(5, 6, Op.ADD, B), call(7, 8, Op.INCR, total(A, 1)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_accepts(name: str) -> None:
    assert kinds(*SOUND[name]) == []


@pytest.mark.parametrize("kind", FAULTS)
def test_finds(kind: str) -> None:
    assert kind in kinds(*FAULTS[kind])


@pytest.mark.parametrize("kind", STRICT_FAULTS)
def test_finds_where_nothing_is_evicted(kind: str) -> None:
    assert kind in kinds(*STRICT_FAULTS[kind], strict=True)


@pytest.mark.parametrize("kind", COUNTER_FAULTS)
def test_finds_in_counters(kind: str) -> None:
    assert kind in kinds(*COUNTER_FAULTS[kind], counter=True)


def test_a_removal_hides_from_the_stale_check_only_what_overlaps_it() -> None:
    assert kinds(call(1, 2, Op.SET, A), call(3, 6, Op.DELETE), call(5, 7, Op.GET, A)) == []
    assert kinds(call(1, 2, Op.SET, A), call(3, 4, Op.CLEAR), call(5, 7, Op.GET, A)) != []


def test_misses_that_nothing_explains_are_counted_but_allowed() -> None:
    history = KeyHistory(KEY, [call(1, 2, Op.SET, A), call(3, 4, Op.GET)], strict=True)
    assert history.check() == []
    assert history.unexplained_misses == 1


class _Cache:
    """A correct cache of one key, each call taking effect at one point of its interval; `lag` makes reads stale."""

    def __init__(self, seed: int, lag: float = 0.0) -> None:
        self._random = random.Random(seed)
        self._lag = lag
        self._now: tuple[int, int] = (0, 0)  # value and the one before it
        self._sequence = 0

    def history(self, calls: int) -> list[Record]:
        points = sorted(self._random.sample(range(10, 10 + 50 * calls), calls))
        return [self._call(point) for point in points]

    def _call(self, point: int) -> Record:
        start, end = point - self._random.randrange(1, 200), point + self._random.randrange(1, 200)
        current, previous = self._now
        if self._random.random() < 0.02:
            current = 0  # evicted
        draw = self._random.random()
        if draw < 0.5:
            seen = previous if self._random.random() < self._lag else current
            self._now = (current, previous)
            return call(start, end, Op.GET, seen)
        if draw < 0.6:
            self._now = (0, current)
            return call(start, end, Op.DELETE, result=YES if current else NO)
        self._sequence += 1
        new = value_id(1, self._sequence)
        self._now = (new, current or previous)
        if draw < 0.7 and current:
            return call(start, end, Op.CAS, new, extra=current)
        return call(start, end, Op.SET, new)


@pytest.mark.parametrize("seed", range(20))
def test_accepts_random_histories_of_a_correct_cache(seed: int) -> None:
    assert kinds(*_Cache(seed).history(2000)) == []


@pytest.mark.parametrize("seed", range(5))
def test_finds_stale_reads_in_random_histories(seed: int) -> None:
    assert kinds(*_Cache(seed, lag=0.1).history(2000)) != []


@pytest.mark.parametrize("size", [20, 21, 1000, 65_536])
def test_a_value_tells_its_write(size: int) -> None:
    value = make(KEY, 3, 77, size)
    assert len(value) == size
    assert identify(KEY, value) == value_id(3, 77)
    assert identify(KEY + 1, value) == FOREIGN


@pytest.mark.parametrize("at", [0, 9, 25, 500, 999])
def test_a_value_with_another_ones_byte_is_torn(at: int) -> None:
    value = bytearray(make(KEY, 3, 77, 1000))
    value[at] ^= 1
    assert identify(KEY, bytes(value)) == TORN
    assert identify(KEY, bytes(value[:-1])) == TORN


def test_values_of_two_writes_share_no_half() -> None:
    first, second = make(KEY, 1, 1, 4000), make(KEY, 1, 2, 4000)
    assert identify(KEY, first[:2000] + second[2000:]) == TORN


def test_records_survive_the_file(tmp_path: Path) -> None:
    log = Log()
    log.add(1, 2, Op.FILL, YES, KEY, A, 1 << 60)
    log.add(3, 4, Op.CLEAR, YES, 0xFFFF)
    log.write(tmp_path / "log")
    fill, clear = read(tmp_path / "log")
    assert fill == Record(1, 2, Op.FILL, YES, KEY, A, 1 << 60)
    assert by_key([fill, clear]) == {KEY: [fill, clear]}
