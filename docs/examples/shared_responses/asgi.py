"""The same application for uvicorn, whose workers are spawned: ``uvicorn --workers 2 asgi:application``.

Each worker imports this module and attaches by name; the first one creates the slab.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from answering import Answer, open_answers, ready, unknown_request

answers = open_answers()

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answer one request."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])  # the server takes it as "no lifespan, no websockets"
    answer = ready() if scope["method"] == "GET" else await _answer(await _key(scope, receive))
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _key(scope: dict[str, Any], receive: Receive) -> bytes:
    body = await _read_body(receive)
    return answers.key(scope["path"], scope["query_string"].decode("latin-1"), body)


async def _read_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _answer(key: bytes) -> Answer:
    hit = answers.look_up(key)
    if hit is not None:
        return hit
    found = answers.find(key)
    if found is None:
        return unknown_request()
    exchange, delay = found
    await asyncio.sleep(delay)
    return answers.store(key, exchange)
