"""What a request asks of the cache, in whose words ever.

`Cache-Control` (RFC 9111, section 5.2.1) is understood as the RFC has it. Beside it one table (`ALIASES`) names our own
header and those of other gateways, and one the members of LiteLLM's `cache` object in the body. The operator decides
which controls are obeyed (`GatewayConfig.obey_controls`); others are read and ignored. Where several speak of one
thing, the body goes before the headers, and among headers the last one counts.

Not understood on purpose: a key of the caller's own (Cloudflare's cf-aig-cache-key), since it would give one question's
answer to another, and several answers for one question (Helicone's buckets).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.protocols import BadRequestError, Headers
from llm_edge_cache.invalidation import namespace_tag

__all__ = ["ALIASES", "CONTROL_HEADERS", "Controls", "read_controls"]

_LONGEST_NAMESPACE: Final = 256
_MOST_TAGS: Final = 16
_LONGEST_TAG: Final = 128
_TRUE: Final = ("true", "1", "yes")
_FALSE: Final = ("false", "0", "no")
_MOST_SECONDS: Final = 1e9


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
    given_tags: tuple[str, ...] = ()
    """What the caller wants the answer stored under."""

    @property
    def tags(self) -> tuple[str, ...]:
        """What the answer is stored under, for an operator to void it by."""
        return (namespace_tag(self.namespace), *self.given_tags) if self.namespace else self.given_tags


_NONE: Final = Controls()
_NAMESPACES: Final = namespace_tag("")

# ---- values; each raises ValueError with what is allowed ----


def _switch(value: object) -> bool:
    text = str(value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE or value is None:
        return False
    raise ValueError("true or false")


def _no_switch(value: object) -> bool:
    return not _switch(value)


def _seconds(value: object) -> float:
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if isinstance(value, bool) or not 0 <= number <= _MOST_SECONDS:
        raise ValueError("a number of seconds")
    return number


def _namespace(value: object) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_NAMESPACE:
        raise ValueError(f"text of at most {_LONGEST_NAMESPACE} characters")
    return value


def _tags(value: object) -> tuple[str, ...]:
    tags = tuple(dict.fromkeys(tag for part in str(value).split(",") if (tag := part.strip())))
    if len(tags) > _MOST_TAGS or not all(map(_is_tag, tags)):
        raise ValueError(
            f"at most {_MOST_TAGS} tags, separated by commas, each of at most {_LONGEST_TAG} printable ASCII "
            f"characters, and none that begins with {_NAMESPACES!r}"
        )
    return tags


def _is_tag(tag: str) -> bool:
    return len(tag) <= _LONGEST_TAG and tag.isascii() and tag.isprintable() and not tag.startswith(_NAMESPACES)


_Reader = Callable[[object], object]

ALIASES: Final[dict[bytes, tuple[str, _Reader]]] = {
    b"x-cache-tags": ("given_tags", _tags),
    # Cloudflare AI Gateway
    b"cf-aig-cache-ttl": ("ttl", _seconds),
    b"cf-aig-skip-cache": ("is_off", _switch),
    # Portkey
    b"x-portkey-cache-force-refresh": ("no_cache", _switch),
    b"x-portkey-cache-namespace": ("namespace", _namespace),
    # Helicone
    b"helicone-cache-enabled": ("is_off", _no_switch),
    b"helicone-cache-seed": ("namespace", _namespace),
    # OpenRouter
    b"x-openrouter-cache": ("is_off", _no_switch),
    b"x-openrouter-cache-clear": ("no_cache", _switch),
    b"x-openrouter-cache-ttl": ("ttl", _seconds),
}
"""Our own header and those of other gateways: which control each is, and how its value is read."""

_MEMBERS: Final[dict[str, tuple[str, _Reader]]] = {
    "ttl": ("ttl", _seconds),
    "s-maxage": ("max_age", _seconds),
    "s-max-age": ("max_age", _seconds),
    "no-cache": ("no_cache", _switch),
    "no-store": ("no_store", _switch),
    "namespace": ("namespace", _namespace),
    "use-cache": ("is_off", _no_switch),
}
"""Members of LiteLLM's `cache` object."""

_DIRECTIVES: Final[dict[str, str]] = {
    "no-cache": "no_cache",
    "no-store": "no_store",
    "only-if-cached": "only_if_cached",
    "max-age": "max_age",
    "stale-if-error": "stale_if_error",
}
_NAMES: Final = {
    "is_off": "off",
    "given_tags": "tags",
}  # as the operator writes them, where that is not the field with hyphens

CONTROL_HEADERS: Final[frozenset[bytes]] = frozenset({b"cache-control", *ALIASES})
"""Headers that speak to this cache, and are not passed on."""


def read_controls(headers: Headers, members: Mapping[str, Any] | None, config: GatewayConfig) -> Controls:
    """Return what a request asks of the cache, as far as the operator obeys it.

    Args:
        headers: the request's headers, names in lower case.
        members: the body's `cache` object, if there is one.
        config: what is obeyed.

    Raises:
        BadRequestError: a value is none that the control can have.
    """
    asked: dict[str, object] = {}
    for name, value in headers:
        if name in CONTROL_HEADERS:
            _read_header(name, _text(value), asked)
    for member, value in (members or {}).items():
        if member in _MEMBERS:
            field, read = _MEMBERS[member]
            asked[field] = _read(f"cache.{member}", read, value)
    if not asked:
        return _NONE
    return msgspec.convert({field: value for field, value in asked.items() if _is_obeyed(field, config)}, Controls)


def _text(value: bytes) -> str:
    """Return a header's value as text: UTF-8, as an operator writes the same name elsewhere, or what it may be."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _is_obeyed(field: str, config: GatewayConfig) -> bool:
    return _NAMES.get(field, field.replace("_", "-")) in config.obey_controls


def _read_header(name: bytes, value: str, asked: dict[str, object]) -> None:
    if name == b"cache-control":
        _read_cache_control(value, asked)
    else:
        field, read = ALIASES[name]
        asked[field] = _read(name.decode(), read, value)


def _read(name: str, read: _Reader, value: object) -> object:
    try:
        return read(value)
    except ValueError as error:
        raise BadRequestError(f"{name} must be {error}", "invalid_cache_control") from None


def _read_cache_control(value: str, asked: dict[str, object]) -> None:
    """Read the directives. What the RFC does not know is ignored, as it says; an age that is none counts as 0."""
    for directive in value.split(","):
        name, equals, argument = directive.strip().partition("=")
        field = _DIRECTIVES.get(name.strip().lower())
        if field in ("max_age", "stale_if_error"):
            digits = argument.strip().strip('"')
            asked[field] = float(digits) if equals and digits.isdigit() and digits.isascii() else 0.0
        elif field is not None:
            asked[field] = True
