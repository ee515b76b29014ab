"""What the two tiers are configured to be."""

from __future__ import annotations

import dataclasses
import math
from typing import Final

from llm_edge_cache.slabconfig import MiB, SlabConfig

__all__ = ["L1Config", "L2Config"]

_LONGEST_TIMEOUT_MS: Final = 60_000
_LONGEST_PREFIX: Final = 256


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
        for field in ("redis_url", "key_prefix"):
            if not isinstance(getattr(self, field), str):
                raise TypeError(f"{field} must be a str, not {type(getattr(self, field)).__name__}")
        if len(self.key_prefix) > _LONGEST_PREFIX:
            raise ValueError(f"key_prefix must be at most {_LONGEST_PREFIX} characters, not {len(self.key_prefix)}")
        _require_seconds("ttl_seconds", self.ttl_seconds, math.inf)
        _require_seconds("staleness_seconds", self.staleness_seconds, math.inf)
        _require_seconds("connection_timeout_ms", self.connection_timeout_ms, _LONGEST_TIMEOUT_MS)
        _require_seconds("operation_timeout_ms", self.operation_timeout_ms, _LONGEST_TIMEOUT_MS)
        if self.queue_limit < 1:
            raise ValueError(f"queue_limit must be an int of at least 1, not {self.queue_limit!r}")


def _require_seconds(field: str, value: object, most: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field} must be a number, not {type(value).__name__}")
    if not (math.isfinite(value) and 0 < value <= most):
        raise ValueError(
            f"{field} must be a finite number above 0{'' if most == math.inf else f', at most {most}'}, not {value!r}"
        )
