"""What a gateway is told when it starts."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import msgspec

from llm_edge_cache.errors import SettingsError
from llm_edge_cache.settings import VISIBLE, L1Config, L2Config, is_token
from llm_edge_cache.slabconfig import MiB

__all__ = ["CONFIG_VARIABLE", "DEFAULT_MEMORY", "SERVER_OPTIONS", "GatewayConfig"]

CONFIG_VARIABLE: Final = "_LLM_EDGE_CACHE_GATEWAY"
"""Holds the configuration as JSON, for the workers that a server starts."""
DEFAULT_MEMORY: Final = 256 * MiB
"""Of a slab that a gateway has to make."""
SERVER_OPTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "timeout_keep_alive": 75,  # longer than clients keep a connection: else one closes it as the other writes
        # A provider's own are passed on, and are not to be there twice.
        "server_header": False,
        "date_header": False,
    }
)
"""What uvicorn is to be told wherever it serves the gateway."""

_SCHEMES: Final = ("http", "https")
_SECRETS: Final = ("admin_token", "metrics_token")


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One gateway: what it stands in front of, what it keeps, and its limits. Times in seconds, sizes in bytes.

    Its repr shows no token.

    Raises:
        SettingsError: the upstream is no URL of a server, or a token is none that a header can carry.
    """

    upstream: str
    """URL of the provider, e.g. https://api.openai.com; a trailing /v1 is the same."""
    name: str = "llm-edge-cache"
    """The slab's name."""
    l1: L1Config | None = None
    """None: the slab that is live under the name, or one of `memory` bytes."""
    memory: int = DEFAULT_MEMORY
    """Size of the slab, if it has to be made."""
    l2: L2Config | None = None
    share_between_callers: bool = False
    """Whether callers with different credentials get one another's answers."""
    ttl: float = 3600.0
    """How long an answer is kept where the request does not say."""
    ttl_most: float = 7 * 24 * 3600.0
    """The longest life that a request may ask for."""
    stale_if_error: float = 0.0
    """How long beyond its life an answer may stand in for a failing upstream. 0: not at all."""
    obey_controls: frozenset[str] = frozenset(
        {"off", "no-cache", "no-store", "max-age", "only-if-cached", "stale-if-error", "ttl", "namespace", "tags"}
    )
    """What callers may ask of the cache."""
    keep_cut_answers: bool = False
    """Keep answers that a limit of tokens or a filter cut short."""
    body_limit: int = 50 * MiB
    """The largest request."""
    answer_limit: int = 64 * MiB
    """The largest answer of a cacheable endpoint."""
    upstream_calls: int = 1000
    """Calls of one worker under way at once; more wait, for `connect_timeout` at most."""
    connect_timeout: float = 10.0
    idle_timeout: float = 300.0
    """How long the upstream may be silent."""
    client_timeout: float = 60.0
    """How long a client may be silent before its request is whole."""
    background_limit: float = 600.0
    """How long an answer is still read, to be stored, after the worker's last client that waited for it has gone."""
    pace: float = 0.0
    """Seconds between the events of a stream that is answered from the cache; 0: all at once."""
    metrics_token: str | None = None
    """What /metrics wants as a bearer token; None: nothing."""
    admin_token: str | None = None
    """What the dashboard's figures and the admin calls want as a bearer token; None: they answer this host alone."""
    show_workers: bool = False
    """Tell in headers which worker answered and which had stored the answer; for demonstrations."""

    def __post_init__(self) -> None:
        """Refuse an upstream that is none, and tokens."""
        parts = urllib.parse.urlsplit(self.upstream)
        if parts.scheme not in _SCHEMES or not parts.hostname or parts.query or parts.fragment:
            raise SettingsError(
                f"upstream={_without_user(parts)!r} is not allowed: it must be http:// or https:// and a host, "
                "with nothing after the path"
            )

        for field in _SECRETS:
            token = getattr(self, field)
            if token is not None and not is_token(token):
                raise SettingsError(f"{field} is not allowed: it must be {VISIBLE}")

    def __repr__(self) -> str:
        """Show everything but the tokens."""
        shown = {field: getattr(self, field) for field in self.__struct_fields__}
        shown.update((field, "***") for field in _SECRETS if shown[field] is not None)
        return f"GatewayConfig({', '.join(f'{field}={value!r}' for field, value in shown.items())})"

    @property
    def base(self) -> str:
        """The upstream's URL without the /v1 that every path begins with."""
        return self.upstream.rstrip("/").removesuffix("/v1")


def _without_user(parts: urllib.parse.SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
