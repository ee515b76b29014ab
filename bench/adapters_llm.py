"""The rows of bench/adapters.py for LangChain's cache and for the decorator.

Rivals that are not installed are left out; `pip install -e '.[bench]'` brings them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration
from provenance import Bar, at_least, at_most
from turns import KEYS, Call, Rounds, difference, ratio, take_turns

from llm_edge_cache import L1Config, SharedSlab, SlabConfig, SyncCacheManager, cached
from llm_edge_cache.adapters.langchain import LLMEdgeCache

MiB = 1 << 20
DISTRIBUTIONS = ("langchain-core", "langchain-community", "cachetools", "theine", "warp-cache", "diskcache", "joblib")
LLM = "[('model', 'gpt-4o'), ('temperature', 0.0)]" + " " * 400


def _slab_config(name: str) -> L1Config:
    return L1Config(name=name, memory_bytes=64 * MiB, max_capacity=8 * KEYS, ttl_seconds=None, tti_seconds=None)


def _import(name: str) -> Any:
    """Return a module, or None."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)
    return None


# ---- LangChain ----


def answer(text: str) -> list[Any]:
    message = AIMessage(
        text,
        usage_metadata={"input_tokens": 12, "output_tokens": 180, "total_tokens": 192},
        response_metadata={"model_name": "gpt-4o", "finish_reason": "stop"},
    )
    return [ChatGeneration(message=message, generation_info={"finish_reason": "stop"})]


@contextmanager
def langchain_caches() -> Iterator[dict[str, Any]]:
    """The contestants by name: ours; InMemoryCache, which hands out one object to all; SQLiteCache."""
    name = f"bench-langchain-{os.getpid()}"
    ours = LLMEdgeCache(_slab_config(name))
    community = _import("langchain_community.cache")
    with tempfile.TemporaryDirectory() as folder:
        caches: dict[str, Any] = {"slab": ours, "in memory": InMemoryCache()}
        if community is not None:
            caches["sqlite"] = community.SQLiteCache(str(Path(folder) / "cache.db"))
        try:
            yield caches
        finally:
            ours.close()
            SharedSlab(name).unlink()


def _lookup(cache: Any) -> Call:
    lookup = cache.lookup
    return lambda key: lookup(key, LLM)


def measure_langchain(rounds: int, quick: bool) -> tuple[dict[str, Rounds], list[Bar]]:
    row = "langchain: look-up of a chat answer"
    with langchain_caches() as caches:
        for cache in caches.values():
            for at in range(KEYS):
                cache.update(f"key:{at}", LLM, answer(f"{at} " + "word " * 180))
            if cache.lookup("key:1", LLM) != answer("1 " + "word " * 180):
                raise SystemExit(f"{cache} lost what it was given")
        counts = dict.fromkeys(caches, 100 if quick else 2_000)
        results = take_turns({name: _lookup(cache) for name, cache in caches.items()}, counts, rounds)
    bars = []
    if "sqlite" in caches:
        bars.append(at_least(f"{row}: times faster than sqlite", ratio(results, "sqlite", "slab"), 6.0))
    return {row: results}, bars


# ---- the decorator ----


def work(key: str) -> dict[str, Any]:
    return {"id": 42, "name": key, "tags": ["a", "b", "c"], "active": True, "score": 0.5}


def _theine() -> Call | None:
    theine = _import("theine")
    return None if theine is None else theine.Memoize(4 * KEYS, None)(work)  # type: ignore[no-any-return]


def _warp_cache() -> Call | None:
    warp_cache = _import("warp_cache")
    return None if warp_cache is None else warp_cache.cache(max_size=4 * KEYS)(work)  # type: ignore[no-any-return]


def _cachetools() -> Call | None:
    cachetools = _import("cachetools")
    return None if cachetools is None else cachetools.cached(cachetools.LRUCache(4 * KEYS))(work)  # type: ignore[no-any-return]


def _diskcache(folder: str) -> Call | None:
    diskcache = _import("diskcache")
    return None if diskcache is None else diskcache.Cache(f"{folder}/diskcache").memoize()(work)  # type: ignore[no-any-return]


def _joblib(folder: str) -> Call | None:
    joblib = _import("joblib")
    return None if joblib is None else joblib.Memory(f"{folder}/joblib", verbose=0).cache(work)  # type: ignore[no-any-return]


def _get_and_decode(slab: SharedSlab) -> Call:
    """What a hit cannot do without."""
    get, decode, encode = slab.get, msgspec.msgpack.Decoder(dict[str, Any]).decode, msgspec.msgpack.encode
    for at in range(KEYS):
        slab.set(f"key:{at}".encode(), encode(work(f"key:{at}")))
    return lambda key: decode(get(key.encode()))  # type: ignore[arg-type]


@contextmanager
def decorators() -> Iterator[dict[str, Call]]:
    name = f"bench-decorator-{os.getpid()}"
    with SyncCacheManager(_slab_config(name)) as manager, tempfile.TemporaryDirectory() as folder:
        plain = SharedSlab(f"{name}-plain", SlabConfig(memory_bytes=64 * MiB, max_entries=8 * KEYS, ttl=None))
        calls: dict[str, Call | None] = {
            "slab.get and decode": _get_and_decode(plain),
            "cached": cached(manager=manager)(work),
            "functools.lru_cache": functools.lru_cache(4 * KEYS)(work),
            "cachetools": _cachetools(),
            "theine": _theine(),
            "warp-cache": _warp_cache(),
            "diskcache": _diskcache(folder),
            "joblib.Memory": _joblib(folder),
        }
        try:
            yield {name: call for name, call in calls.items() if call is not None}
        finally:
            plain.unlink()
            manager.slab.unlink()


_SLOW = {"diskcache": 10, "joblib.Memory": 100}


def measure_decorator(rounds: int, quick: bool) -> tuple[dict[str, Rounds], list[Bar]]:
    row = "decorator: hit of a small dict"
    many = 1_000 if quick else 20_000
    with decorators() as calls:
        for call in calls.values():
            for at in range(KEYS):
                call(f"key:{at}")
        results = take_turns(calls, {name: max(100, many // _SLOW.get(name, 1)) for name in calls}, rounds)
    over = difference(results, "cached", "slab.get and decode")
    return {row: results}, [at_most(f"{row}: us over slab.get and decode", over / 1000, 1.5)]


MEASURES: tuple[Callable[[int, bool], tuple[dict[str, Rounds], list[Bar]]], ...] = (
    measure_langchain,
    measure_decorator,
)
