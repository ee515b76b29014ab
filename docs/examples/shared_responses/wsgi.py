"""The application for gunicorn: ``gunicorn -c python:llm_edge_cache.workers.gunicorn wsgi:application``.

The slab is opened on import: in every worker, or, with preload_app, once in the master, whose workers inherit it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any

from answering import Answer, open_answers, ready, unknown_request

answers = open_answers()


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer one request."""
    answer = ready() if environ["REQUEST_METHOD"] == "GET" else _answer(_key(environ))
    start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", answer.headers())
    return [answer.body]


def _key(environ: dict[str, Any]) -> bytes:
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    path = environ["PATH_INFO"].encode("latin-1").decode("utf-8")  # PEP 3333 passes bytes as latin-1
    return answers.key(path, environ.get("QUERY_STRING", ""), body)


def _answer(key: bytes) -> Answer:
    hit = answers.look_up(key)
    if hit is not None:
        return hit
    found = answers.find(key)
    if found is None:
        return unknown_request()
    exchange, delay = found
    time.sleep(delay)
    return answers.store(key, exchange)
