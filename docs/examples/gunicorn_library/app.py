"""A WSGI application whose workers answer from one cache. See README.md beside it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, generate_latest

from llm_edge_cache import CacheableRequest, CachedResponse, SyncCacheManager, TokenUsage, load_settings, metrics

# On import: with preload_app that is in the master, and every worker goes on with what it inherits.
settings = load_settings()
cache = SyncCacheManager(settings.l1, settings.l2)
registry = CollectorRegistry()
metrics.register(cache, registry)


def ask_the_provider(question: str) -> CachedResponse:
    """Stands for the call of an LLM."""
    time.sleep(0.2)
    return CachedResponse(f"the answer to {question!r}, by worker {os.getpid()}", "gpt-4o", TokenUsage(10, 20, 30))


def answer(question: str) -> bytes:
    request = CacheableRequest("gpt-4o", messages=[{"role": "user", "content": question}])
    response = cache.get_or_compute(request, lambda: ask_the_provider(question))
    assert response is not None
    return json.dumps({"pid": os.getpid(), "content": response.content}).encode()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/metrics":
        kind, body = "text/plain; version=0.0.4", generate_latest(registry)
    elif environ["PATH_INFO"] == "/ask":
        kind, body = "application/json", answer(parse_qs(environ["QUERY_STRING"])["question"][0])
    else:
        kind, body = "application/json", json.dumps({"pid": os.getpid()}).encode()
    start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
