"""One process of the history run: random calls on few keys, each written down with its interval."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from time import monotonic_ns

import values
from history_checker import COUNTER_BITS
from history_records import EVERY_KEY, Log, Op, Result

from llm_edge_cache import SharedSlab
from llm_edge_cache.errors import SlabBusyError

MANY = 8


@dataclasses.dataclass(frozen=True)
class Mix:
    """What a round asks for. Keys 0..counters-1 are counters, then come `hot` keys, then `cold` ones."""

    counters: int
    hot: int
    cold: int
    cold_share: float  # of the calls
    sizes: tuple[int, ...]  # one is drawn evenly, then up to an eighth is taken off
    clears: bool = True
    roles: bool = False  # every other worker mostly reads, the others mostly write: most races for the same memory

    def is_counter(self, key: int) -> bool:
        return key < self.counters


def key_name(key: int) -> bytes:
    return b"history-%d" % key


class Worker:
    """`number` tells the writers of a run apart: with a sequence number it names every value."""

    def __init__(self, slab: SharedSlab, number: int) -> None:
        self._slab = slab
        self._number = number
        self._sequence = 0
        self._log = Log()
        self.calls = 0
        self.busy = 0

    def run(self, mix: Mix, seed: int, calls: int, path: Path) -> None:
        """Makes `calls` calls and writes their records to `path`."""
        self._random = random.Random(seed)
        self._mix = mix
        table = self._table()
        choose, pause = self._random.choice, self._random.random
        until = self.calls + calls
        while self.calls < until:
            choose(table)()
            chance = pause()
            if chance < 0.01:
                os.sched_yield()
                if chance < 0.0005:
                    time.sleep(chance)  # up to half a millisecond
        self._log.write(path)

    def _table(self) -> list[Callable[[], None]]:
        weights: list[tuple[Callable[[], None], int]] = [
            (self._get, 330), (self._get_many, 50), (self._set, 150), (self._set_many, 10), (self._delete, 60),
            (self._add, 70), (self._gets_and_cas, 80), (self._pop, 40), (self._incr, 90), (self._token_and_fill, 70),
            (self._touch, 30), (self._contains, 20), (self._read_counter, 20), (self._delete_counter, 2),
        ]  # fmt: skip
        table = [call for call, weight in weights for _ in range(10 * weight)]
        if self._mix.roles:
            table += [self._get if self._number % 2 else self._set] * (9 * len(table))
        return table + [self._clear] * (2 if self._mix.clears else 0)

    def _key(self) -> int:
        mix, draw = self._mix, self._random.random
        if mix.cold and draw() < mix.cold_share:
            return mix.counters + mix.hot + int(draw() * mix.cold)
        return mix.counters + int(draw() * mix.hot)

    def _keys(self) -> list[int]:
        return list({self._key() for _ in range(MANY)})

    def _counter(self) -> int:
        return int(self._random.random() * self._mix.counters)

    def _new(self, key: int) -> tuple[int, bytes]:
        self._sequence += 1
        size = self._random.choice(self._mix.sizes)
        size = max(values.SMALLEST, size - int(self._random.random() * (size >> 3)))
        return values.value_id(self._number, self._sequence), values.make(key, self._number, self._sequence, size)

    def _identify(self, key: int, value: bytes | None) -> int:
        return 0 if value is None else values.identify(key, value)

    def _write(self, op: Op, key: int, value: int, call: Callable[[], object], extra: int = 0) -> None:
        """Calls and logs something that may be refused, or (with a stopped owner) give up."""
        start = monotonic_ns()
        try:
            done = Result.YES if call() else Result.NO
        except SlabBusyError:
            done = Result.BUSY
            self.busy += 1
        self._log.add(start, monotonic_ns(), op, done, key, value, extra)
        self.calls += 1

    def _get(self) -> None:
        key = self._key()
        name = key_name(key)
        start = monotonic_ns()
        value = self._slab.get(name)
        end = monotonic_ns()
        self._log.add(start, end, Op.GET, Result.YES, key, self._identify(key, value))
        self.calls += 1

    def _get_many(self) -> None:
        keys = self._keys()
        start = monotonic_ns()
        found = self._slab.get_many([key_name(key) for key in keys])
        end = monotonic_ns()
        for key in keys:
            self._log.add(start, end, Op.GET, Result.YES, key, self._identify(key, found.get(key_name(key))))
        self.calls += 1

    def _set(self) -> None:
        key = self._key()
        identity, value = self._new(key)
        self._write(Op.SET, key, identity, lambda: self._slab.set(key_name(key), value))

    def _set_many(self) -> None:
        keys = self._keys()
        identities = {key: self._new(key) for key in keys}
        mapping = {key_name(key): value for key, (_, value) in identities.items()}
        start = monotonic_ns()
        try:
            refused = set(self._slab.set_many(mapping))
        except SlabBusyError:
            # Some were stored and some were not: nobody knows which. The run has failed its bar anyway.
            self.busy += 1
            return
        end = monotonic_ns()
        for key, (identity, _) in identities.items():
            result = Result.NO if key_name(key) in refused else Result.YES
            self._log.add(start, end, Op.SET, result, key, identity)
        self.calls += 1

    def _delete(self) -> None:
        key = self._key()
        self._write(Op.DELETE, key, 0, lambda: self._slab.delete(key_name(key)))

    def _add(self) -> None:
        key = self._key()
        identity, value = self._new(key)
        self._write(Op.ADD, key, identity, lambda: self._slab.add(key_name(key), value))

    def _gets_and_cas(self) -> None:
        key = self._key()
        name = key_name(key)
        start = monotonic_ns()
        found = self._slab.gets(name)
        end = monotonic_ns()
        self.calls += 1
        if found is None:
            self._log.add(start, end, Op.GET, Result.YES, key)
            return
        expected = self._identify(key, found[0])
        self._log.add(start, end, Op.GET, Result.YES, key, expected, found[1])
        identity, value = self._new(key)
        self._write(Op.CAS, key, identity, lambda: self._slab.cas(name, value, found[1]), expected)

    def _pop(self) -> None:
        key = self._key()
        start = monotonic_ns()
        try:
            value = self._slab.pop(key_name(key))
        except SlabBusyError:
            self.busy += 1
            return
        end = monotonic_ns()
        result = Result.NO if value is None else Result.YES
        self._log.add(start, end, Op.POP, result, key, self._identify(key, value))
        self.calls += 1

    def _token_and_fill(self) -> None:
        key = self._key()
        name = key_name(key)
        start = monotonic_ns()
        found, token = self._slab.get_or_token(name)
        end = monotonic_ns()
        self._log.add(start, end, Op.GET, Result.YES, key, self._identify(key, found))
        self.calls += 1
        if self._random.random() < 0.2:
            os.sched_yield()
        if found is None or self._random.random() < 0.3:
            identity, value = self._new(key)
            self._write(Op.FILL, key, identity, lambda: self._slab.fill(name, value, token), end)

    def _touch(self) -> None:
        key = self._key()
        self._write(Op.TOUCH, key, 0, lambda: self._slab.touch(key_name(key), 3600.0))

    def _contains(self) -> None:
        key = self._key()
        self._write(Op.CONTAINS, key, 0, lambda: key_name(key) in self._slab)

    def _clear(self) -> None:
        def clear() -> bool:
            self._slab.clear()
            return True

        self._write(Op.CLEAR, EVERY_KEY, 0, clear)

    def _incr(self) -> None:
        key = self._counter()
        start = monotonic_ns()
        try:
            total = self._slab.incr(key_name(key))
            result = Result.YES
        except KeyError:
            total, result = 0, Result.NO
        except SlabBusyError:
            self.busy += 1
            return
        self._log.add(start, monotonic_ns(), Op.INCR, result, key, total)
        self.calls += 1
        if result == Result.NO:
            self._make_counter(key)

    def _make_counter(self, key: int) -> None:
        self._sequence += 1
        identity = values.value_id(self._number, self._sequence)
        first = b"%d" % (identity << COUNTER_BITS)
        self._write(Op.ADD, key, identity, lambda: self._slab.add(key_name(key), first))

    def _read_counter(self) -> None:
        key = self._counter()
        start = monotonic_ns()
        value = self._slab.get(key_name(key))
        end = monotonic_ns()
        self._log.add(start, end, Op.GET, Result.YES, key, 0 if value is None else int(value))
        self.calls += 1

    def _delete_counter(self) -> None:
        key = self._counter()
        self._write(Op.DELETE, key, 0, lambda: self._slab.delete(key_name(key)))
