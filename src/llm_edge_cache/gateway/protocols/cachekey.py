"""The key under which the gateway keeps an answer: SHA-256 of everything that the answer may depend on.

The digest is over two self-delimiting MessagePack values one after another,

    ["gateway", version, endpoint, query, upstream, headers, scope]   and   the canonical body

so no two requests that differ in any of it share an encoding (`llm_edge_cache.canonical` says why); the first element
keeps them apart from the encodings of `CacheableRequest`, which start with a number. What is normalised, and what is
not:

- the query is taken exactly as sent: another order or spelling is another entry, which costs a miss, never a wrong hit;
- significant headers are what selects an API's version or its features (`SIGNIFICANT_HEADERS`). A `*-beta` header is a
  set: its members are split at commas over all its lines, trimmed, and sorted. Other headers are taken as they are;
- the scope says between whom answers are shared: :func:`caller_scope` of the caller's credential, so nobody else's
  answers are ever found, or `SHARED_SCOPE` where the operator shares all answers between all callers;
- of the body all fields count but `body.EXCLUDED_FIELDS` and `stream_options.include_obfuscation`; numbers are not
  rounded; `stream` counts, so a stream and a plain answer to one question are two entries.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from typing import Final

import msgspec

from llm_edge_cache.gateway.protocols.body import RequestBody

__all__ = [
    "KEY_VERSION",
    "SHARED_SCOPE",
    "SIGNIFICANT_HEADERS",
    "Headers",
    "cache_key",
    "caller_scope",
    "is_caller_header",
    "is_key_header",
]

Headers = Iterable[tuple[bytes, bytes]]
"""Headers as ASGI hands them out: names in lower case."""

KEY_VERSION: Final = 1
"""Any change to what is above needs the next number, and makes every key a new one."""
SHARED_SCOPE: Final = ""
"""The scope of answers that all callers share."""
SIGNIFICANT_HEADERS: Final = frozenset({b"anthropic-beta", b"anthropic-version", b"openai-beta"})
"""Headers that change what is answered."""
_CALLER: Final = re.compile(
    rb"auth|api-?key|token|secret|password|credential|cookie|subscription-key|forwarded-user|remote-user"
    rb"|organi[sz]ation|project|workspace|tenant|account"
)
"""Parts of the names of headers that say who asks. Which names there are only the upstream knows: relays and companies
have their own. A header that is wrongly taken for one costs hits; one that is missed hands answers to strangers."""

_BETA: Final = b"-beta"

_encode: Final = msgspec.msgpack.Encoder().encode  # of strings, integers and lists there is one encoding each


def cache_key(
    endpoint: str, query: bytes, upstream: str, headers: Headers, body: RequestBody, *, scope: str = SHARED_SCOPE
) -> str:
    """Return the key of a request: 64 lower-case hexadecimal digits.

    Args:
        endpoint: the path that was asked for, e.g. `/v1/chat/completions`.
        query: the query string as received, without the question mark.
        upstream: which provider is asked, e.g. its base URL.
        headers: the request's headers, names in lower case.
        body: the parsed body.
        scope: what :func:`caller_scope` returned, or `SHARED_SCOPE`.
    """
    head = ("gateway", KEY_VERSION, endpoint, query, upstream, _significant(headers), scope)
    digest = hashlib.sha256(_encode(head))
    digest.update(body.canonical)
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)  # of names: few, and the same in every request
def is_caller_header(name: bytes) -> bool:
    """Tell whether a header, its name in lower case, says who asks: the credential, or on whose account."""
    return _CALLER.search(name) is not None


def is_key_header(name: bytes) -> bool:
    """Tell whether a header, its name in lower case, may count for the key: as significant, or as the caller's."""
    return name in SIGNIFICANT_HEADERS or is_caller_header(name)


def caller_scope(headers: Headers) -> str:
    """Return the scope of one caller: a hash of the headers that say who asks, never any of their text.

    Args:
        headers: the request's headers, names in lower case.

    Returns:
        64 hexadecimal digits. Callers without any credential share one scope, which no credential has.
    """
    return hashlib.sha256(_encode(sorted([header for header in headers if is_caller_header(header[0])]))).hexdigest()


def _significant(headers: Headers) -> list[tuple[bytes, bytes]]:
    found = [header for header in headers if header[0] in SIGNIFICANT_HEADERS]
    if not found:
        return found
    members: set[tuple[bytes, bytes]] = set()
    for name, value in found:
        parts = value.split(b",") if name.endswith(_BETA) else [value]
        members.update((name, part.strip()) for part in parts)
    return sorted(members)
