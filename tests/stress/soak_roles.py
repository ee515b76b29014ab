"""The processes of the SIGKILL soak: those that are killed, and those that survive and watch."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import monotonic_ns
from typing import NamedTuple, NoReturn

import values

from llm_edge_cache import SharedSlab
from llm_edge_cache.errors import SlabBusyError

KEYS = 200
COUNTERS = 4
WITNESSES = 48  # keys that one watcher alone writes
STALL = 50_000_000  # ns: a call that takes longer is counted


def key_name(key: int) -> bytes:
    return b"soak-%d" % key


def items_of(sizes: tuple[int, ...], seed: int) -> list[tuple[int, bytes, bytes]]:
    """(key, its name, a value that says so): made once, so that the killed processes spend their short lives in the
    kernel.
    """
    generator = random.Random(seed)
    return [
        (key, key_name(key), values.make(key, 1, sequence, generator.choice(sizes)))
        for sequence, key in enumerate(generator.choices(range(KEYS), k=4 * KEYS), 1)
    ]


class Shared(NamedTuple):
    """What a child works with; words[slot] counts the calls that returned."""

    slab: SharedSlab
    items: list[tuple[int, bytes, bytes]]
    words: memoryview
    slot: int


def _cas(slab: SharedSlab, name: bytes, value: bytes) -> None:
    if (found := slab.gets(name)) is not None:
        slab.cas(name, value, found[1])


def _count(slab: SharedSlab, name: bytes, value: bytes) -> None:
    counter = b"counter-%d" % (len(value) % COUNTERS)
    try:
        slab.incr(counter)
    except KeyError:
        slab.add(counter, b"0")


_MUTATIONS: list[tuple[Callable[[SharedSlab, bytes, bytes], object], int]] = [
    (lambda slab, name, value: slab.set(name, value), 500),
    (lambda slab, name, value: slab.delete(name), 100),
    (lambda slab, name, value: slab.add(name, value), 80),
    (_cas, 80),
    (lambda slab, name, value: slab.fill(name, value, slab.get_or_token(name)[1]), 80),
    (lambda slab, name, value: slab.pop(name), 60),
    (_count, 60),
    (lambda slab, name, value: slab.touch(name, 3600.0), 39),
]
_TABLE = [mutation for mutation, weight in _MUTATIONS for _ in range(weight)]


def _exit_with_parent(calls: int) -> None:
    """Whoever kills the parent must not leave its children at work for ever."""
    if calls % 1024 == 0 and os.getppid() == 1:
        os._exit(1)


def write_until_killed(shared: Shared, seed: int, clears: bool) -> NoReturn:
    """Any mutation in random order."""
    draw = random.Random(seed).random
    slab, items, words, slot = shared
    table = [*_TABLE, lambda slab, name, value: slab.clear()] if clears else _TABLE
    while True:
        _, name, value = items[int(draw() * len(items))]
        with contextlib.suppress(SlabBusyError):  # somebody is stopped; the watchers count these
            table[int(draw() * len(table))](slab, name, value)
        words[slot] += 1
        _exit_with_parent(words[slot])


def read_until_killed(shared: Shared, seed: int) -> NoReturn:
    draw = random.Random(seed).random
    slab, items, words, slot = shared
    while True:
        at = int(draw() * (len(items) - 8))
        slab.get(items[at][1])
        slab.get_many([name for _, name, _ in items[at : at + 8]])
        words[slot] += 1
        _exit_with_parent(words[slot])


@dataclasses.dataclass
class Findings:
    """What a watcher saw. All but `calls`, `longest_ns` and `over_50_ms` have to be 0."""

    calls: int = 0
    wrong_values: int = 0
    stale_values: int = 0  # a key of its own that did not have the value it had stored last
    lost_values: int = 0  # a key of its own that was missing where nothing is evicted
    refused: int = 0
    busy: int = 0
    longest_ns: int = 0
    over_50_ms: int = 0


class Watcher:
    """Judges everybody's values; writes, deletes and reads keys of its own and knows what they must be."""

    def __init__(self, slab: SharedSlab, number: int, seed: int, sizes: tuple[int, ...], evicting: bool) -> None:
        self._slab = slab
        self._random = random.Random(seed)
        self._writer = 100 + number
        self._sequence = 0
        self._sizes = sizes
        self._evicting = evicting
        first = KEYS + number * WITNESSES
        self._own: dict[int, bytes | None] = dict.fromkeys(range(first, first + WITNESSES))
        self.findings = Findings()

    def watch(self, pipe: Connection, words: memoryview, slot: int) -> None:
        """Until told to stop; words[slot] is its heartbeat."""
        draw = self._random.random
        while not pipe.poll():
            for _ in range(50):
                chance = draw()
                if chance < 0.5:
                    self._read_any()
                elif chance < 0.75:
                    self._read_own()
                elif chance < 0.95:
                    self._write_own()
                else:
                    self._delete_own()
                words[slot] += 1
        pipe.send(self.findings)

    def _timed(self, call: Callable[[], object]) -> object:
        """The call's result; None as well when it gave up."""
        begin = monotonic_ns()
        result: object = None
        try:
            result = call()
        except SlabBusyError:
            self.findings.busy += 1
        took = monotonic_ns() - begin
        self.findings.calls += 1
        self.findings.longest_ns = max(self.findings.longest_ns, took)
        self.findings.over_50_ms += took > STALL
        return result

    def _read_any(self) -> None:
        key = int(self._random.random() * KEYS)
        value = self._timed(lambda: self._slab.get(key_name(key)))
        if isinstance(value, bytes) and values.identify(key, value) in (values.TORN, values.FOREIGN):
            self.findings.wrong_values += 1

    def _pick(self) -> int:
        return self._random.choice(list(self._own))

    def _read_own(self) -> None:
        key = self._pick()
        value = self._timed(lambda: self._slab.get(key_name(key)))
        expected = self._own[key]
        if value == expected:
            return
        if value is not None:
            self.findings.stale_values += 1
        elif not self._evicting and not self._present_after_all(key, expected):
            self.findings.lost_values += 1
            self._own[key] = None

    def _present_after_all(self, key: int, expected: bytes | None) -> bool:
        """A read that lost all its races against writers of the same bucket misses, but not again and again."""
        for _ in range(20):
            time.sleep(0.0005)
            if self._slab.get(key_name(key)) == expected:
                return True
        return False

    def _write_own(self) -> None:
        key = self._pick()
        self._sequence += 1
        value = values.make(key, self._writer, self._sequence, self._random.choice(self._sizes))
        busy = self.findings.busy
        stored = self._timed(lambda: self._slab.set(key_name(key), value))
        if self.findings.busy == busy:
            self._own[key] = value if stored else None
            self.findings.refused += not stored

    def _delete_own(self) -> None:
        key = self._pick()
        busy = self.findings.busy
        self._timed(lambda: self._slab.delete(key_name(key)))
        if self.findings.busy == busy:
            self._own[key] = None


def run_and_exit(role: Callable[[], object]) -> NoReturn:
    """A forked child's whole life: it never returns into its parent's code."""
    try:
        role()
    finally:
        os._exit(0)
