"""A cacheable endpoint: from the request to the last byte of its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from llm_edge_cache.gateway.answers import End, Head, HeaderList, kept_of
from llm_edge_cache.gateway.broadcast import Broadcast
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import Exchange
from llm_edge_cache.gateway.flights import AnswerFlights
from llm_edge_cache.gateway.presence import while_present
from llm_edge_cache.gateway.protocols import FrameSplitter, is_event_stream
from llm_edge_cache.gateway.respond import (
    Receive,
    Send,
    cache_headers,
    send_error,
    send_part,
    send_start,
    send_whole,
    whole,
)
from llm_edge_cache.lookup import L1Hit

if TYPE_CHECKING:
    from llm_edge_cache.core import Core
    from llm_edge_cache.model import CachedResponse

__all__ = ["CachedEndpoints"]

_TRIES: Final = 3  # flights of other workers that may break down before we ask for ourselves
_AGAIN: Final = frozenset({"aborted"})
_AGAIN_ONCE: Final = _AGAIN | {"reset"}
"""Failures of a call that another client's request made, after which ours may be answered by a second one.

A connection that broke was that call's bad luck; ours might have been answered. Once only: an upstream that breaks all
connections is called twice for all who wait, not once for each. After a timeout one would only wait again.
"""
_STATUS: Final = {"timeout": 504, "busy": 503, "internal": 500}


class CachedEndpoints:
    """Answers requests from the cache, from a call under way, or from the upstream."""

    def __init__(self, core: Core, flights: AnswerFlights, config: GatewayConfig) -> None:
        """Look in this cache."""
        self._core = core
        self._flights = flights
        self._config = config

    def answer(self, exchange: Exchange, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """Answer a request; what is not there at once, for as long as its client is.

        What to do is decided at once, by plain functions: a hit feels every coroutine on its way.
        """
        controls = exchange.controls
        if exchange.bypass is not None:
            status = b"fwd=bypass; detail=" + exchange.bypass.encode()
            return while_present(receive, self._ask_alone(exchange, send, b"BYPASS", status, store=False))
        if controls.no_cache or controls.max_age == 0:
            asking = self._ask_alone(exchange, send, b"MISS", b"fwd=request", store=not controls.no_store)
            return while_present(receive, asking)
        return self._answer_cached(exchange, receive, send)

    def _answer_cached(self, exchange: Exchange, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        found, controls = self._core.look(exchange.key), exchange.controls
        if isinstance(found, L1Hit):
            age = _age_of(found.response)
            if controls.max_age is None or age <= controls.max_age:
                return self._send_hit(exchange, send, found.response, age)
            asking = self._ask_alone(exchange, send, b"MISS", b"fwd=stale", store=not controls.no_store)
            return while_present(receive, asking)
        if controls.only_if_cached:
            headers = cache_headers(b"MISS", b"fwd=request; detail=only-if-cached", exchange.key)
            return send_error(send, exchange.protocol, 504, "this answer is not in the cache", headers)
        return while_present(receive, self._answer_joined(exchange, send))

    async def _send_hit(self, exchange: Exchange, send: Send, response: CachedResponse, age: int) -> None:
        kept, config = kept_of(response), self._config
        by = kept.by if config.show_workers else None
        status = b"hit; ttl=%d" % (int(kept.ttl) - age)
        headers = kept.headers + cache_headers(b"HIT", status, exchange.key, tier=b"l1", age=age, by=by)
        if config.pace and is_event_stream(kept.headers):
            await self._replay_paced(send, headers, response.raw)
        else:
            start, body = whole(200, headers, response.raw)
            await send(start)
            await send(body)

    async def _replay_paced(self, send: Send, headers: HeaderList, body: bytes) -> None:
        splitter = FrameSplitter()
        await send_start(send, 200, headers)
        for frame in splitter.feed(body):
            await send_part(send, frame)
            await asyncio.sleep(self._config.pace)
        await send_part(send, splitter.rest(), more=False)

    # ---- from a call under way ----

    async def _answer_joined(self, exchange: Exchange, send: Send) -> None:
        for attempt in range(_TRIES):
            broadcast, is_own = self._flights.join(exchange)
            with broadcast.read():
                await broadcast.started()
                head, end = broadcast.head, broadcast.end
                if head is None and end is not None and end.failure == "aborted":
                    continue  # the worker that asked is gone, and nothing was sent yet
                is_own = is_own and broadcast.source == "upstream"
                if head is not None and head.status != 200 and not is_own:
                    break  # an error is the answer to one client: its own credentials, its own limits
                again = frozenset[str]() if is_own else _AGAIN if attempt else _AGAIN_ONCE
                if await self._send_broadcast(exchange, broadcast, send, is_own=is_own, again=again):
                    return
        await self._ask_alone(exchange, send, b"MISS", b"fwd=miss", store=not exchange.controls.no_store)

    async def _ask_alone(self, exchange: Exchange, send: Send, verdict: bytes, status: bytes, *, store: bool) -> None:
        broadcast = self._flights.ask(exchange, store=store)
        with broadcast.read():
            await broadcast.started()
            headers = cache_headers(verdict, status, b"" if verdict == b"BYPASS" else exchange.key)
            await self._send(exchange, broadcast, send, [*broadcast.own_headers, *headers], again=frozenset())

    async def _send_broadcast(
        self, exchange: Exchange, broadcast: Broadcast, send: Send, *, is_own: bool, again: frozenset[str]
    ) -> bool:
        """Send an answer under way.

        Returns False if nothing was sent, because it failed in one of the ways after which one tries `again`.
        """
        key, source = exchange.key, broadcast.source
        by = 0 if self._config.show_workers else None
        if source == "stale":
            headers = cache_headers(b"STALE", b"hit; detail=stale-if-error", key, age=broadcast.age, by=by)
        elif source in ("l1", "l2"):
            headers = cache_headers(b"HIT", b"hit", key, tier=source.encode(), age=broadcast.age, by=by)
        elif is_own:
            headers = cache_headers(b"MISS", b"fwd=uri-miss", key, by=by)
        else:
            headers = cache_headers(b"COALESCED", b"fwd=uri-miss; collapsed", key, by=by)
        own = broadcast.own_headers if is_own else broadcast.head.headers if broadcast.head else []
        return await self._send(exchange, broadcast, send, [*own, *headers], again=again)

    async def _send(
        self, exchange: Exchange, broadcast: Broadcast, send: Send, headers: HeaderList, *, again: frozenset[str]
    ) -> bool:
        head = broadcast.head
        if head is not None and head.is_stream:
            return await self._send_stream(exchange, broadcast, send, head, headers, again=again)
        end = await broadcast.finished()
        if not end.failure and head is not None:
            await send_whole(send, head.status, headers, broadcast.body)
            return True
        if end.failure in again:
            return False
        await send_error(send, exchange.protocol, _status_of(end), end.message, _only_cache(headers), code=end.failure)
        return True

    async def _send_stream(
        self,
        exchange: Exchange,
        broadcast: Broadcast,
        send: Send,
        head: Head,
        headers: HeaderList,
        *,
        again: frozenset[str],
    ) -> bool:
        if broadcast.source == "worker" and again:
            # Another worker may die before the first event: whoever was sent nothing can be given a second answer.
            has_begun = await broadcast.after(0)
            if not has_begun and broadcast.end is not None and broadcast.end.failure in again:
                return False
        await send_start(send, head.status, headers)
        sent = 0
        while chunks := await broadcast.after(sent):
            sent += len(chunks)
            await send_part(send, chunks[0] if len(chunks) == 1 else b"".join(chunks))
        end = broadcast.end or End()
        if end.failure and head.is_encoded:
            return True  # no event can be added to compressed ones: it is left without an end, so the server cuts it
        # What was sent cannot be taken back, and a second answer must not be mixed into it: it ends with an error.
        last = exchange.protocol.error_event(end.message or "the answer broke off") if end.failure else b""
        await send_part(send, last, more=False)
        return True


def _age_of(response: CachedResponse) -> int:
    return 0 if response.cached_at is None else max(0, int(time.time() - response.cached_at))


def _status_of(end: End) -> int:
    return _STATUS.get(end.failure, 502)


def _only_cache(headers: HeaderList) -> HeaderList:
    """Return the headers that are our own."""
    return [header for header in headers if header[0].startswith((b"x-cache", b"cache-status"))]
