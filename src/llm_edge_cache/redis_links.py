"""Connections to one Redis server: redis-py's, under a deadline and with everything off that costs round trips.

redis-py 8 by itself repeats a failed command ten times, names itself in two commands after connecting, speaks RESP3
(one more) and starts a timeout anew with every piece received. Here there are no repetitions, no commands but AUTH and
SELECT, RESP2, and one deadline for an exchange, from connecting to the last byte.

A link whose exchange did not end cleanly is closed for good: a late answer must never be taken for the next one's.
"""

from __future__ import annotations

import inspect
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import redis.asyncio.connection as aio
import redis.connection as blocking
from redis import exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

from llm_edge_cache.errors import RedisConfigError
from llm_edge_cache.redis_commands import RedisTrouble, reply_trouble
from llm_edge_cache.redis_route import Node, Wire
from llm_edge_cache.redis_target import RedisTarget, TlsOptions

__all__ = ["AsyncLink", "Link", "LinkMaker"]

# A socket's timeout is set anew, which is a system call, only when it is too short, or too long by more than this part.
_SLACK: Final = 1 / 16


class _TimedSocket:
    """A socket whose every operation ends at its link's deadline."""

    def __init__(self, sock: socket.socket, link: Link) -> None:
        self._sock = sock
        self._link = link
        self._timeout = -1.0  # none was set by us yet
        self._may_wait = True

    def _hurry(self) -> None:
        left = self._link.time_left() if self._may_wait else 0.0
        if not left <= self._timeout <= left * (1 + _SLACK):
            self._timeout = left
            self._sock.settimeout(self._timeout)

    def recv_into(self, buffer: bytearray) -> int:
        self._hurry()
        return self._sock.recv_into(buffer)

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._hurry()
        return self._sock.recv(size, flags)

    def sendall(self, data: bytes) -> None:
        self._hurry()
        sent = self._sock.send(data)
        while sent < len(data):
            self._hurry()
            sent += self._sock.send(memoryview(data)[sent:])

    def settimeout(self, timeout: float | None) -> None:
        """Of a parser's wishes only 0 counts, which it uses between exchanges to look for what has arrived."""
        self._may_wait = timeout != 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class Link(blocking.AbstractConnection):
    """A blocking connection; stands before redis-py's TCP or Unix one among the bases of what LinkMaker makes."""

    node: Node
    tls_context: ssl.SSLContext | None = None
    deadline = 0.0
    """Reading of `time.monotonic` at which the exchange under way ends."""

    def time_left(self) -> float:
        """Seconds until the deadline; TimeoutError when it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        return left

    # redis-py reads these two when it connects. Its constructors set them, to no effect.
    socket_timeout = property(lambda self: self.time_left(), lambda _self, _: None)
    socket_connect_timeout = property(lambda self: self.time_left(), lambda _self, _: None)

    def _connect(self) -> Any:
        sock = super()._connect()  # type: ignore[safe-super]
        if self.tls_context is not None:
            try:
                sock = self.tls_context.wrap_socket(sock, server_hostname=self.node.host)
            except BaseException:
                sock.close()
                raise
        return _TimedSocket(sock, self)

    def exchange(self, packed: Sequence[bytes], count: int, deadline: float) -> list[Any]:
        """Send commands and read their replies; connect first if this was not done yet.

        Args:
            packed: The commands, as LinkMaker.pack makes them.
            count: How many they are.
            deadline: When this ends.

        Returns:
            The replies, an error reply as an exception in its place.

        Raises:
            Exception: whatever went wrong; the link is of no use any more.
        """
        self.deadline = deadline
        if self._sock is None:
            self._log_in()
        self.send_packed_command(packed, check_health=False)
        return [self._reply() for _ in range(count)]

    def _log_in(self) -> None:
        try:
            self.connect()
        except exceptions.ResponseError as error:
            raise _login_trouble(error, self.node) from None

    def _reply(self) -> Any:
        try:
            return self.read_response(disable_decoding=True)
        except exceptions.ResponseError as error:
            return error

    def is_sound(self) -> bool:
        """Idle, open, and nothing arrived that nobody asked for."""
        try:
            return not self.can_read()
        except exceptions.RedisError:
            return False


class AsyncLink(aio.AbstractConnection):
    """The same for asyncio; its deadline is the caller's `asyncio.timeout_at`, so that one timer does for all."""

    node: Node
    tls_context: ssl.SSLContext | None = None

    def _connection_arguments(self) -> Mapping[str, Any]:
        arguments = dict(super()._connection_arguments())  # type: ignore[misc]
        if self.tls_context is not None:
            arguments["ssl"] = self.tls_context
        return arguments

    async def exchange(self, packed: Sequence[bytes], count: int) -> list[Any]:
        """As Link.exchange."""
        if not self.is_connected:
            await self._log_in()
        await self.send_packed_command(packed, check_health=False)
        return [await self._reply() for _ in range(count)]

    async def _log_in(self) -> None:
        try:
            await self.connect()
        except exceptions.ResponseError as error:
            raise _login_trouble(error, self.node) from None

    async def _reply(self) -> Any:
        try:
            return await self.read_response(disable_decoding=True)
        except exceptions.ResponseError as error:
            return error

    async def is_sound(self) -> bool:
        """As Link.is_sound."""
        # A reset leaves no end of file for redis-py to see, and on Python 3.13 writing after one is an AttributeError.
        if self._writer is None or self._writer.is_closing():
            return False
        look = getattr(self, "can_read", None) or self.can_read_destructive  # its name before redis-py 8
        try:
            return not await look()
        except exceptions.RedisError:
            return False

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        """Close at once; redis-py calls this too, whenever something went wrong.

        To close in good order would first send what is buffered, to a peer that may be gone and take nothing.
        """
        if self._writer is not None:
            self._writer.transport.abort()
        await super().disconnect(*args, **kwargs)

    async def drop(self) -> None:
        """Close without waiting for anything, also while being cancelled."""
        await self.disconnect(nowait=True)


class _TcpLink(Link, blocking.Connection):
    pass


class _UnixLink(Link, blocking.UnixDomainSocketConnection):
    host = port = ""  # redis-py's own records of errors ask every kind of connection for them


class _AsyncTcpLink(AsyncLink, aio.Connection):
    pass


class _AsyncUnixLink(AsyncLink, aio.UnixDomainSocketConnection):
    pass


class LinkMaker:
    """Makes the links to a target's servers; none is connected yet.

    Args:
        target: Where, and with which credentials.

    Raises:
        RedisConfigError: A file for TLS cannot be used.
    """

    def __init__(self, target: RedisTarget) -> None:
        self._target = target
        self._tls_context = _tls_context(target.tls_options) if target.tls else None
        self._packer = blocking.Connection(protocol=2, **_NAMELESS)  # never connected

    def pack(self, wires: Sequence[Wire]) -> Sequence[bytes]:
        """Commands as the bytes that are sent.

        Raises:
            TypeError: An argument is neither bytes, str nor int.
        """
        try:
            packer = self._packer
            packed: list[bytes] = packer.pack_command(*wires[0]) if len(wires) == 1 else packer.pack_commands(wires)
            return packed
        except exceptions.DataError:
            raise TypeError("the arguments of a Redis command are bytes, str or int") from None

    def make(self, node: Node) -> Link:
        """A blocking link to `node`."""
        options = self._options(node, retry=Retry(NoBackoff(), 0))
        link = (_UnixLink if node.unix_path else _TcpLink)(**options)
        link.node, link.tls_context = node, self._tls_context
        return link

    def make_async(self, node: Node) -> AsyncLink:
        """A link to `node` for the running event loop."""
        options = self._options(
            node, retry=AsyncRetry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=None
        )
        link = (_AsyncUnixLink if node.unix_path else _AsyncTcpLink)(**options)
        link.node, link.tls_context = node, self._tls_context
        return link

    def _options(self, node: Node, **more: Any) -> dict[str, Any]:
        target = self._target
        options: dict[str, Any] = {"path": node.unix_path} if node.unix_path else {"host": node.host, "port": node.port}
        if node.is_sentinel:
            options |= {"username": target.sentinel_username, "password": target.sentinel_password}
        else:
            options |= {"username": target.username, "password": target.password, "db": target.db}
        return {**options, "protocol": 2, **_NAMELESS, **more}


def _nameless() -> dict[str, Any]:
    """The options by which a connection does not tell the server its library's name, in this version of redis-py."""
    known = inspect.signature(blocking.AbstractConnection.__init__).parameters
    return {"driver_info": None} if "driver_info" in known else {"lib_name": None, "lib_version": None}


_NAMELESS: Final = _nameless()


def _tls_context(options: TlsOptions) -> ssl.SSLContext:
    # Made once: reading the system's authorities takes longer than many a handshake.
    try:
        context = ssl.create_default_context(cafile=options.ca_certs)
        if options.certfile:
            context.load_cert_chain(options.certfile, options.keyfile)
    except OSError as error:  # SSLError is one
        files = ", ".join(filter(None, (options.ca_certs, options.certfile, options.keyfile)))
        raise RedisConfigError(f"Redis over TLS: cannot use {files}: {error.strerror or error}") from None
    context.check_hostname = options.check_hostname
    context.verify_mode = getattr(ssl, f"CERT_{options.cert_reqs.upper()}")
    return context


def _login_trouble(refusal: Exception, node: Node) -> RedisTrouble:
    """AUTH or SELECT was refused, so no command of ours will ever get through."""
    trouble = reply_trouble(refusal, str(node))
    return trouble if trouble.is_outage else RedisTrouble("connection", f"{trouble} to AUTH or SELECT")
