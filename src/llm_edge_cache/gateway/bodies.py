"""Reading a request's body whole, within a limit and with a bound on patience."""

from __future__ import annotations

from llm_edge_cache.gateway.patience import Patience
from llm_edge_cache.gateway.respond import Message, Receive

__all__ = ["TooLargeError", "read_body"]


class TooLargeError(Exception):
    """The body exceeds the limit."""


async def read_body(receive: Receive, first: Message, limit: int, patience: Patience) -> bytes | None:
    """Return the whole body; None if the client is gone.

    Args:
        receive: what gives the next message.
        first: the first message.
        limit: bytes.
        patience: with which each further message is waited for.

    Raises:
        TooLargeError: it exceeds the limit.
        TimeoutError: the client was silent for too long.
    """
    parts: list[bytes] = []
    size, message = 0, first
    while message["type"] == "http.request":
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLargeError
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await patience.receive(receive)
    return None
