"""Decides whether one key's calls can have happened, one after the other, on a cache.

A cache is a register that may forget: a miss proves nothing (unless nothing could have been evicted, `strict`), but
whatever a call *returned* binds. Every stored value is unique, so each value has one writer and a set of readers, and
necessary and sufficient conditions for such a register are known (P. Gibbons, E. Korach, "Testing shared memories",
SIAM J. Comput. 26(4), 1997, section on read mappings): with `first_end` the earliest end and `last_start` the latest
start of the calls that saw a value, the value was current all through its *forward zone* [first_end, last_start]; if
first_end is the later one, it was current at some point of the *backward zone* in between. No two forward zones may
overlap and no backward zone may lie inside another value's forward zone. Removals (delete, pop, clear, a refused set)
are writes of "nothing".

Beyond that: a value is consumed at most once (two cas with one expected version, or two pops, cannot both succeed), a
fill never survives a write that lies wholly between its token and itself, sums of incr() are distinct and grow, and
calls that claim presence or absence need a write or removal that explains it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from history_records import Op, Record, Result
from values import FOREIGN, TORN

NOTHING = 0
BEFORE_ALL = -1
COUNTER_BITS = 24  # a counter's value: the id of the add() that made it << COUNTER_BITS, plus the increments since


class Violation(NamedTuple):
    kind: str
    key: int
    record: Record

    def __str__(self) -> str:
        return f"{self.kind}: key {self.key}, {self.record}"


class Change(NamedTuple):
    """A call that left `value` (or NOTHING) behind."""

    start: int
    end: int
    value: int


class _Timeline:
    """Changes ordered so that "which of them certainly lie in between" is one bisection."""

    def __init__(self, changes: Iterable[Change]) -> None:
        by_end = sorted(changes, key=lambda change: change.end)
        self._ends = [change.end for change in by_end]
        self._latest_start = list(itertools.accumulate((change.start for change in by_end), max))

    def newest_before(self, time: int) -> int:
        """The latest start of a change that had ended before `time`: what ended before that start is superseded."""
        ended = bisect.bisect_left(self._ends, time)
        return self._latest_start[ended - 1] if ended else BEFORE_ALL


class _Candidates:
    """Changes that could explain a state seen in [start, end]."""

    def __init__(self, changes: Iterable[Change]) -> None:
        by_start = sorted(changes)
        self._starts = [change.start for change in by_start]
        self._latest_end = list(itertools.accumulate((change.end for change in by_start), max))

    def explain(self, end: int, newest_before: int) -> bool:
        begun = bisect.bisect_right(self._starts, end)
        return begun > 0 and self._latest_end[begun - 1] >= newest_before


def _has_changed(record: Record) -> bool:
    if record.op in (Op.SET, Op.DELETE, Op.CLEAR):
        return True
    return record.op in (Op.ADD, Op.CAS, Op.FILL, Op.POP) and record.result == Result.YES


def _left_behind(record: Record) -> int:
    stores = record.op in (Op.SET, Op.ADD, Op.CAS, Op.FILL) and record.result == Result.YES
    return record.value if stores else NOTHING


def _seen(record: Record) -> int:
    """The value that the call found, if it tells."""
    if record.op == Op.CAS and record.result == Result.YES:
        return record.extra
    if record.op in (Op.GET, Op.POP):
        return record.value
    return NOTHING


def _claims_presence(record: Record, strict: bool) -> bool:
    if record.op in (Op.DELETE, Op.TOUCH, Op.CONTAINS, Op.INCR):
        return record.result == Result.YES
    # A refused add says False as well, so only where nothing was refused does False mean "there is one".
    return strict and record.op == Op.ADD and record.result == Result.NO


def _claims_absence(record: Record) -> bool:
    if record.op == Op.ADD:
        return record.result == Result.YES
    return record.op in (Op.DELETE, Op.INCR) and record.result == Result.NO


class KeyHistory:
    """One key's calls. `counter` keys hold numbers that incr() counts up."""

    def __init__(self, key: int, records: Iterable[Record], *, strict: bool = False, counter: bool = False) -> None:
        self._key = key
        self._strict = strict
        self._counter = counter
        self._records = [self._value_of(record) for record in records if record.result != Result.BUSY]
        self._changes = [
            (record, Change(record.start, record.end, _left_behind(record)))
            for record in self._records
            if _has_changed(record)
        ]
        self._timeline = _Timeline(change for _, change in self._changes)
        self._writes = {change.value: change for _, change in self._changes if change.value != NOTHING}
        self._present = _Candidates(self._writes.values())
        self._absent = _Candidates(
            [Change(BEFORE_ALL, BEFORE_ALL, NOTHING)]
            + [change for _, change in self._changes if change.value == NOTHING]
        )
        self.violations: list[Violation] = []
        self.unexplained_misses = 0  # allowed: a read that lost too many races misses

    def _value_of(self, record: Record) -> Record:
        """A counter's readers saw the value of the add() that made it; how far it had been counted is checked apart."""
        if not self._counter or record.op in (Op.INCR, Op.ADD, Op.SET):
            return record
        return record._replace(value=record.value >> COUNTER_BITS, extra=record.value)

    def check(self) -> list[Violation]:
        self._check_reads()
        self._check_zones()
        self._check_consumption()
        self._check_fills()
        self._check_claims()
        self._check_versions()
        if self._counter:
            self._check_counts()
        return self.violations

    def _report(self, kind: str, record: Record) -> None:
        self.violations.append(Violation(kind, self._key, record))

    def _reads(self) -> Iterable[tuple[Record, int]]:
        for record in self._records:
            if self._counter and record.op == Op.INCR and record.result == Result.YES:
                yield record, record.value >> COUNTER_BITS
            elif (value := _seen(record)) != NOTHING:
                yield record, value

    def _check_reads(self) -> None:
        """Whole, this key's, written, not from the future, not superseded before the call began."""
        for record, value in self._reads():
            write = self._writes.get(value)
            if value == TORN:
                self._report("torn value", record)
            elif value == FOREIGN:
                self._report("another key's value", record)
            elif write is None:
                self._report("value that no completed write stored", record)
            elif write.start > record.end:
                self._report("value from the future", record)
            elif write.end < self._timeline.newest_before(record.start):
                self._report("stale value", record)

    def _zones(self) -> tuple[list[Change], list[tuple[Change, Record]]]:
        """Forward zones as (first_end, last_start, value), and backward ones as (last_start, first_end, value)."""
        bounds = {
            change.value: (change.end, change.start, record)
            for record, change in self._changes
            if change.value != NOTHING
        }
        for record, value in self._reads():
            if value in bounds:
                first_end, last_start, first = bounds[value]
                bounds[value] = (min(first_end, record.end), max(last_start, record.start), first)
        forward = []
        backward = [
            (Change(change.start, change.end, NOTHING), record)
            for record, change in self._changes
            if change.value == NOTHING
        ]
        for value, (first_end, last_start, record) in bounds.items():
            if first_end < last_start:
                forward.append(Change(first_end, last_start, value))
            else:
                backward.append((Change(last_start, first_end, value), record))
        forward.sort()
        return forward, backward

    def _check_zones(self) -> None:
        forward, backward = self._zones()
        writers = {change.value: record for record, change in self._changes}
        for earlier, later in itertools.pairwise(forward):
            if later.start < earlier.end:
                self._report("two values current at once", writers[later.value])
        starts = [zone.start for zone in forward]
        for zone, record in backward:
            around = bisect.bisect_left(starts, zone.start) - 1
            if around >= 0 and zone.end < forward[around].end:
                self._report("a value read both before and after another one", record)

    def _check_consumption(self) -> None:
        consumed = set()
        for record in self._records:
            if record.op in (Op.CAS, Op.POP) and (value := _seen(record)) != NOTHING:
                if value in consumed:
                    self._report("value consumed twice", record)
                consumed.add(value)

    def _check_fills(self) -> None:
        """A delete that found nothing need not refuse a fill: there was nothing to protect."""
        writes = _Timeline(
            change for record, change in self._changes if (record.op, record.result) != (Op.DELETE, Result.NO)
        )
        for record in self._records:
            if (
                record.op == Op.FILL
                and record.result == Result.YES
                and writes.newest_before(record.start) > record.extra
            ):
                self._report("fill after a write that followed its token", record)

    def _check_claims(self) -> None:
        for record in self._records:
            newest = self._timeline.newest_before(record.start)
            if _claims_presence(record, self._strict):
                if not self._present.explain(record.end, newest):
                    self._report("found, where nothing can have been", record)
            elif self._strict and _claims_absence(record):
                if not self._absent.explain(record.end, newest):
                    self._report("not found, where nothing was removed", record)
            elif self._strict and record.op in (Op.GET, Op.POP) and record.value == NOTHING:
                self.unexplained_misses += not self._absent.explain(record.end, newest)

    def _check_versions(self) -> None:
        if self._counter:
            return
        values: dict[int, int] = {}
        for record in self._records:
            if record.op == Op.GET and record.extra and values.setdefault(record.extra, record.value) != record.value:
                self._report("one version, two values", record)

    def _check_counts(self) -> None:
        sums = [record for record in self._records if record.op == Op.INCR and record.result == Result.YES]
        for first, second in itertools.pairwise(sorted(sums, key=lambda record: record.value)):
            if first.value == second.value:
                self._report("one sum, two increments", second)
        counted = [(record, record.value if record.op == Op.INCR else record.extra) for record in self._records]
        self._check_growth([(record, count) for record, count in counted if record.op in (Op.INCR, Op.GET) and count])

    def _check_growth(self, counted: list[tuple[Record, int]]) -> None:
        """Whoever asks after an increment has returned sees it, unless the counter was made anew."""
        ended = sorted(counted, key=lambda pair: pair[0].end)
        highest: dict[int, int] = {}
        done = 0
        for record, count in sorted(counted, key=lambda pair: pair[0].start):
            while ended[done][0].end < record.start:
                maker = ended[done][1] >> COUNTER_BITS
                highest[maker] = max(highest.get(maker, 0), ended[done][1])
                done += 1
            least = highest.get(count >> COUNTER_BITS, 0) + (record.op == Op.INCR)
            if count < least:
                self._report("increment lost", record)


def check_keys(
    keys: dict[int, list[Record]], *, strict: bool, is_counter: Callable[[int], bool]
) -> tuple[list[Violation], int]:
    """Violations of all keys, and how many misses of `strict` histories nothing but a lost race explains."""
    violations: list[Violation] = []
    misses = 0
    for key, records in keys.items():
        history = KeyHistory(key, records, strict=strict, counter=is_counter(key))
        violations += history.check()
        misses += history.unexplained_misses
    return violations, misses
