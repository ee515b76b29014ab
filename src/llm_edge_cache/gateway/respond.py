"""Answers as ASGI messages, and the headers by which a client learns what the cache did."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

from llm_edge_cache.gateway.answers import HeaderList
from llm_edge_cache.gateway.protocols import WireProtocol

__all__ = [
    "CACHE_NAME",
    "Message",
    "Receive",
    "Send",
    "cache_headers",
    "send_error",
    "send_part",
    "send_start",
    "send_whole",
    "whole",
]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CACHE_NAME: Final = b"llm-edge-cache"
_JSON: Final = (b"content-type", b"application/json")
_WORKER: Final = b"%d"
_PREFIX: Final = CACHE_NAME + b"; "


def cache_headers(
    verdict: bytes, status: bytes, key: bytes, *, tier: bytes = b"", age: int | None = None, by: int | None = None
) -> HeaderList:
    """Return what tells of the cache.

    Args:
        verdict: HIT, MISS, BYPASS, STALE or COALESCED.
        status: the parameters of Cache-Status (RFC 9211) after the cache's name.
        key: the key of the answer; empty where there is none.
        tier: l1 or l2.
        age: seconds since the answer was stored.
        by: the worker that had stored it; given only where workers are to be shown.
    """
    headers = [(b"cache-status", _PREFIX + status), (b"x-cache", verdict)]
    if tier:
        headers.append((b"x-cache-tier", tier))
    if key:
        headers.append((b"x-cache-key", key))
    if age is not None:
        headers.append((b"age", b"%d" % age))
    if by is not None:
        headers += [(b"x-cache-worker", _WORKER % os.getpid()), (b"x-cache-filled-by", _WORKER % by)]
    return headers


async def send_start(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Send the head of an answer whose length is not known yet."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def send_part(send: Send, body: bytes, *, more: bool = True) -> None:
    """Send a part of the body; the last one with more=False."""
    await send({"type": "http.response.body", "body": body, "more_body": more})


def whole(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> tuple[Message, Message]:
    """Return the two messages of an answer in one piece."""
    told = [*headers, (b"content-length", b"%d" % len(body))]
    return {"type": "http.response.start", "status": status, "headers": told}, {
        "type": "http.response.body",
        "body": body,
    }


async def send_whole(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
    """Send an answer in one piece."""
    for message in whole(status, headers, body):
        await send(message)


async def send_error(
    send: Send,
    protocol: WireProtocol,
    status: int,
    message: str,
    headers: Iterable[tuple[bytes, bytes]] = (),
    *,
    code: str | None = None,
) -> None:
    """Send a failure of our own in the protocol's shape."""
    await send_whole(send, status, [_JSON, *headers], protocol.error_body(status, message, code=code))
