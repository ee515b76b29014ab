"""The slab's records: what it is configured to be, what it counts, what a scan tells of an entry."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Final, Literal

import msgspec

from llm_edge_cache.native import native

__all__ = ["DEFAULT", "Default", "EntryInfo", "MiB", "SlabConfig", "SlabStats"]

MiB: Final = 1 << 20
_NS: Final = 1_000_000_000
_BYTES_PER_ENTRY: Final = 1024  # of memory, where max_entries is not given
_LARGEST_VALUE: Final = 16 * MiB  # where max_value_bytes is not given
_LONGEST_LIFE_NS: Final = 1 << 61  # 73 years: longer lives are as good as this one
_MOST_ENTRIES: Final = (1 << 28) - 1


class Default(enum.Enum):
    """The type of `DEFAULT`, which stands for the slab's configured ttl or tti."""

    DEFAULT = "DEFAULT"

    def __repr__(self) -> str:
        """Read as it is written."""
        return "DEFAULT"


DEFAULT: Final[Literal[Default.DEFAULT]] = Default.DEFAULT


@dataclasses.dataclass(frozen=True, slots=True)
class SlabConfig:
    """How a slab is laid out. Equal configurations give equal layouts; what is None is derived at once.

    Raises:
        TypeError: a field is of a wrong type.
        ValueError: a field is out of bounds, or the fields do not fit together; the message names field and value.
    """

    memory_bytes: int = 64 * MiB
    """The whole segment in shared memory, tables included."""
    max_entries: int | None = None
    """Entries the slab holds at most. None: memory_bytes // 1024."""
    ttl: float | None = 300.0
    """Seconds an entry lives where set() does not say. None: no expiry."""
    tti: float | None = None
    """Seconds an entry lives unread where set() does not say, at most 49 days. None: as long as its ttl."""
    max_value_bytes: int | None = None
    """The largest value that is stored. None: memory_bytes // 8, at most 16 MiB."""

    def __post_init__(self) -> None:
        """Derive what is None and refuse what no slab can be."""
        _require_int("memory_bytes", self.memory_bytes, 1, 1 << 47)
        derived = _derived(self.memory_bytes)
        for field, value in derived.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        _require_int("max_entries", self.max_entries, 1, _MOST_ENTRIES)
        _require_int("max_value_bytes", self.max_value_bytes, 1, (1 << 32) - 1)
        for field in ("ttl", "tti"):
            object.__setattr__(self, field, _seconds(field, getattr(self, field)))
        needed = native.minimum_bytes(self.to_native())
        if needed:
            raise ValueError(
                f"memory_bytes={self.memory_bytes} is too small for max_entries={self.max_entries} and "
                f"max_value_bytes={self.max_value_bytes}: they need at least {needed} bytes"
            )

    def to_native(self) -> tuple[int, int, int, int, int]:
        """Return the fields as the kernel keeps them, times in ns, 0 = off."""
        return (self.memory_bytes, _ns(self.ttl), _ns(self.tti), self.max_entries or 0, self.max_value_bytes or 0)

    @classmethod
    def from_native(cls, fields: tuple[int, int, int, int, int]) -> SlabConfig:
        """Return the configuration that a live segment carries."""
        memory_bytes, ttl, tti, max_entries, max_value_bytes = fields
        return cls(
            memory_bytes,
            max_entries,
            ttl=ttl / _NS if ttl else None,
            tti=tti / _NS if tti else None,
            max_value_bytes=max_value_bytes,
        )

    def with_memory(self, memory_bytes: int) -> SlabConfig:
        """Return this configuration for another size; what was derived from the size is derived again."""
        derived = _derived(self.memory_bytes)
        again = {field: None for field, value in derived.items() if getattr(self, field) == value}
        return dataclasses.replace(self, memory_bytes=memory_bytes, **again)

    def differences(self, other: SlabConfig) -> list[str]:
        """Return the names of the fields in which the two would be laid out or behave differently."""
        names = ("memory_bytes", "ttl", "tti", "max_entries", "max_value_bytes")
        pairs = zip(names, self.to_native(), other.to_native(), strict=True)
        return [name for name, mine, theirs in pairs if mine != theirs]


def _derived(memory_bytes: int) -> dict[str, int]:
    return {
        "max_entries": min(max(memory_bytes // _BYTES_PER_ENTRY, 1), _MOST_ENTRIES),
        "max_value_bytes": max(min(memory_bytes // 8, _LARGEST_VALUE), 1),
    }


def _require_int(field: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{field} must be an int, not {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{field} must be {least} to {most}, not {value}")


def _seconds(field: str, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{field} must be a number of seconds or None, not {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{field} must be a finite number of seconds above 0, or None, not {value!r}")
    return float(value)


def _ns(seconds: float | None) -> int:
    # Whole microseconds survive the way to a float and back (8.3 s in ns would not): equal configurations stay equal.
    return 0 if seconds is None else min(max(round(seconds * 1_000_000), 1) * 1000, _LONGEST_LIFE_NS)


class EntryInfo(msgspec.Struct, frozen=True):
    """What scan() tells of one entry."""

    key: bytes
    size: int
    """Bytes of the value."""
    ttl_left: float | None
    """Seconds until it expires; None = no expiry."""
    idle: float | None
    """Seconds since it was read or stored, known where a tti is on; else None."""
    frequency: int
    """An estimate of how often it was asked for lately."""


class SlabStats(msgspec.Struct, frozen=True):
    """Sums over all processes that ever attached to the live segment, the dead ones too."""

    entries: int
    max_entries: int
    payload_bytes: int
    """Keys and values of the entries."""
    used_bytes: int
    """Memory that the entries occupy."""
    memory_bytes: int
    """The whole segment."""
    hits: int
    misses: int
    sets: int
    deletes: int
    refusals: int
    """Values that were too large or found no memory."""
    busy: int
    """Calls that gave up on a lock."""
    evictions: int
    expirations: int
    admission_rejections: int
    recoveries: int
    """Shards rebuilt after a process died holding their lock."""
    attached_processes: int
    created_at: float
    """When the segment was made; seconds since the epoch."""
