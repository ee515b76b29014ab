"""The other caches, each driven the way that its own documentation shows, in its fastest form where there are several.

A contestant is filled with the workload's keys, then hands out the plainest callable it has for `get` and for `set`.
A rival that is not installed is left out of the run and named in the result.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from local_redis import LocalRedis

from llm_edge_cache import SharedSlab, SlabConfig

MiB = 1024 * 1024
SHM = Path("/dev/shm")

Get = Callable[[Any], object]
Store = Callable[[Any, bytes], object]


class Contestant:
    """`get(key)` returns the value; `store(key, value)` stores it."""

    name: str
    calls = 100_000  # of a timed pass; fewer for what takes microseconds
    str_keys = False  # it is at its best with str

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        raise NotImplementedError

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        raise NotImplementedError

    @property
    def get(self) -> Get:
        raise NotImplementedError

    @property
    def store(self) -> Store:
        raise NotImplementedError

    def time_stores(self, keys: Sequence[Any], value: bytes) -> float:
        """Nanoseconds a call, in the plainest loop."""
        store = self.store
        begin = perf_counter_ns()
        for key in keys:
            store(key, value)
        return (perf_counter_ns() - begin) / len(keys)

    def close(self) -> None:
        """Removes whatever it left on the machine."""


class Slab(Contestant):
    name = "slab"

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        # What the capacity needs and a third more: as somebody sizes it who knows the values.
        memory = 2 * MiB + max_entries * (value_bytes + 512)
        config = SlabConfig(
            memory_bytes=memory, max_entries=max_entries, ttl=3600.0, max_value_bytes=max(value_bytes, 16 * 1024)
        )
        self.slab = SharedSlab(f"bench-{os.getpid()}-{time.monotonic_ns()}", config)

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        for key, value in items:
            self.slab.set(key, value)

    @property
    def get(self) -> Get:
        return self.slab.get

    @property
    def store(self) -> Store:
        return self.slab.set

    def close(self) -> None:
        self.slab.unlink()
        self.slab.close()


class WarpCache(Contestant):
    """The decorator with its shared backend. `f(key)` is what a user calls; `f.get(key)`, which skips nothing, is no
    faster.

    Storing under the decorator means calling a function that misses; its `set(value, key)` does that without the
    function.
    """

    name = "warp_cache"
    str_keys = True

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        cache = importlib.import_module("warp_cache").cache
        before = set(SHM.glob("warp_cache*"))
        self._value = b""

        @cache(max_size=max_entries, backend="shared", max_key_size=128, max_value_size=value_bytes + 64)  # type: ignore[untyped-decorator]
        def response(key: str) -> bytes:
            return self._value

        self._cached: Any = response
        self._files = set(SHM.glob("warp_cache*")) - before
        self._cached.cache_clear()

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        for key, value in items:
            self._cached.set(value, key)

    @property
    def get(self) -> Get:
        function: Get = self._cached
        return function

    def time_stores(self, keys: Sequence[Any], value: bytes) -> float:
        store = self._cached.set
        begin = perf_counter_ns()
        for key in keys:
            store(value, key)
        return (perf_counter_ns() - begin) / len(keys)

    def close(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)


class Lmdb(Contestant):
    """On tmpfs, without syncing, on a writable map. One read transaction a get, or it would answer with the past."""

    name = "lmdb"

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        lmdb = importlib.import_module("lmdb")  # before anything is made that would stay where it is missing
        self._folder = tempfile.mkdtemp(prefix="bench-lmdb-", dir=SHM)
        self._environment: Any = lmdb.open(
            self._folder,
            map_size=64 * MiB + 4 * max_entries * (value_bytes + 4096),
            writemap=True,
            sync=False,
            metasync=False,
        )

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        with self._environment.begin(write=True) as transaction:
            for key, value in items:
                transaction.put(key, value)

    @property
    def get(self) -> Get:
        begin = self._environment.begin
        return lambda key: begin().get(key)

    @property
    def store(self) -> Store:
        begin = self._environment.begin

        def put(key: bytes, value: bytes) -> None:
            transaction = begin(write=True)
            transaction.put(key, value)
            transaction.commit()

        return put

    def close(self) -> None:
        self._environment.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class DiskCache(Contestant):
    name = "diskcache"
    calls = 5_000

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        diskcache = importlib.import_module("diskcache")
        self._folder = tempfile.mkdtemp(prefix="bench-diskcache-", dir=SHM)
        self._cache: Any = diskcache.Cache(self._folder, size_limit=64 * MiB + 4 * max_entries * (value_bytes + 4096))

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        with self._cache.transact():
            for key, value in items:
                self._cache.set(key, value)

    @property
    def get(self) -> Get:
        function: Get = self._cache.get
        return function

    @property
    def store(self) -> Store:
        function: Store = self._cache.set
        return function

    def close(self) -> None:
        self._cache.close()
        shutil.rmtree(self._folder, ignore_errors=True)


class RedisSocket(Contestant):
    """redis-py with its own parser over a Unix socket; the server may use the other processor."""

    name = "redis-py"
    calls = 3_000

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        redis = importlib.import_module("redis")
        self._server = LocalRedis()
        self._client: Any = redis.Redis(unix_socket_path=self._server.socket)
        self._client.ping()

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        pipeline = self._client.pipeline(transaction=False)
        for number, (key, value) in enumerate(items):
            pipeline.set(key, value)
            if number % 500 == 499:
                pipeline.execute()
        pipeline.execute()

    @property
    def get(self) -> Get:
        function: Get = self._client.get
        return function

    @property
    def store(self) -> Store:
        function: Store = self._client.set
        return function

    def close(self) -> None:
        self._client.close()
        self._server.close()


class CacheBox(Contestant):
    """In-process: it returns a reference to the stored object and shares with nobody."""

    name = "cachebox"

    def __init__(self, max_entries: int, value_bytes: int) -> None:
        self._cache: Any = importlib.import_module("cachebox").LRUCache(max_entries)

    def fill(self, items: Iterable[tuple[Any, bytes]]) -> None:
        for key, value in items:
            self._cache[key] = value

    @property
    def get(self) -> Get:
        function: Get = self._cache.get
        return function

    @property
    def store(self) -> Store:
        function: Store = self._cache.insert
        return function


RIVALS: tuple[type[Contestant], ...] = (WarpCache, Lmdb, DiskCache, RedisSocket, CacheBox)
DISTRIBUTIONS = ("lmdb", "warp-cache", "diskcache", "redis", "hiredis", "cachebox")


def contestants(max_entries: int, value_bytes: int) -> tuple[list[Contestant], list[str]]:
    """The slab and every rival that can be had, and why the others cannot."""
    present: list[Contestant] = [Slab(max_entries, value_bytes)]
    absent = []
    for rival in RIVALS:
        try:
            present.append(rival(max_entries, value_bytes))
        except (ImportError, OSError) as error:  # noqa: PERF203 - six rounds
            absent.append(f"{rival.name}: {error}")
    return present, absent
