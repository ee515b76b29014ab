"""A small application on the shared slab, for gunicorn (``application``) and uvicorn (``asgi_application``).

Answers GET requests with JSON that names the worker:

    /pid                        nothing but that
    /set?key=k&value=v          {"stored": true}
    /get?key=k                  {"value": "v" | null}
    /write?size=n&count=m       {"stored": m'}: m values of n bytes, in turn under 4 keys of this worker's own
    /stats                      {"stats": {...}, "check": [...]}

The slab is opened at the first use, or on import with ``SLAB_APP_OPEN=import``.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from llm_edge_cache import SharedSlab

STAT_NAMES = ("entries", "hits", "misses", "sets", "recoveries", "attached_processes", "memory_bytes", "max_entries")


WRITE_KEYS = 4


@functools.cache
def slab() -> SharedSlab:
    return SharedSlab(os.environ["LLM_EDGE_CACHE_NAME"])


if os.environ.get("SLAB_APP_OPEN") == "import":
    slab()


def answer(path: str, query: str) -> bytes:
    arguments = {name: values[0] for name, values in parse_qs(query).items()}
    return json.dumps({"pid": os.getpid(), **_ROUTES[path](**arguments)}).encode()


def _pid() -> dict[str, Any]:
    return {}


def _set(key: str, value: str) -> dict[str, Any]:
    return {"stored": slab().set(key.encode(), value.encode())}


def _get(key: str) -> dict[str, Any]:
    value = slab().get(key.encode())
    return {"value": None if value is None else value.decode()}


def _write(size: str, count: str) -> dict[str, Any]:
    mark = str(os.getpid()).encode()
    value = (mark + b" ") * (int(size) // (len(mark) + 1))
    return {"stored": sum(slab().set(b"%s/%d" % (mark, i % WRITE_KEYS), value) for i in range(int(count)))}


def _stats() -> dict[str, Any]:
    stats = slab().stats()
    return {"stats": {name: getattr(stats, name) for name in STAT_NAMES}, "check": slab().check()}


_ROUTES: dict[str, Callable[..., dict[str, Any]]] = {
    "/pid": _pid,
    "/set": _set,
    "/get": _get,
    "/write": _write,
    "/stats": _stats,
}


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    body = answer(environ["PATH_INFO"], environ["QUERY_STRING"])
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


async def asgi_application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # taken as "no lifespan"
    body = answer(scope["path"], scope["query_string"].decode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
