"""The gateway: an ASGI application that answers a provider's API from the cache.

POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/embeddings, /v1/messages     cached
any other path under /v1/                                                                   passed through
GET  /healthz, /readyz, /metrics
/dashboard, /admin/                                                                         see `admin`
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from llm_edge_cache import metrics
from llm_edge_cache.errors import SettingsError, SlabConfigError
from llm_edge_cache.gateway.access import bears
from llm_edge_cache.gateway.admin import METHODS, Admin
from llm_edge_cache.gateway.answers import forwardable
from llm_edge_cache.gateway.bodies import TooLargeError, read_body
from llm_edge_cache.gateway.cached import CachedEndpoints
from llm_edge_cache.gateway.config import CONFIG_VARIABLE, DEFAULT_MEMORY, GatewayConfig
from llm_edge_cache.gateway.exchange import ExchangeReader
from llm_edge_cache.gateway.flights import AnswerFlights
from llm_edge_cache.gateway.patience import Patience
from llm_edge_cache.gateway.presence import while_present
from llm_edge_cache.gateway.protocols import PROTOCOLS, BadRequestError, WireProtocol
from llm_edge_cache.gateway.respond import Receive, Send, send_error, send_part, send_start, send_whole
from llm_edge_cache.gateway.upstream import Call, Upstream, UpstreamFailureError
from llm_edge_cache.manager import CacheManager
from llm_edge_cache.settings import L1Config, load_settings
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["Gateway", "from_environment"]

_log = logging.getLogger("llm_edge_cache")

_DRAIN_SECONDS: Final = 30.0
_TEXT: Final = (b"content-type", b"text/plain; charset=utf-8")
_JSON: Final = (b"content-type", b"application/json")
_ELSEWHERE: Final = PROTOCOLS["/v1/chat/completions"]  # whose errors are told at paths of no protocol


class Gateway:
    """The application of one worker."""

    def __init__(self, config: GatewayConfig) -> None:
        """Open the slab; the upstream and Redis are opened when the server starts."""
        self._config = config
        slab = None if config.l1 is not None else _open_slab(config.name, config.memory)
        l1 = config.l1 or L1Config(name=config.name, tti_seconds=None, ttl_seconds=None)
        self._manager = CacheManager(l1, config.l2, slab=slab)
        self._upstream = Upstream(config)
        self._flights = AnswerFlights(self._manager, self._upstream, config)
        self._read = ExchangeReader(config).read
        self._patience = Patience(config.client_timeout)
        self._cached = CachedEndpoints(self._manager.engine.core, self._flights, config)
        self._registry = CollectorRegistry()
        metrics.register(self._manager, self._registry)
        self._admin = Admin(self._manager, config)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request, or the server's start and stop."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)

    # ---- life ----

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await self._manager.open()
        await self._upstream.open()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._flights.drain(_DRAIN_SECONDS)
        await self._upstream.close()
        await self._manager.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    # ---- requests ----

    def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        path: str = scope["path"]
        protocol = PROTOCOLS.get(path)
        if protocol is not None and scope["method"] == "POST":
            return self._serve_cached(protocol, scope, receive, send)
        if path.startswith("/v1/"):
            return self._pass_through(scope, receive, send)
        return self._serve_own(path, scope, receive, send)

    async def _serve_cached(self, protocol: WireProtocol, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            config = self._config
            first = await self._patience.receive(receive)
            raw = first.get("body", b"")
            if first["type"] != "http.request" or first.get("more_body") or len(raw) > config.body_limit:
                # Not in every request: a hit feels every coroutine on its way.
                raw = await read_body(receive, first, config.body_limit, self._patience)
                if raw is None:
                    return  # the client is gone
            exchange = self._read(protocol, scope, raw)
        except BadRequestError as error:
            await send_error(send, protocol, error.status, error.message, code=error.code)
        except TooLargeError:
            message = f"the body is larger than {self._config.body_limit} bytes"
            await send_error(send, protocol, 413, message, code="too_large")
        except asyncio.TimeoutError:
            message = f"no more of the request's body came for {self._config.client_timeout:g} seconds"
            await send_error(send, protocol, 408, message, [(b"connection", b"close")], code="timeout")
        else:
            await self._cached.answer(exchange, receive, send)

    async def _pass_through(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = _Upload(receive)
        if not _has_body(scope):
            body.is_read.set()
        await while_present(receive, self._pass_on(scope, body, send), body=body.is_read)

    async def _pass_on(self, scope: dict[str, Any], body: _Upload, send: Send) -> None:
        has_started = False
        path = scope["raw_path"].decode("latin-1") if scope.get("raw_path") else scope["path"]
        try:
            headers, parts = forwardable(scope["headers"]), body.parts() if _has_body(scope) else None
            async with self._upstream.call(scope["method"], path, scope["query_string"], headers, parts) as call:
                await send_start(send, call.status, _passed(call))
                has_started = True
                async for chunk in call.chunks():
                    await send_part(send, chunk)
                await send_part(send, b"", more=False)
        except UpstreamFailureError as failure:
            if has_started:
                return  # without an end: the server cuts the connection, as the upstream did
            await send_error(send, _ELSEWHERE, failure.status, str(failure), code=failure.kind)

    async def _serve_own(self, path: str, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if path in ("/healthz", "/readyz"):
            await self._serve_health(path, send)
        elif path == "/metrics":
            await self._serve_metrics(scope, send)
        elif path in METHODS:
            await self._admin.serve(scope, receive, send)
        else:
            await send_error(send, _ELSEWHERE, 404, f"the gateway serves nothing at {path!r}; the API is under /v1/")

    async def _serve_health(self, path: str, send: Send) -> None:
        health = await self._manager.health_check()
        is_up = health.l1_healthy if path == "/healthz" else health.is_fully_healthy or health.l1_healthy
        body = msgspec.json.encode(health)
        await send_whole(send, 200 if is_up else 503, [_JSON], body)

    async def _serve_metrics(self, scope: dict[str, Any], send: Send) -> None:
        token = self._config.metrics_token
        if token is not None and not bears(scope, token):
            await send_whole(send, 401, [_TEXT, (b"www-authenticate", b"Bearer")], b"metrics want their bearer token\n")
            return
        body = await asyncio.get_running_loop().run_in_executor(None, generate_latest, self._registry)
        await send_whole(send, 200, [(b"content-type", CONTENT_TYPE_LATEST.encode())], body)


def _open_slab(name: str, memory_bytes: int) -> SharedSlab:
    """Take what is live, of whatever size: it may have been made anew, in another size, since this server started."""
    if SharedSlab.exists(name):
        return SharedSlab(name)
    try:
        return SharedSlab(name, SlabConfig(memory_bytes=memory_bytes, ttl=None))
    except SlabConfigError:  # 1 the old one is retired  2 we find none  3 its successor is made, and in use
        return SharedSlab.attach(name)


def _passed(call: Call) -> list[tuple[bytes, bytes]]:
    """Return the headers of an answer that is passed through. One without a body may tell a length all the same."""
    if call.status in (204, 304):
        return [header for header in call.headers if header[0] != b"content-length"]
    return call.headers


def _has_body(scope: dict[str, Any]) -> bool:
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


class _Upload:
    """A request's body as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.is_read = asyncio.Event()

    async def parts(self) -> AsyncIterator[bytes]:
        try:
            while True:
                message = await self._receive()
                if message["type"] != "http.request":
                    raise UpstreamFailureError("reset", 499, "the client is gone")
                yield message.get("body", b"")
                if not message.get("more_body"):
                    return
        finally:
            self.is_read.set()


def from_environment() -> Gateway:
    """Return the application that the environment describes; what a server's worker calls.

    `llm-edge-cache serve` leaves its whole configuration there. Under a server of one's own the variables of
    `load_settings` do: LLM_EDGE_CACHE_UPSTREAM, _NAME, _REDIS_URL and the others.

    Raises:
        SettingsError: no upstream is named, or a variable's value is not allowed.
    """
    described = os.environ.get(CONFIG_VARIABLE)
    if described is not None:
        return Gateway(msgspec.json.decode(described, type=GatewayConfig))
    settings = load_settings()
    if settings.upstream is None:
        raise SettingsError("no upstream: set LLM_EDGE_CACHE_UPSTREAM to the provider's URL")
    return Gateway(
        GatewayConfig(
            upstream=settings.upstream,
            name=settings.l1.name,
            memory=settings.slab_memory or DEFAULT_MEMORY,
            l2=settings.l2,
            admin_token=settings.admin_token,
        )
    )
