"""What the speed benchmarks read and write: keys as the product makes them, asked for with Zipf's law."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

KEYS = 10_000
ZIPF_EXPONENT = 0.99


def hex_key(number: int) -> bytes:
    """64 hex digits, as a SHA-256 of a request is."""
    return hashlib.sha256(b"bench %d" % number).hexdigest().encode()


@dataclasses.dataclass(frozen=True)
class Workload:
    """`sequence` is what a loop asks for; `ranks` names the same keys by their index in `keys`."""

    keys: list[bytes]
    ranks: list[int]
    sequence: list[bytes]
    seed: int

    @classmethod
    def zipf(cls, seed: int, requests: int, keys: int = KEYS) -> Workload:
        """Zipf(0.99) over `keys` keys. Popularity is unrelated to the order in which the key objects were made."""
        generator = random.Random(seed)
        names = [hex_key(i) for i in range(keys)]
        generator.shuffle(names)
        weights = list(itertools.accumulate((rank + 1) ** -ZIPF_EXPONENT for rank in range(keys)))
        ranks = generator.choices(range(keys), cum_weights=weights, k=requests)
        return cls(names, ranks, [names[rank] for rank in ranks], seed)


def payload(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def nanoseconds_per_call(function: Callable[[Any], object], arguments: Sequence[Any]) -> float:
    """One timed pass of the plainest loop that Python has; the loop itself is part of the figure."""
    begin = perf_counter_ns()
    for argument in arguments:
        function(argument)
    return (perf_counter_ns() - begin) / len(arguments)


def pin(core: int) -> None:
    """Keeps this process on the `core`-th of the processors it may use."""
    usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {usable[core % len(usable)]})
