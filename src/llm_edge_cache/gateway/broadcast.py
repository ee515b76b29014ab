"""One answer, as far as it has come, for everybody in this worker who waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from llm_edge_cache.gateway.answers import End, Head

__all__ = ["Broadcast", "Source"]

Source = Literal["upstream", "worker", "l1", "l2", "stale"]
"""Where an answer comes from; "worker": another worker asks the upstream for it."""


class Broadcast:
    """Filled by one task, read by any number of clients, each at its own speed. Belongs to one event loop."""

    def __init__(self) -> None:
        self.source: Source = "upstream"
        self.head: Head | None = None
        self.own_headers: list[tuple[bytes, bytes]] = []
        """All headers of the upstream: for the client whose request made the call."""
        self.age = 0
        """Seconds since it was stored; 0 for one that comes from the upstream now."""
        self.chunks: list[bytes] = []
        self.size = 0
        self.end: End | None = None
        self.readers = 0
        """Clients that read it now."""
        self.on_left: Callable[[], object] | None = None
        """Called when the last client has left before the end."""
        self.is_read_elsewhere: Callable[[], bool] = lambda: False
        """Tells whether clients of other workers wait for it."""
        self._changed = asyncio.Event()

    def start(self, head: Head, source: Source, own_headers: list[tuple[bytes, bytes]] | None = None) -> None:
        """The head is there."""
        self.head = head
        self.source = source
        self.own_headers = own_headers or head.headers
        self._tell()

    def append(self, chunk: bytes) -> None:
        """More of the body is there."""
        self.chunks.append(chunk)
        self.size += len(chunk)
        self._tell()

    def finish(self, end: End) -> None:
        """Nothing more will come. The first end holds."""
        if self.end is None:
            self.end = end
            self._tell()

    @contextmanager
    def read(self) -> Iterator[None]:
        """Be one of its readers, for as long as the client is there."""
        self.readers += 1
        try:
            yield
        finally:
            self.readers -= 1
            if self.readers == 0 and self.end is None and self.on_left is not None:
                self.on_left()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def started(self) -> None:
        """Wait until there is a head, or an end without one."""
        while self.head is None and self.end is None:
            await self._changed.wait()

    async def finished(self) -> End:
        """Wait until nothing more will come."""
        while self.end is None:
            await self._changed.wait()
        return self.end

    async def after(self, count: int) -> list[bytes]:
        """Return the chunks after the first `count`, once there are some; none: nothing more will come."""
        while len(self.chunks) <= count and self.end is None:
            await self._changed.wait()
        return self.chunks[count:]

    @property
    def body(self) -> bytes:
        """What has come of the body."""
        return b"".join(self.chunks)
