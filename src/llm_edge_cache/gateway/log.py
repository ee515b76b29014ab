"""An answer under way, written down in the slab, so that other workers can follow it while it comes.

The body lies in blocks of `BLOCK_BYTES`, each an entry of the slab that is written anew while it grows; the head stands
before the first. How much there is stands in the flight's record (`progress`: 1 for the head, then one for each byte),
which is moved after the bytes are in place, so a follower never looks for what is not there yet. Entries may be
evicted: then the log is lost, and its followers are on their own.

A follower marks the log as read while it has clients, again and again, since it may die: the mark lasts three seconds.
So the worker that leads knows that somebody waits for the answer when its own clients have left.

The head says when the call began, and under which tags its answer will be stored: 1 A's call begins  2 the key, or one
of the tags, is made void  3 B, on another worker, asks: what A gets is too old for B.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from llm_edge_cache.core import Begun
from llm_edge_cache.errors import CacheError, SlabBusyError
from llm_edge_cache.gateway.answers import End, Head

if TYPE_CHECKING:
    from llm_edge_cache.slab import SharedSlab

__all__ = ["BLOCK_BYTES", "LOG_SECONDS", "EndedLogs", "Heading", "LogLostError", "LogReader", "LogWriter"]

BLOCK_BYTES: Final = 16 << 10
LOG_SECONDS: Final = 10.0
"""How long followers have to read the last of a log."""
_SWEEP_SECONDS: Final = 0.25
_SECONDS: Final = 900.0  # what a writer that died leaves behind is gone after that

_MARK: Final = "read"
_MARK_SECONDS: Final = 3.0
_MARKING_SECONDS: Final = 1.0  # between two marks of one follower


class Heading(NamedTuple):
    """What stands before the body."""

    head: Head
    begun: Begun
    tags: tuple[str, ...]


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_heading: Final = msgspec.msgpack.Decoder(Heading).decode
_decode_end: Final = msgspec.msgpack.Decoder(End).decode


class LogLostError(CacheError):
    """A part of the answer was evicted before it was read."""


def _name(token: int, part: object) -> bytes:
    return f"\0llm-edge-cache:log:{token:x}:{part}".encode()


class LogWriter:
    """Writes one flight's answer. Errors are swallowed: whoever cannot follow asks for himself."""

    def __init__(self, slab: SharedSlab, record: int, token: int) -> None:
        """Write for the followers of this flight; record -1: there are none."""
        self._slab = slab
        self._record = record
        self.token = token
        self.size = 0
        """Bytes of the body so far."""
        self._block = bytearray()  # the last one, as far as it has come
        self._is_lost = record < 0

    def head(self, heading: Heading) -> None:
        """Write the head."""
        self._put("head", _encode(heading))
        self._advance()

    def append(self, chunk: bytes) -> None:
        """Write the next bytes of the body."""
        view = memoryview(chunk)
        while view and not self._is_lost:
            part = view[: BLOCK_BYTES - len(self._block)]
            self._block += part
            self.size += len(part)
            self._put((self.size - 1) // BLOCK_BYTES, bytes(self._block))
            if len(self._block) == BLOCK_BYTES:
                self._block.clear()
            view = view[len(part) :]
        self._advance()

    def end(self, end: End) -> None:
        """Write how it ended. The flight's own end, which follows, wakes the followers."""
        self._put("end", _encode(msgspec.structs.replace(end, size=self.size)))

    def is_read(self) -> bool:
        """Tell whether a client of another worker has waited for this answer within the last seconds."""
        try:
            return self._record >= 0 and _name(self.token, _MARK) in self._slab
        except CacheError:
            return False

    @property
    def has_followers(self) -> bool:
        """Tell whether there may be any."""
        return self._record >= 0

    def _put(self, part: object, data: bytes) -> None:
        if self._is_lost:
            return
        try:
            self._is_lost = not self._slab.set(_name(self.token, part), data, ttl=_SECONDS, tti=None)
        except SlabBusyError:
            self._is_lost = True

    def _advance(self) -> None:
        if not self._is_lost:
            self._slab._flight_advance(self._record, self.token, 1 + self.size)


class EndedLogs:
    """Logs that have ended, and that followers may still be reading; they are deleted after `LOG_SECONDS`.

    Of each two numbers are kept: the writers themselves, each with a timer, would be most of what a worker with many
    misses has.
    """

    def __init__(self, slab: SharedSlab) -> None:
        """Delete from this slab."""
        self._slab = slab
        self._ended: deque[tuple[float, int, int]] = deque()  # since when (the loop's time), token, size

    def add(self, log: LogWriter) -> None:
        """Have what this one wrote deleted in time."""
        if not log.has_followers:
            return
        loop = asyncio.get_running_loop()
        if not self._ended:
            loop.call_later(LOG_SECONDS, self._sweep)
        self._ended.append((loop.time(), log.token, log.size))

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while self._ended and self._ended[0][0] <= loop.time() - LOG_SECONDS:
            _, token, size = self._ended.popleft()
            self._delete(token, size)
        if self._ended:
            loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _delete(self, token: int, size: int) -> None:
        for part in ("head", *range(-(-size // BLOCK_BYTES)), "end", _MARK):
            try:
                self._slab.delete(_name(token, part))
            except CacheError:  # noqa: PERF203 - a few parts; the rest is gone by itself
                return


class LogReader:
    """Reads what a flight's leader writes."""

    def __init__(self, slab: SharedSlab, token: int) -> None:
        """Read this flight's log from the start."""
        self._slab = slab
        self._token = token
        self._position = 0
        self._marked: float | None = None

    def mark(self) -> None:
        """Let the writer know that it is read. May be called as often as one likes."""
        now = time.monotonic()
        if self._marked is not None and now - self._marked < _MARKING_SECONDS:
            return
        with contextlib.suppress(SlabBusyError):
            self._slab.set(_name(self._token, _MARK), b"", ttl=_MARK_SECONDS, tti=None)
            self._marked = now

    def head(self) -> Heading:
        """Return the head. Only once the flight's progress is 1 or more.

        Raises:
            LogLostError: it is gone.
        """
        try:
            return _decode_heading(self._part("head"))
        except msgspec.MsgspecError:
            raise LogLostError("the head is damaged") from None

    def read(self, progress: int) -> bytes:
        """Return the bytes of the body that have come since the last call, as far as the progress says.

        Raises:
            LogLostError: they are gone.
        """
        pieces = []
        while self._position < progress - 1:
            start = self._position % BLOCK_BYTES
            piece = self._part(self._position // BLOCK_BYTES)[start:]
            if not piece:
                raise LogLostError("a block is shorter than was said")
            pieces.append(piece)
            self._position += len(piece)
        return b"".join(pieces)

    def end(self) -> End | None:
        """Return how it ended; None if its leader never said so: it died."""
        data = self._slab.get(_name(self._token, "end"))
        try:
            return None if data is None else _decode_end(data)
        except msgspec.MsgspecError:
            return None

    def _part(self, part: object) -> bytes:
        data = self._slab.get(_name(self._token, part))
        if data is None:
            raise LogLostError(f"{part} was evicted")
        return data
