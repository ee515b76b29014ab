"""The operator's side over HTTP: the dashboard, its figures, and what makes answers void.

GET  /dashboard      the page
GET  /admin/stats    the figures that it polls
POST /admin/delete   {"key": "<64 hexadecimal digits>"}, {"tag": "..."} or {"namespace": "..."}
POST /admin/clear    {"confirm": "clear"}

`access` says who may. What is made void is so in both tiers and on all hosts (`invalidation`).
"""

from __future__ import annotations

import asyncio
import logging
import urllib.parse
from typing import TYPE_CHECKING, Any, Final

import msgspec

from llm_edge_cache.errors import SlabBusyError
from llm_edge_cache.gateway.access import admin_denial, page_denial, peer_of
from llm_edge_cache.gateway.answers import HeaderList
from llm_edge_cache.gateway.bodies import TooLargeError, read_body
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.figures import figures
from llm_edge_cache.gateway.page import dashboard
from llm_edge_cache.gateway.patience import Patience
from llm_edge_cache.gateway.protocols import PROTOCOLS
from llm_edge_cache.gateway.respond import Receive, Send, send_error, send_whole
from llm_edge_cache.invalidation import Invalidation, namespace_tag
from llm_edge_cache.keys import is_tier_key
from llm_edge_cache.regions import Word

if TYPE_CHECKING:
    from llm_edge_cache.manager import CacheManager

__all__ = ["METHODS", "Admin"]

_PAGE: Final = "/dashboard"
_STATS: Final = "/admin/stats"
_DELETE: Final = "/admin/delete"
METHODS: Final[dict[str, tuple[str, ...]]] = {
    _PAGE: ("GET", "HEAD"),
    _STATS: ("GET", "HEAD"),
    _DELETE: ("POST",),
    "/admin/clear": ("POST",),
}
"""What is served here, and what it takes."""

_log = logging.getLogger("llm_edge_cache.admin")

_JSON: Final[HeaderList] = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
_SHAPE: Final = PROTOCOLS["/v1/chat/completions"]  # of errors
_LARGEST: Final = 16 << 10  # bytes of a request
_LONGEST_NAME: Final = 1024  # characters of a tag or a namespace
_SHOWN_DIGITS: Final = 16  # of a key, in the log
_ALL: Final = (1 << 64) - 1
_CONFIRM: Final = 'this makes every answer void, on every host: send {"confirm": "clear"} to have it done'
_ONE_OF: Final = 'send one of {"key": "..."}, {"tag": "..."} and {"namespace": "..."}'


class _RefusedError(Exception):
    """A request that is not carried out."""

    def __init__(self, status: int, message: str, headers: HeaderList | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or []


class Admin:
    """Answers the operator. One for each worker."""

    def __init__(self, manager: CacheManager, config: GatewayConfig) -> None:
        """Show and change this cache."""
        self._manager = manager
        self._token = config.admin_token
        self._patience = Patience(config.client_timeout)
        self._is_looking = asyncio.Lock()  # at most one poll at a time takes this worker's time

    async def serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request at one of `METHODS`."""
        try:
            self._admit(scope)
            headers, body = await self._answer(scope, receive)
        except _RefusedError as refused:
            await send_error(send, _SHAPE, refused.status, refused.message, refused.headers)
        else:
            await send_whole(send, 200, headers, body)

    def _admit(self, scope: dict[str, Any]) -> None:
        judge = page_denial if scope["path"] == _PAGE else admin_denial
        denial = judge(scope, self._token)
        if denial is not None:
            raise _RefusedError(*denial)
        methods = METHODS[scope["path"]]
        if scope["method"] not in methods:
            allowed = ", ".join(methods)
            raise _RefusedError(405, f"this takes {allowed}", [(b"allow", allowed.encode())])

    async def _answer(self, scope: dict[str, Any], receive: Receive) -> tuple[HeaderList, bytes]:
        if scope["path"] == _PAGE:
            return dashboard()
        if scope["path"] == _STATS:
            return await self._stats(scope["query_string"])
        asked = await self._read(scope, receive)
        kind, name, what = _deletion(asked) if scope["path"] == _DELETE else _clearing(asked)
        return await self._void(kind, name, what, peer_of(scope))

    async def _stats(self, query: bytes) -> tuple[HeaderList, bytes]:
        cursor = _cursor_of(query)
        async with self._is_looking:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(None, figures, self._manager.slab, cursor)
        return _JSON, msgspec.json.encode(found)

    async def _void(self, kind: str, name: str, what: Invalidation, peer: str) -> tuple[HeaderList, bytes]:
        shown = name[:_SHOWN_DIGITS] if kind == "key" else name
        try:
            await self._manager.perform(self._manager.engine.invalidator.invalidate(what))
        except SlabBusyError:
            _log.warning("%s %r could not be made void for %s: the slab is busy", kind, shown, peer)
            raise _RefusedError(503, "the slab is busy: try again") from None
        _log.info("%s %r was made void for %s", kind, shown, peer)
        return _JSON, msgspec.json.encode({"void": {kind: name}, "redis": self._redis()})

    def _redis(self) -> str | None:
        """Say what became of it in Redis: None where there is none."""
        if not self._manager.has_l2:
            return None
        return "later" if self._manager.slab._word(Word.UNDELIVERED) else "void"

    async def _read(self, scope: dict[str, Any], receive: Receive) -> dict[str, str]:
        """Return the JSON object of texts that a request has as its body."""
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise _RefusedError(415, "send JSON, with content-type: application/json")
        try:
            first = await self._patience.receive(receive)
            raw = await read_body(receive, first, _LARGEST, self._patience)
        except TooLargeError:
            raise _RefusedError(413, f"the body is larger than {_LARGEST} bytes") from None
        except asyncio.TimeoutError:
            raise _RefusedError(408, "the body did not come", [(b"connection", b"close")]) from None
        try:
            return msgspec.json.decode(raw or b"", type=dict[str, str])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise _RefusedError(400, "the body must be one JSON object, its values texts") from None


_Void = tuple[str, str, Invalidation]
"""What kind of thing becomes void, its name, and how the cache calls it."""


def _deletion(asked: dict[str, str]) -> _Void:
    if len(asked) != 1:
        raise _RefusedError(400, _ONE_OF)
    ((kind, name),) = asked.items()
    if kind == "key":
        if not is_tier_key(name.encode()):
            raise _RefusedError(400, "a key is 64 hexadecimal digits in lower case, as X-Cache-Key tells them")
        return kind, name, Invalidation("key", name)
    if kind not in ("tag", "namespace"):
        raise _RefusedError(400, _ONE_OF)
    if not 0 < len(name) <= _LONGEST_NAME:
        raise _RefusedError(400, f"a {kind} is 1 to {_LONGEST_NAME} characters")
    return kind, name, Invalidation("tag", name if kind == "tag" else namespace_tag(name))


def _clearing(asked: dict[str, str]) -> _Void:
    if asked != {"confirm": "clear"}:
        raise _RefusedError(400, _CONFIRM)
    return "all", "", Invalidation("all")


def _cursor_of(query: bytes) -> int:
    given = urllib.parse.parse_qs(query.decode("latin-1")).get("cursor", ["0"])[-1]
    if not (given.isascii() and given.isdigit() and len(given) <= len(str(_ALL)) and int(given) <= _ALL):
        raise _RefusedError(400, "cursor is what keys.next of the last answer was")
    return int(given)
