"""No call keeps anything of its arguments or results, whatever way it ends; no descriptor and no mapping stays."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from llm_edge_cache import SharedSlab, SlabConfig

SMALL = SlabConfig(memory_bytes=4 << 20)
ROUNDS = 300
SLACK_BYTES = 4000  # a few caches of the interpreter's own

CALLS: dict[str, Callable[[SharedSlab], Any]] = {
    "get, hit": lambda slab: slab.get(b"key"),
    "get, miss": lambda slab: slab.get(b"absent", object()),
    "get of a long value": lambda slab: slab.get(b"long"),
    "get by a bytearray": lambda slab: slab.get(bytearray(b"key")),
    "get of str": lambda slab: slab.get(cast(Any, "key")),
    "get of nothing": lambda slab: slab.get(bytearray()),
    "gets": lambda slab: slab.gets(b"key"),
    "get_or_token": lambda slab: slab.get_or_token(b"key"),
    "get_many": lambda slab: slab.get_many([b"key", bytearray(b"long"), b"absent"]),
    "get_many, broken off": lambda slab: slab.get_many([b"key", bytearray(b"key"), b""]),
    "set": lambda slab: slab.set(b"key", bytearray(b"value"), ttl=5.5),
    "set, refused": lambda slab: slab.set(b"large", bytes(1 << 20)),
    "set of a str": lambda slab: slab.set(bytearray(b"key"), cast(Any, "value")),
    "set with a wrong ttl": lambda slab: slab.set(b"key", b"value", ttl=-1),
    "set_many": lambda slab: slab.set_many({b"key": b"value", b"large": bytes(1 << 20)}),
    "set_many, broken off": lambda slab: slab.set_many({b"key": b"value", b"": b"value"}),
    "cas": lambda slab: slab.cas(b"key", b"value", 5),
    "incr": lambda slab: slab.incr(b"number", 2),
    "incr of no number": lambda slab: slab.incr(b"key"),
    "incr of nothing": lambda slab: slab.incr(b"absent"),
    "touch": lambda slab: slab.touch(bytearray(b"key"), None),
    "ttl": lambda slab: slab.ttl(b"key"),
    "delete_many": lambda slab: slab.delete_many([bytearray(b"absent"), b""]),
    "pop": lambda slab: (slab.set(b"popped", b"value"), slab.pop(b"popped"), slab.pop(b"popped")),
    "in": lambda slab: (b"key" in slab, b"absent" in slab),
    "scan": lambda slab: list(slab.scan(b"k")),
    "scan with values": lambda slab: slab._scan_entries(0, 1 << 20),
    "tags and processes": lambda slab: (slab._tag_raise(3, 3), slab._tags(), slab._mapping.processes()),
    "stats and check": lambda slab: (slab.stats(), slab.check()),
    "attach": lambda slab: SharedSlab.attach(slab.name).close(),
    "create and unlink": lambda slab: _create_and_unlink(slab.name + "-second"),
}


def _create_and_unlink(name: str) -> None:
    with SharedSlab(name, SMALL) as slab:
        slab.unlink()
        slab.get(b"key")


def _call(call: Callable[[SharedSlab], Any], slab: SharedSlab, rounds: int) -> None:
    for _ in range(rounds):
        with contextlib.suppress(TypeError, ValueError, KeyError):
            call(slab)


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_repeating_a_call_keeps_nothing(slab: SharedSlab, call: Callable[[SharedSlab], Any]) -> None:
    slab.set_many({b"key": b"x" * 100, b"long": bytes(300_000), b"number": b"1"})
    rounds = ROUNDS // 10 if call in (CALLS["attach"], CALLS["create and unlink"]) else ROUNDS
    _call(call, slab, 10)
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        _call(call, slab, 1)
        before, _ = tracemalloc.get_traced_memory()
        _call(call, slab, rounds)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < SLACK_BYTES
    assert len(os.listdir("/proc/self/fd")) <= descriptors  # others may close some of theirs meanwhile
    assert Path("/proc/self/maps").read_text().count(slab.name) == 1


def test_arguments_are_given_back(slab: SharedSlab) -> None:
    key, value, default = b"a key of this test", bytearray(b"a value"), object()
    before = [sys.getrefcount(each) for each in (key, value, default)]
    slab.set(key, value)
    slab.get(key, default)
    slab.get(b"absent", default)
    slab.get_many([key, key])
    slab.delete_many((key,))
    with contextlib.suppress(ValueError):
        slab.set(key, value, ttl=0)
    value.append(0)  # no view of it is left
    assert [sys.getrefcount(each) for each in (key, value, default)] == before


def test_a_garbage_cycle_with_an_open_slab_is_collected(name: str) -> None:
    slab = SharedSlab(name, SMALL)
    cycle: list[Any] = [slab]
    cycle.append(cycle)
    del slab, cycle
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()
