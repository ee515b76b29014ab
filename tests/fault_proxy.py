"""A proxy between a client and a server that fails on command.

It runs in a thread of its own; the tests change its behaviour from outside. A new behaviour holds for connections that
are open as well as for new ones, except where it says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST


class FaultProxy:
    """Listens on a free TCP port, or on a Unix socket; a context manager.

    Args:
        target: (host, port) or a Unix socket's path: the server.
        tls: Speak TLS with clients, and plain with the server.
        unix: Listen on a Unix socket.
    """

    def __init__(self, target: tuple[str, int] | str, *, tls: ssl.SSLContext | None = None, unix: bool = False) -> None:
        self._target = target
        self._tls = tls
        self._directory = tempfile.TemporaryDirectory(prefix="proxy-") if unix else None
        self.unix_path = str(Path(self._directory.name) / "proxy.sock") if self._directory else ""
        self.port = 0
        self.accepted = 0
        """Connections accepted so far."""
        self.asked = 0
        """How often clients have sent something; a command, or a batch of them, is mostly one."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._set()

    @property
    def url(self) -> str:
        if self.unix_path:
            return f"unix://{self.unix_path}"
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self.port}/0"

    # ---- behaviours ----

    def _set(
        self,
        *,
        delay: float = 0.0,
        forwards: bool = True,
        reset_after: int | None = None,
        rate: float | None = None,
        garbage: bytes | None = None,
    ) -> None:
        self._delay = delay
        self._forwards = forwards
        self._reset_after = reset_after
        self._rate = rate
        self._garbage = garbage

    def pass_on(self) -> None:
        """Behave: forward everything at once, accept again after refuse()."""
        self._set()
        if self._server is None:
            self._do(self._listen())

    def delay(self, seconds: float) -> None:
        """Every reply comes so much later; none is lost."""
        self._set(delay=seconds)

    def blackhole(self) -> None:
        """Accept and read, answer nothing; what was swallowed stays lost."""
        self._set(forwards=False)

    half_open = blackhole  # to an open connection: the peer is gone and nobody says so

    def refuse(self) -> None:
        """Nobody listens any more, and open connections are closed."""
        self._do(self._stop_listening())
        self.cut()

    def reset_mid_reply(self, after_bytes: int) -> None:
        """Send so many bytes of the next replies, then RST; again with every connection."""
        self._set(reset_after=after_bytes)

    def trickle(self, bytes_per_second: float) -> None:
        """Replies come byte by byte."""
        self._set(rate=bytes_per_second)

    def garbage(self, reply: bytes) -> None:
        """Answer every command with these bytes instead of asking the server."""
        self._set(garbage=reply)

    def reset(self) -> None:
        """RST on every open connection, now."""
        self._do(self._close_all(with_reset=True))

    def cut(self) -> None:
        """Close every open connection in good order, now."""
        self._do(self._close_all(with_reset=False))

    # ---- the machinery ----

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _listen(self) -> None:
        if self.unix_path:
            Path(self.unix_path).unlink(missing_ok=True)
            self._server = await asyncio.start_unix_server(self._accept, self.unix_path, ssl=self._tls)
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._tls)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _close_all(self, *, with_reset: bool) -> None:
        for writer in list(self._writers):
            self._drop(writer, with_reset=with_reset)
        await asyncio.sleep(0)

    def _drop(self, writer: asyncio.StreamWriter, *, with_reset: bool) -> None:
        sock = writer.get_extra_info("socket")
        if with_reset and sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        writer.transport.abort()
        self._writers.discard(writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        self._spawn(self._serve(reader, writer))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: asyncio.StreamWriter | None = None
        try:
            if isinstance(self._target, str):
                answers, upstream = await asyncio.open_unix_connection(self._target)
            else:
                answers, upstream = await asyncio.open_connection(*self._target)
            self._writers.add(upstream)
            back = self._spawn(self._carry_back(answers, writer))
            await self._carry_there(reader, upstream, writer)
            back.cancel()
        except OSError:
            pass
        finally:
            for ended in filter(None, (writer, upstream)):
                self._drop(ended, with_reset=False)

    async def _carry_there(
        self, reader: asyncio.StreamReader, upstream: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(65536):
            self.asked += 1
            if self._garbage is not None:
                writer.write(self._garbage)
            elif self._forwards:
                upstream.write(data)

    async def _carry_back(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await answers.read(65536):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if not self._forwards:
                    continue
                if self._reset_after is not None:
                    writer.write(data[: self._reset_after])
                    await asyncio.sleep(0.01)  # that much is on its way
                    self._drop(writer, with_reset=True)
                    return
                await self._send(data, writer)
            self._drop(writer, with_reset=False)

    async def _send(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        if self._rate is None:
            writer.write(data)
            return
        for byte in data:
            writer.write(bytes([byte]))
            await asyncio.sleep(1 / self._rate)

    async def _end(self) -> None:
        await self._stop_listening()
        await self._close_all(with_reset=False)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # TLS transports close in two steps

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        stop: Callable[[], None] = self._loop.stop
        self._loop.call_soon_threadsafe(stop)
        self._thread.join(60)
        self._loop.close()
        if self._directory is not None:
            self._directory.cleanup()
