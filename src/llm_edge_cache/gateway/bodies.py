"""Reading a request's body whole, within a limit and with a bound on patience."""

from __future__ import annotations

from llm_edge_cache.gateway.patience import receive_within
from llm_edge_cache.gateway.respond import Receive

__all__ = ["TooLargeError", "read_body"]


class TooLargeError(Exception):
    """The body exceeds the limit."""


async def read_body(receive: Receive, limit: int, patience: float) -> bytes | None:
    """Return the whole body; None if the client is gone.

    Raises:
        TooLargeError: it exceeds the limit.
        TimeoutError: the client has been silent for longer than `patience` seconds.
    """
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive_within(receive, patience)
        if message["type"] != "http.request":
            return None
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLargeError
        if not message.get("more_body"):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)
