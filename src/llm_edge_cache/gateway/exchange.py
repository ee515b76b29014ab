"""One request at a cacheable endpoint, read and judged: what it asks, under which key, and what the cache may do."""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec

from llm_edge_cache.gateway.answers import HeaderList, forwardable
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.controls import CONTROL_HEADERS, Controls, read_controls
from llm_edge_cache.gateway.protocols import (
    SHARED_SCOPE,
    BadRequestError,
    RequestBody,
    WireProtocol,
    cache_key,
    caller_scope,
    is_key_header,
    parse_body,
)

__all__ = ["Exchange", "read_exchange"]

_IDENTITY: Final = (b"accept-encoding", b"identity")
_LONGEST_VALUE: Final = 60  # bytes of a header that an error message quotes
_REPLACED: Final = (b"accept-encoding", b"content-length")


class Exchange(msgspec.Struct, frozen=True, eq=False):
    """What a client wants. Its repr shows nothing of it."""

    protocol: WireProtocol
    path: str
    query: bytes
    received_headers: HeaderList
    received: RequestBody
    key: bytes
    """The key of the answer, 64 hexadecimal digits."""
    controls: Controls
    bypass: str | None
    """Why the cache is left alone; None: it is not."""

    @property
    def is_stream(self) -> bool:
        """Whether it asks for a stream of events."""
        return self.received.is_stream

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
        return self.received.forward()

    def __repr__(self) -> str:
        return f"<Exchange {self.protocol.name} {self.key[:16].decode()}>"


def read_exchange(protocol: WireProtocol, scope: dict[str, Any], raw: bytes, config: GatewayConfig) -> Exchange:
    """Read a request, as far as a hit needs it.

    Raises:
        BadRequestError: the body is none that can be understood.
    """
    headers: HeaderList = scope["headers"]
    try:
        body = parse_body(raw)
    except BadRequestError as error:
        raise BadRequestError(error.message + _of_which_type(headers), error.code) from None
    telling = [header for header in headers if _tells_cache(header[0])]
    controls = read_controls(telling, body.cache_controls, config)
    query: bytes = scope["query_string"]
    caller = SHARED_SCOPE if config.share_between_callers else caller_scope(telling)
    key = cache_key(protocol.path, query, config.base, telling, body, scope=f"{caller}/{controls.namespace}")
    bypass = "asked" if controls.is_off else protocol.bypass_reason(body)
    return Exchange(protocol, scope["path"], query, headers, body, key.encode(), controls, bypass)


@functools.lru_cache(maxsize=1024)  # of names: few, and the same in every request
def _tells_cache(name: bytes) -> bool:
    """Tell whether a header, its name in lower case, is of any concern to the cache; one in ten is."""
    return name in CONTROL_HEADERS or is_key_header(name)


def _of_which_type(headers: HeaderList) -> str:
    """Return what explains that a body is no JSON: its headers say so. Where it is JSON, the upstream may mind them."""
    for name, value in headers:
        is_other = name == b"content-type" and b"json" not in value.lower()
        if is_other or (name == b"content-encoding" and value != b"identity"):
            return f"; its {name.decode()} is {value[:_LONGEST_VALUE].decode('latin-1')!r}, it must be plain JSON"
    return ""
