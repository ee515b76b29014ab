"""The slab's name and configuration, as the environment of a server gives them.

=================================  ==================================================  ======================
variable                           allowed                                             when it is not set
=================================  ==================================================  ======================
``LLM_EDGE_CACHE_NAME``            1 to 1,024 bytes of UTF-8                           ``llm-edge-cache``
``LLM_EDGE_CACHE_L1_MEMORY``       bytes, or a number with ``KiB``, ``MiB``, ``GiB``   ``64MiB``
``LLM_EDGE_CACHE_L1_MAX_CAPACITY`` entries, at least 1                                 memory / 1,024
``LLM_EDGE_CACHE_L1_TTL``          seconds above 0, or ``none``                        300
``LLM_EDGE_CACHE_L1_TTI``          seconds above 0, or ``none``                        ``none``
=================================  ==================================================  ======================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from llm_edge_cache import SlabConfig
from llm_edge_cache.errors import SettingsError

__all__ = ["DEFAULT_NAME", "SlabSettings", "read_slab_settings"]

DEFAULT_NAME = "llm-edge-cache"
PREFIX = "LLM_EDGE_CACHE_"

_UNIT_BYTES = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_MEMORY = re.compile(r"([0-9]+)\s*(|KiB|MiB|GiB)", re.IGNORECASE | re.ASCII)
_COUNT = re.compile(r"[0-9]+", re.ASCII)
_NO_LIMIT = "none"
_LONGEST_NAME_BYTES = 1024
_NAME = f"1 to {_LONGEST_NAME_BYTES} bytes of UTF-8"

_T = TypeVar("_T")


class SlabSettings(NamedTuple):
    """What the environment says about the slab."""

    name: str
    config: SlabConfig | None
    """None when no variable speaks of it: then whatever is live under the name is right."""


def read_slab_settings(environ: Mapping[str, str]) -> SlabSettings:
    """Read the slab's settings from environment variables.

    Args:
        environ: variables by name, as ``os.environ``.

    Returns:
        The name, and the configuration if at least one variable gives a part of it.

    Raises:
        SettingsError: a value is not allowed; the message names the variable, the value and what is allowed.
    """
    fields: dict[str, Any] = {
        field: _read(environ, variable, parse, allowed)
        for field, (variable, parse, allowed) in _CONFIG_FIELDS.items()
        if PREFIX + variable in environ
    }
    name = DEFAULT_NAME
    if PREFIX + "NAME" in environ:
        name = _read(environ, "NAME", _parse_name, _NAME)
    return SlabSettings(name, _config(environ, fields) if fields else None)


def _config(environ: Mapping[str, str], fields: dict[str, Any]) -> SlabConfig:
    try:
        return SlabConfig(**fields)
    except ValueError as error:
        variables = [PREFIX + _CONFIG_FIELDS[field][0] for field in fields]
        given = ", ".join(f"{variable}={environ[variable]!r}" for variable in variables)
        raise SettingsError(f"{given} do not fit together: {error}") from error


def _read(environ: Mapping[str, str], variable: str, parse: Callable[[str], _T], allowed: str) -> _T:
    text = environ[PREFIX + variable]
    try:
        return parse(text)
    except ValueError:
        raise SettingsError(f"{PREFIX}{variable}={text!r} is not allowed: it must be {allowed}") from None


def _parse_name(text: str) -> str:
    if not 1 <= len(text.encode()) <= _LONGEST_NAME_BYTES:
        raise ValueError(text)
    return text


def _parse_memory(text: str) -> int:
    match = _MEMORY.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise ValueError(text)
    return int(match[1]) * _UNIT_BYTES[match[2].upper()]


def _parse_count(text: str) -> int:
    if _COUNT.fullmatch(text.strip()) is None or int(text) == 0:
        raise ValueError(text)
    return int(text)


def _parse_seconds(text: str) -> float | None:
    if text.strip().lower() == _NO_LIMIT:
        return None
    seconds = float(text)
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(text)
    return seconds


_SECONDS = "a number of seconds above 0, or 'none'"
# SlabConfig's field: the variable without its prefix, how it is read, what is allowed.
_CONFIG_FIELDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "memory_bytes": ("L1_MEMORY", _parse_memory, "a number of bytes, or a number followed by KiB, MiB or GiB"),
    "max_entries": ("L1_MAX_CAPACITY", _parse_count, "a number of entries, at least 1"),
    "ttl": ("L1_TTL", _parse_seconds, _SECONDS),
    "tti": ("L1_TTI", _parse_seconds, _SECONDS),
}
