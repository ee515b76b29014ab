"""An answer as it is kept and passed on: its head, and the bytes of its body."""

from __future__ import annotations

import functools
import os
from typing import Final

import msgspec

from llm_edge_cache.codec import Entry
from llm_edge_cache.gateway.protocols import Headers, Verdict, is_event_stream
from llm_edge_cache.model import CachedResponse

__all__ = ["End", "Head", "Kept", "entry_of", "forwardable", "head_of", "keepable", "kept_of", "own_headers"]

HeaderList = list[tuple[bytes, bytes]]

_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110, section 7.6.1."""
_KEPT: Final = frozenset(
    {
        b"content-encoding",  # of an answer that is not kept, but that several clients may be waiting for
        b"content-language",
        b"content-type",
        b"openai-model",
        b"openai-version",
    }
)
"""Headers of an answer that are as true for the next client as for the first. All others (cookies, limits of rates,
ids of requests, traces, dates) were one client's."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What is known of an answer before its body."""

    status: int
    headers: HeaderList
    """Those that other clients may see."""

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream of events."""
        return is_event_stream(self.headers)

    @property
    def is_encoded(self) -> bool:
        """Whether its body is compressed: we asked for none that is, so it is passed on unread."""
        return any(name == b"content-encoding" and value.lower() != b"identity" for name, value in self.headers)


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is stored of an answer beside its body."""

    headers: HeaderList = []
    """Those that other clients may see."""
    by: int = 0
    """The worker that stored it."""
    ttl: float = 0.0
    """How long it was to be kept, in seconds."""


_NOTHING_KEPT: Final = Kept()
_encode: Final = msgspec.msgpack.Encoder().encode
_decode_kept: Final = msgspec.msgpack.Decoder(Kept).decode


class End(msgspec.Struct, frozen=True, array_like=True):
    """How an answer ended."""

    failure: str = ""
    """Empty: as the upstream ended it. Else an UpstreamFailureError's kind, "internal" or "aborted"."""
    message: str = ""
    """For people; nothing secret."""
    size: int = 0
    """Bytes of the body."""


def forwardable(headers: Headers) -> HeaderList:
    """Return the headers that a proxy passes on, names in lower case."""
    listed = {name for key, value in headers if key == b"connection" for name in _names(value)}
    return [(key, value) for key, value in headers if key not in _HOP_BY_HOP and key not in listed]


def _names(value: bytes) -> list[bytes]:
    return [name.strip().lower() for name in value.split(b",")]


def keepable(headers: Headers) -> HeaderList:
    """Return the headers that other clients may see."""
    return [(key, value) for key, value in headers if key in _KEPT]


def own_headers(headers: Headers) -> HeaderList:
    """Return the headers for the client whose request made the call: all but those that we write ourselves."""
    return [(key, value) for key, value in headers if key != b"content-length" and not key.startswith(b"x-cache")]


def entry_of(head: Head, body: bytes, verdict: Verdict, microseconds: int, ttl: float) -> Entry:
    """Return what is stored of an answer."""
    kept = _encode(Kept(head.headers, os.getpid(), ttl))
    response = CachedResponse(
        "",
        verdict.model or "",
        verdict.usage,
        raw=body,
        finish_reason=verdict.finish_reason,
        metadata={"kept": kept},
    )
    return Entry(response, microseconds=microseconds)


def head_of(response: CachedResponse) -> Head:
    """Return the head of a stored answer."""
    return Head(200, kept_of(response).headers)


def kept_of(response: CachedResponse) -> Kept:
    """Return what is stored of an answer beside its body. Not to be changed: it is that of other answers, too."""
    packed = response.metadata.get("kept")
    return _decode(packed) if isinstance(packed, bytes) else _NOTHING_KEPT


@functools.lru_cache(maxsize=1024)  # one for all answers of a worker, where the provider sends no times
def _decode(packed: bytes) -> Kept:
    return _decode_kept(packed)
