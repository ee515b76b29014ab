"""Every exception of this package, by what the caller can do about it.

Misuse (wrong types, keys out of bounds, a ttl of 0) raises `TypeError` or `ValueError`, not one of these.
"""

from __future__ import annotations

__all__ = [
    "CacheError",
    "ComputeError",
    "RedisConfigError",
    "SettingsError",
    "SlabBusyError",
    "SlabClosedError",
    "SlabConfigError",
    "SlabError",
    "SlabMemoryError",
    "SlabNotFoundError",
    "SlabPermissionError",
    "SlabVersionError",
    "SnapshotError",
]


class CacheError(Exception):
    """The root of all."""


class SlabError(CacheError):
    """Something about the shared slab."""


class SlabNotFoundError(SlabError):
    """No slab of that name is live: create it, or correct the name."""


class SlabConfigError(SlabError):
    """The live slab was made with another configuration: take it as it is, or replace it."""


class SlabVersionError(SlabError):
    """The segment under that name has another layout: unlink it with the version that made it."""


class SlabPermissionError(SlabError):
    """The segment or its lock file is not this user's alone, so it is not trusted; or it cannot be handed over."""


class SlabMemoryError(SlabError):
    """Too little shared memory: give the host or the container more, or ask for a smaller slab."""


class SlabClosedError(SlabError):
    """The slab object was closed: open another."""


class SlabBusyError(SlabError):
    """A lock's holder is stopped; nothing was changed: try again later."""


class SnapshotError(CacheError):
    """The snapshot cannot be written, or is none that can be restored: the message says why."""


class RedisConfigError(CacheError):
    """The Redis URL or an option is not usable."""


class SettingsError(CacheError):
    """A configuration value from the environment is not allowed."""


class ComputeError(CacheError):
    """The computation failed elsewhere, its error's type and text are in the message; or it was cancelled."""
