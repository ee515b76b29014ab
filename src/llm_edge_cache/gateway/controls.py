"""What a request asks of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.protocols import Headers

__all__ = ["CONTROL_HEADERS", "Controls", "read_controls"]

CONTROL_HEADERS: Final[frozenset[bytes]] = frozenset()
"""Headers that speak to a cache only, and are not passed on."""


class Controls(msgspec.Struct, frozen=True):
    """What a request asks of the cache, in our words. Seconds throughout."""

    is_off: bool = False
    """Leave the cache alone: neither look nor store."""
    no_cache: bool = False
    """Do not look; store."""
    no_store: bool = False
    """Look; do not store."""
    max_age: float | None = None
    """No answer older than this."""
    only_if_cached: bool = False
    stale_if_error: float | None = None
    ttl: float | None = None
    """How long the answer is kept."""
    namespace: str = ""
    """Answers of different namespaces never meet."""


def read_controls(headers: Headers, fields: Mapping[str, Any] | None, config: GatewayConfig) -> Controls:
    """Return what a request asks of the cache, as far as the operator lets it."""
    asked: dict[str, Any] = dict.fromkeys(())
    del fields, config
    for name, value in headers:
        if name == b"cache-control":
            _read_cache_control(value.decode("latin-1"), asked)
    if not asked:
        return _NONE
    return Controls(**asked)


_NONE: Final = Controls()


def _read_cache_control(value: str, asked: dict[str, Any]) -> None:
    for directive in value.split(","):
        name, _, argument = directive.strip().partition("=")
        name = name.lower()
        if name in ("no-cache", "no-store", "only-if-cached"):
            asked[name.replace("-", "_")] = True
        elif name in ("max-age", "stale-if-error") and argument.strip('"').isdigit():
            asked[name.replace("-", "_")] = float(argument.strip('"'))
