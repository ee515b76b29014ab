"""One request at a cacheable endpoint, read and judged: what it asks, under which key, and what the cache may do."""

from __future__ import annotations

import hashlib
from typing import Any, Final, NamedTuple

import msgspec

from llm_edge_cache.gateway.answers import HeaderList, forwardable
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.controls import CONTROL_HEADERS, Controls, read_controls
from llm_edge_cache.gateway.protocols import (
    SHARED_SCOPE,
    BadRequestError,
    WireProtocol,
    cache_key,
    caller_scope,
    is_key_header,
    parse_body,
)

__all__ = ["Exchange", "ExchangeReader"]

_IDENTITY: Final = (b"accept-encoding", b"identity")
_LONGEST_VALUE: Final = 60  # bytes of a header that an error message quotes
_MOST_KNOWN: Final = 1024  # requests, of some 300 bytes each
_MOST_NAMES: Final = 1024
_REPLACED: Final = (b"accept-encoding", b"content-length")

_encode: Final = msgspec.msgpack.Encoder().encode


class _Reading(NamedTuple):
    """What a request was read as."""

    key: bytes
    controls: Controls
    bypass: str | None
    is_stream: bool
    is_stripped: bool


class Exchange(msgspec.Struct, frozen=True, eq=False):
    """What a client wants. Its repr shows nothing of it."""

    protocol: WireProtocol
    path: str
    query: bytes
    received_headers: HeaderList
    received: bytes
    """The body as it came."""
    key: bytes
    """The key of the answer, 64 hexadecimal digits."""
    controls: Controls
    bypass: str | None
    """Why the cache is left alone; None: it is not."""
    is_stream: bool
    """Whether it asks for a stream of events."""
    is_stripped: bool
    """Whether its body speaks to the cache, which the upstream is not to see."""

    @property
    def headers(self) -> HeaderList:
        """As they go to the upstream. What is to be kept has to come uncompressed."""
        passed = [
            header
            for header in forwardable(self.received_headers)
            if header[0] not in CONTROL_HEADERS and header[0] not in _REPLACED
        ]
        return [*passed, _IDENTITY]

    @property
    def body(self) -> bytes:
        """As it goes to the upstream."""
        return parse_body(self.received).forward() if self.is_stripped else self.received

    def __repr__(self) -> str:
        return f"<Exchange {self.protocol.name} {self.key[:16].decode()}>"


class ExchangeReader:
    """Reads the requests of one worker, and remembers what those were read as that may come again.

    Whoever asks again mostly sends the same bytes, and to read them anew would take longer than all else that a hit
    needs. They are known again by the BLAKE2b of everything that the reading depends on, so neither prompts nor
    credentials are kept.
    """

    def __init__(self, config: GatewayConfig) -> None:
        """Read as this configuration says."""
        self._config = config
        self._known: dict[bytes, _Reading] = {}
        self._ordinary: set[bytes] = set()  # names of headers that are of no concern to the cache: nearly all

    def read(self, protocol: WireProtocol, scope: dict[str, Any], raw: bytes) -> Exchange:
        """Read a request.

        Args:
            protocol: what is spoken at its path.
            scope: ASGI's, with path, query and headers.
            raw: the body.

        Raises:
            BadRequestError: the body is none that can be understood.
        """
        headers: HeaderList = scope["headers"]
        query: bytes = scope["query_string"]
        ordinary = self._ordinary
        telling = [header for header in headers if header[0] not in ordinary and self._is_telling(header[0])]
        # The encoding ends where its value ends, so the body after it cannot run into it.
        name = hashlib.blake2b(_encode((protocol.path, query, telling)) + raw, digest_size=32).digest()
        reading = self._known.get(name)
        if reading is None:
            reading = self._read(protocol, query, telling, raw, headers)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()  # those that are asked for often are back after one reading each
            self._known[name] = reading
        return Exchange(protocol, scope["path"], query, headers, raw, *reading)

    def _is_telling(self, name: bytes) -> bool:
        """Tell whether a header, its name in lower case, is of any concern to the cache."""
        if name in CONTROL_HEADERS or is_key_header(name):
            return True
        if len(self._ordinary) < _MOST_NAMES:
            self._ordinary.add(name)
        return False

    def _read(
        self, protocol: WireProtocol, query: bytes, telling: HeaderList, raw: bytes, headers: HeaderList
    ) -> _Reading:
        config = self._config
        try:
            body = parse_body(raw)
        except BadRequestError as error:
            raise BadRequestError(error.message + _of_which_type(headers), error.code) from None
        inside = body.cache_controls
        controls = read_controls(telling, inside, config)
        caller = SHARED_SCOPE if config.share_between_callers else caller_scope(telling)
        key = cache_key(protocol.path, query, config.base, telling, body, scope=f"{caller}/{controls.namespace}")
        bypass = "asked" if controls.is_off else protocol.bypass_reason(body)
        return _Reading(key.encode(), controls, bypass, body.is_stream, inside is not None)


def _of_which_type(headers: HeaderList) -> str:
    """Return what explains that a body is no JSON: its headers say so. Where it is JSON, the upstream may mind them."""
    for name, value in headers:
        is_other = name == b"content-type" and b"json" not in value.lower()
        if is_other or (name == b"content-encoding" and value != b"identity"):
            return f"; its {name.decode()} is {value[:_LONGEST_VALUE].decode('latin-1')!r}, it must be plain JSON"
    return ""
