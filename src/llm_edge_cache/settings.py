"""What the cache is configured to be: the records of the two tiers, and the environment variables that fill them.

`_VARIABLES` is the one table of variables; docs/settings.md explains each.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, TypeVar

from llm_edge_cache.errors import RedisConfigError, SettingsError
from llm_edge_cache.redis_target import parse_redis_url
from llm_edge_cache.slabconfig import MiB, SlabConfig

__all__ = ["PREFIX", "VISIBLE", "L1Config", "L2Config", "Settings", "SlabSettings", "is_token", "load_settings"]

PREFIX: Final = "LLM_EDGE_CACHE_"
"""What the names of all variables begin with."""

VISIBLE: Final = "visible ASCII characters, at least one"
"""What `is_token` allows."""

_LONGEST_NAME_BYTES: Final = 1024
_LONGEST_TIMEOUT_MS: Final = 60_000
_LONGEST_PREFIX: Final = 256

_log = logging.getLogger("llm_edge_cache")
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class L1Config:
    """The tier in shared memory.

    Raises:
        TypeError: a field is of a wrong type.
        ValueError: a field is out of bounds; the message names field and value.
    """

    max_capacity: int = 1000
    """Entries at most."""
    memory_bytes: int = 64 * MiB
    """The whole slab in shared memory."""
    ttl_seconds: float | None = 300.0
    """Seconds an entry lives here. None: as long as it is valid."""
    tti_seconds: float | None = 120.0
    """Seconds an entry lives here unread. None: as long as its ttl."""
    name: str = "llm-edge-cache"
    """The slab's name."""

    def __post_init__(self) -> None:
        """Refuse what no tier can be."""
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str, not {type(self.name).__name__}")
        self.slab_config()

    def slab_config(self) -> SlabConfig:
        """Return the slab that this tier lives in."""
        return SlabConfig(
            memory_bytes=self.memory_bytes,
            max_entries=self.max_capacity,
            ttl=self.ttl_seconds,
            tti=self.tti_seconds,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class L2Config:
    """The tier in Redis. Its repr shows no password.

    Raises:
        TypeError: a field is of a wrong type.
        ValueError: a field is out of bounds; the message names field and value.
        RedisConfigError: the URL is none; the message says which part is wrong, and shows no password.
    """

    redis_url: str = dataclasses.field(default="redis://127.0.0.1:6379", repr=False)
    """redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// (see `redis_target`)."""
    ttl_seconds: float = 3600.0
    """Seconds an entry is valid in Redis."""
    connection_timeout_ms: float = 1000
    """How long opening a connection in the background may take. Callers never wait longer than an operation."""
    operation_timeout_ms: float = 100
    """How long any one command may take, as a caller sees it."""
    key_prefix: str = "llm_cache:"
    """What all keys of this cache begin with."""
    compress_above: int | None = None
    """Bytes above which values are compressed with zstd. None: never."""
    queue_limit: int = 1024
    """Deferred writes that may wait; more are dropped, and counted."""
    staleness_seconds: float = 2.0
    """How long L1 entries are trusted without contact to the invalidation stream, while Redis is reachable."""

    def __post_init__(self) -> None:
        """Refuse what no tier can be."""
        parse_redis_url(self.redis_url)
        if not isinstance(self.key_prefix, str):
            raise TypeError(f"key_prefix must be a str, not {type(self.key_prefix).__name__}")
        if len(self.key_prefix) > _LONGEST_PREFIX:
            raise ValueError(f"key_prefix must be at most {_LONGEST_PREFIX} characters, not {len(self.key_prefix)}")
        _require_seconds("ttl_seconds", self.ttl_seconds, math.inf)
        _require_seconds("staleness_seconds", self.staleness_seconds, math.inf)
        _require_seconds("connection_timeout_ms", self.connection_timeout_ms, _LONGEST_TIMEOUT_MS)
        _require_seconds("operation_timeout_ms", self.operation_timeout_ms, _LONGEST_TIMEOUT_MS)
        _require_count("queue_limit", self.queue_limit, 1)
        if self.compress_above is not None:
            _require_count("compress_above", self.compress_above, 0)


class SlabSettings(NamedTuple):
    """The slab as a process that only keeps it needs it, without a cache of its own."""

    name: str
    config: SlabConfig | None
    """None when no variable speaks of it: then whatever is live under the name is right."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says. Its repr shows no password and no token."""

    l1: L1Config
    l2: L2Config | None
    """None when no Redis is named."""
    upstream: str | None
    """URL of the provider that the gateway asks; None when none is named."""
    slab: SlabSettings
    slab_memory: int | None = None
    """Bytes; None when no variable says how large: then who makes the slab has a default of its own."""
    admin_token: str | None = dataclasses.field(default=None, repr=False)
    """What the gateway's admin calls want as a bearer token; None: they answer their own host alone."""


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from environment variables.

    A variable with our prefix that is none of ours is logged as a warning, with the nearest that is one.

    Args:
        environ: variables by name. None: ``os.environ``.

    Returns:
        The settings; what no variable gives has its default.

    Raises:
        SettingsError: a value is not allowed; the message names the variable, the value (no password) and what is
            allowed.
    """
    if environ is None:
        environ = os.environ
    _warn_of_unknown(environ)
    fields: dict[str, dict[str, Any]] = {"l1": {}, "l2": {}, "gateway": {}}
    for variable in _VARIABLES:
        if variable.name in environ:
            fields[variable.record][variable.field] = _read(variable, environ[variable.name])
    slab_fields = {_SLAB_FIELDS[field]: value for field, value in fields["l1"].items() if field in _SLAB_FIELDS}
    if "memory_bytes" in fields["l1"]:  # the slab's own rule: a large memory for 1,000 entries helps nobody
        fields["l1"].setdefault("max_capacity", SlabConfig(memory_bytes=fields["l1"]["memory_bytes"]).max_entries)
    l1 = _fit_together(L1Config, fields["l1"], environ)
    slab_config = _fit_together(SlabConfig, slab_fields, environ) if slab_fields else None
    l2 = L2Config(**fields["l2"])  # checked also when no Redis is named: a bad value is an error at once
    return Settings(
        l1=l1,
        l2=l2 if "redis_url" in fields["l2"] else None,
        upstream=fields["gateway"].get("upstream"),
        slab=SlabSettings(l1.name, slab_config),
        slab_memory=slab_fields.get("memory_bytes"),
        admin_token=fields["gateway"].get("admin_token"),
    )


def _require_seconds(field: str, value: object, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field} must be a number, not {type(value).__name__}")
    if not (math.isfinite(value) and 0 < value <= most):
        raise ValueError(
            f"{field} must be a finite number above 0{'' if most == math.inf else f', at most {most}'}, not {value!r}"
        )


def _require_count(field: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field} must be an int, not {type(value).__name__}")
    if value < least:
        raise ValueError(f"{field} must be at least {least}, not {value}")


# ---- reading the environment ----


def _warn_of_unknown(environ: Mapping[str, str]) -> None:
    known = [variable.name for variable in _VARIABLES]
    for name in sorted(name for name in environ if name.startswith(PREFIX) and name not in known):
        (nearest,) = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        _log.warning("the environment variable %s is none of llm-edge-cache's; the nearest is %s", name, nearest)


def _read(variable: _Variable, text: str) -> Any:
    try:
        return variable.parse(text)
    except RedisConfigError as error:
        allowed = str(error)
    except ValueError:
        allowed = f"it must be {variable.allowed}"
    # Raised out here: inside, the error would carry the parser's along, and that may quote a password.
    raise SettingsError(f"{variable.name}={variable.show(text)!r} is not allowed: {allowed}")


def _fit_together(record: Callable[..., _T], fields: dict[str, Any], environ: Mapping[str, str]) -> _T:
    try:
        return record(**fields)
    except ValueError as error:
        names = [item.name for item in _VARIABLES if item.record == "l1" and item.field in _SLAB_FIELDS]
        given = ", ".join(f"{name}={environ[name]!r}" for name in names if name in environ)
        raise SettingsError(f"{given} do not fit together: {error}") from error


def _mask_url(url: str) -> str:
    """Hide what may be a password, also where an unescaped '@', '/' or '?' in it has broken the URL."""
    scheme = match[0] if (match := _SCHEME.match(url)) else ""
    if "password" in url:
        return f"{scheme}***"
    _, at, place = url.rpartition("@")
    return f"{scheme}***@{place}" if at else url


_UNIT_BYTES: Final = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_MEMORY: Final = re.compile(r"([0-9]+)\s*(|KiB|MiB|GiB)", re.IGNORECASE | re.ASCII)
_COUNT: Final = re.compile(r"[0-9]+", re.ASCII)
_SCHEME: Final = re.compile(r"(?:[a-z+]+://)?")


def _parse_name(text: str) -> str:
    if not 1 <= len(text.encode()) <= _LONGEST_NAME_BYTES:
        raise ValueError("length")
    return text


def _parse_prefix(text: str) -> str:
    text.encode()  # bytes that are not UTF-8 arrive as lone surrogates: a ValueError
    if len(text) > _LONGEST_PREFIX:
        raise ValueError("length")
    return text


def _parse_memory(text: str) -> int:
    match = _MEMORY.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError("size")
    return int(match[1]) * _UNIT_BYTES[match[2].upper()]


def _parse_count(text: str) -> int:
    if _COUNT.fullmatch(text.strip()) is None:
        raise ValueError("count")
    return int(text)


def _parse_positive_count(text: str) -> int:
    count = _parse_count(text)
    if count == 0:
        raise ValueError("count")
    return count


def _parse_seconds(text: str) -> float:
    seconds = float(text)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError("seconds")
    return seconds


def _parse_timeout_ms(text: str) -> float:
    timeout_ms = _parse_seconds(text)
    if timeout_ms > _LONGEST_TIMEOUT_MS:
        raise ValueError("timeout")
    return timeout_ms


def _or_none(parse: Callable[[str], _T]) -> Callable[[str], _T | None]:
    return lambda text: None if text.strip().lower() == "none" else parse(text)


def _parse_redis(text: str) -> str:
    parse_redis_url(text)
    return text


def _parse_upstream(text: str) -> str:
    parts = urllib.parse.urlsplit(text)
    is_sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    has_more = "@" in parts.netloc or parts.query or parts.fragment
    if not is_sound or has_more or " " in text or not text.isprintable():
        raise ValueError("upstream")
    return text


def is_token(text: str) -> bool:
    """Tell whether a text can be a bearer token."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _parse_token(text: str) -> str:
    if not is_token(text):
        raise ValueError("token")
    return text


class _Variable(NamedTuple):
    suffix: str
    """The name without the prefix."""
    record: Literal["l1", "l2", "gateway"]
    field: str
    """Which field of that record it gives."""
    parse: Callable[[str], Any]
    """Returns the field's value; a ValueError says that the text is not allowed."""
    allowed: str
    show: Callable[[str], str] = str
    """The text as a message may show it."""

    @property
    def name(self) -> str:
        return PREFIX + self.suffix


_SECONDS: Final = "a number of seconds above 0"
_MILLISECONDS: Final = f"a number of milliseconds above 0, at most {_LONGEST_TIMEOUT_MS}"
_BYTES: Final = "a number of bytes, or a number followed by KiB, MiB or GiB"
_UPSTREAM: Final = "an http:// or https:// URL of a host, without user name, password, query and fragment"

_VARIABLES: Final = (
    _Variable("NAME", "l1", "name", _parse_name, f"1 to {_LONGEST_NAME_BYTES} bytes of UTF-8"),
    _Variable("L1_MEMORY", "l1", "memory_bytes", _parse_memory, _BYTES),
    _Variable("L1_MAX_CAPACITY", "l1", "max_capacity", _parse_positive_count, "a number of entries, at least 1"),
    _Variable("L1_TTL", "l1", "ttl_seconds", _or_none(_parse_seconds), f"{_SECONDS}, or 'none'"),
    _Variable("L1_TTI", "l1", "tti_seconds", _or_none(_parse_seconds), f"{_SECONDS}, or 'none'"),
    _Variable("REDIS_URL", "l2", "redis_url", _parse_redis, "a Redis URL", _mask_url),
    _Variable("L2_TTL", "l2", "ttl_seconds", _parse_seconds, _SECONDS),
    _Variable("CONNECTION_TIMEOUT_MS", "l2", "connection_timeout_ms", _parse_timeout_ms, _MILLISECONDS),
    _Variable("OPERATION_TIMEOUT_MS", "l2", "operation_timeout_ms", _parse_timeout_ms, _MILLISECONDS),
    _Variable("KEY_PREFIX", "l2", "key_prefix", _parse_prefix, f"at most {_LONGEST_PREFIX} characters of UTF-8"),
    _Variable("COMPRESS_ABOVE", "l2", "compress_above", _or_none(_parse_count), "a number of bytes, or 'none'"),
    _Variable("QUEUE_LIMIT", "l2", "queue_limit", _parse_positive_count, "a number of writes, at least 1"),
    _Variable("STALENESS", "l2", "staleness_seconds", _parse_seconds, _SECONDS),
    _Variable("ADMIN_TOKEN", "gateway", "admin_token", _parse_token, VISIBLE, lambda _: "***"),
    _Variable("UPSTREAM", "gateway", "upstream", _parse_upstream, _UPSTREAM, _mask_url),
)
# The fields of L1Config that lay out its slab, under their names in SlabConfig.
_SLAB_FIELDS: Final = {
    "memory_bytes": "memory_bytes",
    "max_capacity": "max_entries",
    "ttl_seconds": "ttl",
    "tti_seconds": "tti",
}
