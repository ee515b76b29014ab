"""Calls of the provider. Failures are told by one exception, whatever the HTTP client calls them."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from typing import Final

import aiohttp
from yarl import URL

from llm_edge_cache.errors import CacheError
from llm_edge_cache.gateway.answers import HeaderList, forwardable
from llm_edge_cache.gateway.config import GatewayConfig

__all__ = ["Call", "Upstream", "UpstreamFailureError"]

_CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_OWN_HEADERS: Final = (b"host", b"expect")
_AUTOMATIC: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
_KEEP_ALIVE_SECONDS: Final = 4.0  # below what servers use, so that a kept connection is rarely closed under our feet


class UpstreamFailureError(CacheError):
    """The upstream gave no answer, or not all of it.

    Attributes:
        kind: "connect", "timeout", "reset", "invalid", "too_large" or "busy".
        status: the HTTP status to tell the client, where nothing has been sent yet.
    """

    def __init__(self, kind: str, status: int, message: str) -> None:
        super().__init__(message)
        self.kind: Final = kind
        self.status: Final = status


class Call:
    """A call whose head has come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        """Wrap the client's response."""
        self._response = response
        self.status: Final[int] = response.status
        self.headers: Final[HeaderList] = forwardable([(name.lower(), value) for name, value in response.raw_headers])

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes.

        Raises:
            UpstreamFailureError: it broke off.
        """
        with _translated():
            async for chunk in self._response.content.iter_any():
                yield chunk


class Upstream:
    """The provider, as one worker calls it."""

    def __init__(self, config: GatewayConfig) -> None:
        """Nothing is opened before `open`."""
        self._base = config.base
        self._config = config
        self._free = asyncio.Semaphore(config.upstream_calls)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make the client; connections are opened by calls."""
        config = self._config
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=config.connect_timeout, sock_read=config.idle_timeout
            ),
            auto_decompress=False,
            skip_auto_headers=_AUTOMATIC,
            read_bufsize=1 << 18,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def call(
        self, method: str, path: str, query: bytes, headers: HeaderList, body: bytes | AsyncIterator[bytes] | None
    ) -> AsyncIterator[Call]:
        """Send a request, and yield once the answer's head is there.

        Raises:
            UpstreamFailureError: it was not reached, did not answer in time, or broke off; also out of the body.
        """
        assert self._session is not None
        url = URL(self._base + path + (f"?{query.decode('latin-1')}" if query else ""), encoded=True)
        sent = [(name.decode("latin-1"), _text(value)) for name, value in headers if name not in _OWN_HEADERS]
        await self._take_place()
        try:
            with _translated():
                context = self._session.request(method, url, headers=sent, data=body, allow_redirects=False)
                async with context as response:
                    _refuse_unsound(response)
                    yield Call(response)
        finally:
            self._free.release()

    async def _take_place(self) -> None:
        if not self._free.locked():
            await self._free.acquire()  # does not wait; `wait_for` would make a task of it
            return
        try:
            await asyncio.wait_for(self._free.acquire(), self._config.connect_timeout)
        except asyncio.TimeoutError:
            message = f"{self._config.upstream_calls} calls of this worker are under way already; try again later"
            raise UpstreamFailureError("busy", 503, message) from None


def _text(value: bytes) -> str:
    """Return what becomes these bytes again: our client writes UTF-8. Bytes that are none cannot be kept."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _refuse_unsound(response: aiohttp.ClientResponse) -> None:
    """Refuse an answer that our client reads, but no server would send on."""
    if not 200 <= response.status <= 599:
        raise UpstreamFailureError("invalid", 502, f"the upstream answered with the status {response.status}")
    if any(_CONTROL.search(value) for _, value in response.raw_headers):
        raise UpstreamFailureError("invalid", 502, "the upstream sent a header with control characters")


@contextlib.contextmanager
def _translated():  # type: ignore[no-untyped-def]
    try:
        yield
    except (aiohttp.ServerTimeoutError, asyncio.TimeoutError):
        raise UpstreamFailureError("timeout", 504, "the upstream did not answer in time") from None
    except aiohttp.ClientConnectorError:
        raise UpstreamFailureError("connect", 502, "the upstream cannot be reached") from None
    except (aiohttp.ClientError, ConnectionError, EOFError) as error:
        message = f"the upstream broke the connection ({type(error).__name__})"
        raise UpstreamFailureError("reset", 502, message) from None
