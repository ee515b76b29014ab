"""How coroutines wait for flights of other processes: one thread per process sleeps on the segment's bell for all."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

from llm_edge_cache.errors import SlabError

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["FlightWaiters"]

_WATCH_NS: Final = 20_000_000
"""How long the thread sleeps at most: an owner that dies rings no bell."""


class _Waiter(NamedTuple):
    record: int
    token: int
    progress: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]

    def wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # its loop was closed meanwhile
            self.loop.call_soon_threadsafe(_resolve, self.future)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FlightWaiters:
    """The waiting coroutines of one process, on all of its event loops."""

    def __init__(self, slab: SharedSlab) -> None:
        """Wait for flights of this slab."""
        self._slab = slab
        self._lock = threading.Lock()
        self._waiters: set[_Waiter] = set()
        self._is_awake = False

    async def wait(self, record: int, token: int, seconds: float, *, progress: int = 0) -> int:
        """Wait until a flight has moved on from `progress` or is no more, at most so many seconds; return its state.

        The state is its progress, or -1 when it is no more.
        """
        loop = asyncio.get_running_loop()
        waiter = _Waiter(record, token, progress, loop, loop.create_future())
        self._add(waiter)
        try:
            # Once it is among the waiters: 1 we see the flight run  2 it ends, the bell rings  3 we are added.
            if self._slab._flight_state(record, token) == progress:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(waiter.future, seconds)
        finally:
            with self._lock:
                self._waiters.discard(waiter)
        return self._slab._flight_state(record, token)

    def _add(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiters.add(waiter)
            if not self._is_awake:
                self._is_awake = True
                threading.Thread(target=self._run, name="llm-edge-cache-waiters", daemon=True).start()

    def _run(self) -> None:
        try:
            seen = self._slab._bell()
            while waiters := self._present():
                for waiter in waiters:
                    if self._slab._flight_state(waiter.record, waiter.token) != waiter.progress:
                        waiter.wake()
                seen = self._slab._bell_wait(seen, _WATCH_NS)
        except SlabError:  # closed: nobody's flight goes on
            with self._lock:
                self._is_awake = False
                waiters = list(self._waiters)
            for waiter in waiters:
                waiter.wake()

    def _present(self) -> list[_Waiter]:
        """Return who waits; nobody: the thread ends, and whoever comes next starts another."""
        with self._lock:
            self._is_awake = bool(self._waiters)
            return list(self._waiters)
