"""Who may see the dashboard and change the cache over HTTP.

Without a token, whoever is on this host: the connection comes from a loopback address or over a Unix socket, and
nothing says that a proxy passed the request on for somebody else. With one, whoever bears it, and nobody else.

A browser on this host is led by pages from elsewhere, so being on this host is not enough for it:

- DNS rebinding: 1 a page of evil.example is loaded  2 the name now leads to 127.0.0.1  3 its script asks "its own"
  server, and may read the answer. The Host header still says evil.example.
- Requests across sites: a form or an image of that page. The browser says so in Sec-Fetch-Site; and what changes
  anything wants a body of JSON, which such a request cannot have without asking first, which nobody here answers.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from typing import Any, Final, NamedTuple

from llm_edge_cache.gateway.answers import HeaderList

__all__ = ["Denial", "admin_denial", "bears", "page_denial", "peer_of"]

_PROXIES: Final = frozenset(
    {
        b"cf-connecting-ip",
        b"forwarded",
        b"true-client-ip",
        b"via",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-real-ip",
    }
)
"""Headers that proxies add."""
_HOST: Final = re.compile(r"([^:\[\]]+|\[[0-9a-f:.]+\])(?::[0-9]+)?", re.ASCII)
_OWN_SITE: Final = (b"same-origin", b"none")
_SHOWN: Final = 80  # characters of a header that a message quotes
_REMEDY: Final = (
    "give the gateway an admin token (LLM_EDGE_CACHE_ADMIN_TOKEN, or serve --admin-token), and send it as "
    "'Authorization: Bearer TOKEN'"
)


class Denial(NamedTuple):
    """Why a request is not answered."""

    status: int
    message: str
    headers: HeaderList


def bears(scope: dict[str, Any], token: str) -> bool:
    """Tell whether a request bears a token."""
    given: bytes = dict(scope["headers"]).get(b"authorization", b"")
    return hmac.compare_digest(given, b"Bearer " + token.encode())


def admin_denial(scope: dict[str, Any], token: str | None) -> Denial | None:
    """Judge a request that reads figures or changes something. Returns None if it may."""
    if token is not None:
        if bears(scope, token):
            return None
        message = "the admin calls want their token: 'Authorization: Bearer TOKEN'"
        return Denial(401, message, [(b"www-authenticate", b"Bearer")])
    site = dict(scope["headers"]).get(b"sec-fetch-site")
    if site is not None and site not in _OWN_SITE:
        return Denial(403, "a page from elsewhere asked for this", [])
    return _stranger_denial(scope)


def page_denial(scope: dict[str, Any], token: str | None) -> Denial | None:
    """Judge a request for the page. It holds no figures; where there is a token, it is everybody's, and asks for it."""
    return None if token is not None else _stranger_denial(scope)


def peer_of(scope: dict[str, Any]) -> str:
    """Return who asks, for people."""
    client = scope.get("client")
    return "a Unix socket" if client is None else str(client[0])


def _stranger_denial(scope: dict[str, Any]) -> Denial | None:
    if not _is_from_here(scope):
        message = f"without a token this answers its own host alone, and no proxy. From elsewhere: {_REMEDY}"
        return Denial(403, message, [])
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1 or not _is_loopback_name(hosts[0]):
        asked = hosts[0][:_SHOWN] if hosts else ""
        message = f"this was asked for as host {asked!r}: say localhost or 127.0.0.1 instead, or {_REMEDY}"
        return Denial(403, message, [])
    return None


def _is_from_here(scope: dict[str, Any]) -> bool:
    if any(name in _PROXIES for name, _ in scope["headers"]):
        return False
    client, server = scope.get("client"), scope.get("server")
    if client is not None:
        return _is_loopback(client[0])
    # Only a Unix socket has no peer and no port. 1 a stranger sends a request over TCP and resets the connection
    # 2 it is accepted, and has no peer any more  3 the request is read all the same.
    return server is None or server[1] is None


def _is_loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def _is_loopback_name(host: str) -> bool:
    """Tell whether a Host header names this host: localhost, or a loopback address, with or without a port."""
    match = _HOST.fullmatch(host.lower())
    if match is None:
        return False
    name = match[1].strip("[]")
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)
