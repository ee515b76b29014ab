"""Waiting for a client's next message, but not for ever."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from llm_edge_cache.gateway.respond import Message, Receive

__all__ = ["Patience"]


class Patience:
    """Waits for the messages of a worker's requests, with one timer for all that are waited for.

    Most are there when they are asked for, and a hit feels everything on its way: a timer for each would cost it more
    than its look-up, and a first step to see whether one is needed (it ends in an exception) half as much.
    """

    def __init__(self, seconds: float) -> None:
        """Wait for so long for each."""
        self._seconds = seconds
        self._waiting: dict[asyncio.Task[Any] | None, float] = {}  # since when, the longest first
        self._overdue: set[asyncio.Task[Any] | None] = set()
        self._has_timer = False

    async def receive(self, receive: Receive) -> Message:
        """Return the next message of the request that this task serves.

        Raises:
            TimeoutError: it has not come for so long.
        """
        task = asyncio.current_task()
        self._waiting[task] = time.monotonic()
        if not self._has_timer:
            self._set_timer(self._seconds)
        try:
            return await receive()
        except asyncio.CancelledError:
            # 1 we are overdue, and cancelled  2 the server cancels us, too: then it is not answered, but obeyed.
            if task not in self._overdue or _is_cancelled_again(task):
                raise
            raise asyncio.TimeoutError from None
        finally:
            del self._waiting[task]
            self._overdue.discard(task)

    def _set_timer(self, seconds: float) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(seconds, self._cancel_overdue)

    def _cancel_overdue(self) -> None:
        self._has_timer = False
        now = time.monotonic()
        for task, since in self._waiting.items():
            if since + self._seconds > now:
                self._set_timer(since + self._seconds - now)
                return
            if task is not None and task not in self._overdue:
                self._overdue.add(task)
                task.cancel()


def _is_cancelled_again(task: asyncio.Task[Any] | None) -> bool:
    """Take back one cancellation; tell whether there was another. Before Python 3.11 there is no telling."""
    return sys.version_info >= (3, 11) and task is not None and task.uncancel() > 0
