"""The shared cache inside an HTTP client: transports for httpx and httpx2, on which the official clients are built.

    client = OpenAI(http_client=httpx2.Client(transport=CachingTransport()))

Calls of the endpoints that the gateway caches are answered from the cache, by its rules and under its keys
(`llm_edge_cache.adapters.answering`); everything else goes through untouched. On a miss the answer is handed on chunk
by chunk as the caller takes it, and nothing is read ahead. One class serves both libraries: requests tell which it is.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.adapters.answering import Answer, Answering, Call, Recording
from llm_edge_cache.faces import Faces
from llm_edge_cache.fetch import NEVER
from llm_edge_cache.gateway.config import GatewayConfig

if TYPE_CHECKING:
    from llm_edge_cache.gateway.answers import HeaderList
    from llm_edge_cache.gateway.exchange import Exchange
    from llm_edge_cache.manager import CacheManager
    from llm_edge_cache.settings import L1Config, L2Config
    from llm_edge_cache.sync_manager import SyncCacheManager

__all__ = ["AsyncCachingTransport", "CachingTransport"]


def _installed() -> list[ModuleType]:
    found = []
    for name in ("httpx", "httpx2"):
        try:
            found.append(importlib.import_module(name))
        except ImportError:  # noqa: PERF203 - two of them
            continue
    if not found:
        raise ImportError("the httpx adapter needs httpx or httpx2: pip install 'llm-edge-cache[httpx]'")
    return found


_LIBRARIES: Final = _installed()


def _base(name: str) -> Any:
    """Return a base class that is, to each library, its own of that name: they ask with isinstance."""
    return type(f"_{name}", tuple({getattr(library, name): None for library in _LIBRARIES}), {})


_NO_UPSTREAM: Final = "http://each.request.has.its.own"


def _library_of(request: Any) -> Any:
    for library in _LIBRARIES:
        if isinstance(request, library.Request):
            return library
    names = " or ".join(library.__name__ for library in _LIBRARIES)
    raise TypeError(f"the request must be one of {names}, not {type(request).__module__}.{type(request).__qualname__}")


def _headers_of(message: Any) -> HeaderList:
    return [(name.lower(), value) for name, value in message.headers.raw]


class _Caching:
    """What both transports have: everything but the I/O."""

    _kind: str
    """The libraries' name of the transport that connects."""

    def __init__(
        self,
        transport: Any = None,
        *,
        l1: L1Config | None = None,
        l2: L2Config | None = None,
        manager: CacheManager | SyncCacheManager | None = None,
        ttl: float = 3600.0,
        share_between_callers: bool = False,
        keep_cut_answers: bool = False,
    ) -> None:
        config = GatewayConfig(
            upstream=_NO_UPSTREAM,
            ttl=ttl,
            share_between_callers=share_between_callers,
            keep_cut_answers=keep_cut_answers,
        )
        self._faces = Faces(l1, l2, manager)
        self._answering = Answering(self._faces.engine, config)
        self._transport = transport

    def _inner(self, library: Any) -> Any:
        """Return the transport that connects."""
        if self._transport is None:
            self._transport = getattr(library, self._kind)()
        return self._transport

    def _read(self, request: Any) -> Exchange | None:
        url = request.url
        origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        return self._answering.read(origin, url.raw_path, _headers_of(request), request.content)


def _forwarded(library: Any, request: Any, exchange: Exchange) -> Any:
    """Return the request for the provider: without what was meant for the cache, and for an answer uncompressed."""
    return library.Request(
        request.method, request.url, headers=exchange.headers, content=exchange.body, extensions=request.extensions
    )


def _until_ns(request: Any) -> int:
    """Return until when the caller waits for others: as long as it would for the provider to say anything."""
    seconds = request.extensions.get("timeout", {}).get("read")
    return NEVER if seconds is None else time.monotonic_ns() + round(seconds * 1e9)


def _answered(library: Any, answer: Answer) -> Any:
    return library.Response(answer.status, headers=answer.headers, stream=library.ByteStream(answer.body))


def _called(library: Any, call: Call, response: Any, stream: Any) -> Any:
    """Return the provider's answer with a stream of our own; not the same object, which may have its body already."""
    headers = [*response.headers.raw, *call.headers]
    return library.Response(response.status_code, headers=headers, stream=stream, extensions=response.extensions)


# ---- threads ----


class _Taken(_base("SyncByteStream")):  # type: ignore[misc]
    """An answer's body, written down as the caller takes it."""

    def __init__(self, stream: Any, recording: Recording, faces: Faces) -> None:
        self._stream = stream
        self._recording = recording
        self._faces = faces

    def __iter__(self) -> Iterator[bytes]:
        self._recording.wait()
        for chunk in self._stream:
            self._recording.take(chunk)
            yield chunk
            self._recording.wait()
        self._finish(is_whole=True)

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._finish(is_whole=False)

    def _finish(self, *, is_whole: bool) -> None:
        self._faces.threads.perform(self._recording.finish(is_whole=is_whole))


class CachingTransport(_Caching, _base("BaseTransport")):  # type: ignore[misc]
    """A transport for `httpx.Client` and `httpx2.Client`.

    Args:
        transport: The transport that connects where the cache has no answer; it is closed with this one. None: the
            library's HTTPTransport. (A client that is given a transport uses its own settings of proxies,
            certificates and limits no longer: make one with those settings and give it here.)
        l1: The tier in shared memory.
        l2: The tier in Redis.
        manager: A CacheManager or SyncCacheManager to use instead of l1 and l2; it stays open at the end. Of the three
            nothing: the environment says what to use (`load_settings`).
        ttl: Seconds for which an answer is kept where the request does not say.
        share_between_callers: Give callers with different credentials one another's answers.
        keep_cut_answers: Keep answers that a limit of tokens or a filter cut short.

    Raises:
        TypeError: manager is none, or given together with l1 or l2.
        SlabError, RedisConfigError, SettingsError: as from SyncCacheManager.
    """

    _kind = "HTTPTransport"

    def handle_request(self, request: Any) -> Any:
        """Answer a request from the cache, or send it."""
        library = _library_of(request)
        if not self._answering.is_endpoint(request.method, request.url.raw_path):
            return self._inner(library).handle_request(request)
        request.read()
        exchange = self._read(request)
        if exchange is None:
            return self._inner(library).handle_request(request)
        self._faces.open()
        outcome = self._answering.begin(exchange)
        if outcome is None:
            outcome = self._faces.threads.perform(self._answering.find(exchange, _until_ns(request)))
        if isinstance(outcome, Answer):
            return _answered(library, outcome)
        try:
            response = self._inner(library).handle_request(_forwarded(library, request, exchange))
        except BaseException as error:
            self._answering.failed(outcome, error)
            raise
        recording = self._answering.record(outcome, response.status_code, _headers_of(response))
        return _called(library, outcome, response, _Taken(response.stream, recording, self._faces))

    def close(self) -> None:
        """Close the connections, and the cache if it is not the caller's own. The slab stays for other processes."""
        if self._transport is not None:
            self._transport.close()
        self._faces.close()


# ---- event loops ----


class _TakenAsync(_base("AsyncByteStream")):  # type: ignore[misc]
    """As _Taken."""

    def __init__(self, stream: Any, recording: Recording, faces: Faces) -> None:
        self._stream = stream
        self._recording = recording
        self._faces = faces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._recording.wait()
        async for chunk in self._stream:
            self._recording.take(chunk)
            yield chunk
            self._recording.wait()
        await self._finish(is_whole=True)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            await self._finish(is_whole=False)

    async def _finish(self, *, is_whole: bool) -> None:
        await self._faces.loops.perform(self._recording.finish(is_whole=is_whole))


class AsyncCachingTransport(_Caching, _base("AsyncBaseTransport")):  # type: ignore[misc]
    """CachingTransport for `httpx.AsyncClient` and `httpx2.AsyncClient`, on asyncio; see there."""

    _kind = "AsyncHTTPTransport"

    async def handle_async_request(self, request: Any) -> Any:
        """Answer a request from the cache, or send it."""
        library = _library_of(request)
        if not self._answering.is_endpoint(request.method, request.url.raw_path):
            return await self._inner(library).handle_async_request(request)
        await request.aread()
        exchange = self._read(request)
        if exchange is None:
            return await self._inner(library).handle_async_request(request)
        await self._faces.aopen()
        outcome = self._answering.begin(exchange)
        if outcome is None:
            outcome = await self._faces.loops.perform(self._answering.find(exchange, _until_ns(request)))
        if isinstance(outcome, Answer):
            return _answered(library, outcome)
        try:
            response = await self._inner(library).handle_async_request(_forwarded(library, request, exchange))
        except BaseException as error:
            self._answering.failed(outcome, error)
            raise
        recording = self._answering.record(outcome, response.status_code, _headers_of(response))
        return _called(library, outcome, response, _TakenAsync(response.stream, recording, self._faces))

    async def aclose(self) -> None:
        """As CachingTransport.close()."""
        if self._transport is not None:
            await self._transport.aclose()
        await self._faces.aclose()
