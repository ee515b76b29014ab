"""Waiting for a client's next message, but not for ever."""

from __future__ import annotations

import sys
import types
from collections.abc import Generator
from typing import Any

from llm_edge_cache.gateway.respond import Message, Receive

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout  # aiohttp brings it where asyncio has none

__all__ = ["receive_within"]


async def receive_within(receive: Receive, seconds: float) -> Message:
    """Return the next message of a request.

    A timer is set only where the message has yet to come. The body of most requests is there when it is asked for, and
    then a timer would cost a hit more than its look-up.

    Raises:
        TimeoutError: it has not come for so many seconds.
    """
    steps = receive().__await__()
    try:
        waited_for = next(steps)
    except StopIteration as there:
        message: Message = there.value
        return message
    async with timeout(seconds):
        return await _rest_of(steps, waited_for)


@types.coroutine
def _rest_of(steps: Generator[Any, None, Message], waited_for: Any) -> Generator[Any, None, Message]:
    """Await what has taken its first step already, and then waited for this."""
    try:
        yield waited_for
        return (yield from steps)
    finally:
        steps.close()  # cancelled in the first `yield`, it would hear of it only when it is collected
