"""A manager behind gunicorn that writes down all that it counts: in a file per process, beside the slab.

Answers GET requests with JSON that names the worker; see `_ROUTES`. What was counted stands in the folder that
MANAGER_APP_TALLIES names, one line a time: "counter <index> <amount>" or "histogram <index> 1".
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry

from llm_edge_cache import (
    CacheableRequest,
    CachedResponse,
    SharedSlab,
    SyncCacheManager,
    TokenUsage,
    load_settings,
    metrics,
)
from llm_edge_cache.keys import tier_key
from llm_edge_cache.native import native

LARGE = "x" * (1 << 20)


class TallyingSlab(SharedSlab):
    """Writes down what it is to count before it counts it."""

    _tallies: int

    def tally_into(self, folder: str) -> None:
        path = Path(folder) / str(os.getpid())
        self._tallies = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def _write(self, kind: str, index: int, amount: int) -> None:
        os.write(self._tallies, f"{kind} {int(index)} {int(amount)}\n".encode())  # whole, whoever is killed

    def _count(self, index: int, amount: int = 1) -> None:
        self._write("counter", index, amount)
        super()._count(index, amount)

    def _record(self, counter: int, histogram: int, start_ns: int, *pairs: int) -> None:
        self._write("counter", counter, 1)
        if histogram >= 0:
            self._write("histogram", histogram, 1)
        for index, amount in zip(pairs[::2], pairs[1::2], strict=True):
            self._write("counter", index, amount)
        super()._record(counter, histogram, start_ns, *pairs)

    def _observe(self, histogram: int, elapsed_ns: int) -> None:
        self._write("histogram", histogram, 1)
        super()._observe(histogram, elapsed_ns)


_settings = load_settings()
_slab = TallyingSlab(_settings.l1.name)
_slab.tally_into(os.environ["MANAGER_APP_TALLIES"])
cache = SyncCacheManager(_settings.l1, _settings.l2, slab=_slab)
registry = CollectorRegistry()
metrics.register(cache, registry)


class ProviderError(Exception):
    pass


def answer() -> CachedResponse:
    return CachedResponse("an answer", "m", TokenUsage(3, 4, 7))


def fail() -> CachedResponse:
    raise ProviderError


def ask(*parts: object) -> CacheableRequest:
    return CacheableRequest("m", " ".join(map(str, parts)))


def flush() -> None:
    queue = cache._engine.queue
    assert queue is not None
    queue.flush(20)


def forget(request: CacheableRequest) -> None:
    cache.slab.delete(tier_key(request))


# ---- what the test asks for ----


def _nothing() -> dict[str, Any]:
    return {}


def _look(prompt: str) -> dict[str, Any]:
    """Look up; store what is missing, and let Redis have it."""
    found = cache.lookup(ask(prompt))
    if not found.is_hit:
        cache.store(ask(prompt), answer())
    flush()
    return {"tier": found.tier}


def _use(id: str) -> dict[str, Any]:  # noqa: A002 - the query's name
    """Everything that one caller of a healthy cache can do."""
    request = ask("use", id)
    cache.lookup(request)
    cache.store(request, answer())
    cache.lookup(request)
    flush()
    forget(request)
    cache.lookup(request)
    cache.get_or_compute(ask("compute", id), answer)
    cache.get_or_compute(ask("compute", id), answer)
    cache.store(ask("tagged", id), answer(), tags=[id])
    cache.invalidate_tag(id)
    cache.lookup(ask("tagged", id))
    cache.invalidate(request)
    cache.store(ask("large", id), CachedResponse(LARGE, "m"))
    _fail(ask("failing", id))
    _stale(ask("stale", id))
    _share(ask("shared", id))
    flush()
    return {"l2_entries": cache.l2_approximate_size()}


def _fail(request: CacheableRequest) -> None:
    try:
        cache.get_or_compute(request, fail)
    except ProviderError:
        return
    raise AssertionError("it was to fail")


def _stale(request: CacheableRequest) -> None:
    cache.get_or_compute(request, answer, l1_ttl=0.05, l2_ttl=0.05, stale_if_error=60)
    flush()
    time.sleep(0.06)
    assert cache.get_or_compute(request, fail, stale_if_error=60) is not None
    assert cache.get_or_compute(request, answer, stale_while_revalidate=60) is not None
    while cache._local.flights:
        time.sleep(0.001)


def _share(request: CacheableRequest) -> None:
    def slow() -> CachedResponse:
        time.sleep(0.05)
        return answer()

    callers = [threading.Thread(target=cache.get_or_compute, args=(request, slow)) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def _overtaken(id: str) -> dict[str, Any]:  # noqa: A002
    """Responses to requests that were invalidated since they were looked up; and one that comes too late."""
    request, late = ask("overtaken", id), ask("late", id)
    cache.lookup(request)
    cache.invalidate(ask("overtaken", id))
    cache.store(request, answer())
    cache.lookup(late)
    core, begun = late.__dict__["_begun"]
    late.__dict__["_begun"] = core, begun._replace(began_ns=begun.began_ns - 3600 * 10**9)  # an hour ago
    cache.store(late, answer())
    flush()
    return {}


def _fill(count: str) -> dict[str, Any]:
    """More than L1 and the queue of deferred writes can hold, and short lives."""
    for number in range(int(count)):
        cache.store(ask("fill", number), answer(), l1_ttl=0.05)
    time.sleep(0.06)
    for number in range(int(count)):
        cache.lookup(ask("fill", number))
    flush()
    return {}


def _crowd(id: str) -> dict[str, Any]:  # noqa: A002
    """A computation while every flight record is taken."""
    joined = [cache.slab._flight_join(b"record %d" % number, 10**10) for number in range(20_000)]
    records = [(record, token) for role, record, token in joined if role == native.FLIGHT_LED]
    cache.get_or_compute(ask("crowd", id), answer)
    for record, token in records:
        cache.slab._flight_end(record, token)
    flush()
    return {"records": len(records)}


def _slow(prompt: str, seconds: str) -> dict[str, Any]:
    def compute() -> CachedResponse:
        (Path(os.environ["MANAGER_APP_TALLIES"]).parent / f"computing {prompt} {os.getpid()}").touch()
        time.sleep(float(seconds))
        return answer()

    cache.get_or_compute(ask(prompt), compute)
    flush()
    return {}


def _clear() -> dict[str, Any]:
    cache.clear_all()
    return {}


def _metrics() -> dict[str, Any]:
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {"samples": [[sample.name, sorted(sample.labels.items()), sample.value] for sample in samples]}


_ROUTES: dict[str, Callable[..., dict[str, Any]]] = {
    "/pid": _nothing,
    "/look": _look,
    "/use": _use,
    "/overtaken": _overtaken,
    "/fill": _fill,
    "/crowd": _crowd,
    "/slow": _slow,
    "/clear": _clear,
    "/metrics": _metrics,
}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    arguments = {name: values[0] for name, values in parse_qs(environ["QUERY_STRING"]).items()}
    body = json.dumps({"pid": os.getpid(), **_ROUTES[environ["PATH_INFO"]](**arguments)}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
