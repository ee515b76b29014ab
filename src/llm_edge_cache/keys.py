"""From a request to its key."""

from __future__ import annotations

import hashlib
import re
from typing import Final

from llm_edge_cache.model import CacheableRequest

__all__ = ["generate_cache_key", "generate_short_key", "is_tier_key", "tier_key"]

_SHORT: Final = 16  # digits
_sha256: Final = hashlib.sha256
_TIER_KEY: Final = re.compile(rb"[0-9a-f]{64}")


def generate_cache_key(request: CacheableRequest) -> str:
    """Return the key of a request: SHA-256 of its canonical encoding, 64 lower-case hexadecimal digits.

    Requests with the same normal form have the same key, whatever the order of their parameters, the Python version or
    the process; others share an encoding never, and a key as often as SHA-256 collides. `llm_edge_cache.canonical` says
    what the normal form is, and why. The key is computed once for each request.
    """
    return tier_key(request).decode()


def tier_key(request: CacheableRequest) -> bytes:
    """Return the key as both tiers know it: `generate_cache_key`'s digits, as bytes."""
    try:
        kept = request.__dict__
        if "_tier_key" in kept:
            key: bytes = kept["_tier_key"]
        else:
            kept["_tier_key"] = key = _sha256(kept["_canonical"]).hexdigest().encode()
    except (AttributeError, KeyError):
        raise TypeError(f"a key needs a CacheableRequest, not {type(request).__name__}") from None
    return key


def is_tier_key(key: bytes) -> bool:
    """Tell whether a key can be a request's."""
    return _TIER_KEY.fullmatch(key) is not None


def generate_short_key(request: CacheableRequest) -> str:
    """Return the first 16 digits of the key: enough to recognise a request in logs, too few to be one."""
    return generate_cache_key(request)[:_SHORT]
