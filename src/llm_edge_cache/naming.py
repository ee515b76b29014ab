"""Where the segment of a slab lies in /dev/shm, and whose it is.

The file's name is derived from everything that two processes must have in common to understand each other: the slab's
name, the owning user, the layout's version, the ABI (word size, byte order, libc, mutex size), and the PID and time
namespaces (process identities and clock readings mean nothing across them). Parties that differ in any of these never
meet; each keeps a slab of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
from typing import Final, NamedTuple

from llm_edge_cache.errors import SlabPermissionError
from llm_edge_cache.native import native

__all__ = ["DIRECTORY", "Owner", "Place", "current_owner", "place_of", "set_owner"]

DIRECTORY: Final = "/dev/shm"  # noqa: S108 - every file in there is checked for its owner
PREFIX: Final = "llm-edge-cache."
LOCK_SUFFIX: Final = ".lock"
_LONGEST_NAME_BYTES: Final = 1024
_RECOGNISABLE: Final = 40  # characters of the user's name that the file's name shows


class Owner(NamedTuple):
    """The user a slab belongs to."""

    uid: int
    gid: int


class Place(NamedTuple):
    """The two files of one slab."""

    name: str
    """As the user wrote it."""
    owner: Owner
    segment: str
    """Path of the segment."""

    @property
    def lock(self) -> str:
        """Path of the lock file, which also remembers the name."""
        return self.segment + LOCK_SUFFIX


_owner: Owner | None = None  # None: whoever this process runs as


def set_owner(uid: int, gid: int) -> None:
    """Let slabs that this process opens from now on belong to another user.

    For a master that starts as root and drops to that user in its workers: create the slab under that user's name and
    with its ownership, before the first fork. Without effect in processes that do not run as root, so a worker that
    has dropped to the user finds the same slab by itself.

    Args:
        uid: the user.
        gid: the group.

    Raises:
        SlabPermissionError: this process is neither root nor that user.
    """
    global _owner  # noqa: PLW0603 - one per process by nature, like the uid that it stands in for
    if os.geteuid() not in (0, uid):
        raise SlabPermissionError(
            f"only root can open slabs for another user: this is uid {os.geteuid()}, asked for {uid}"
        )
    _owner = Owner(uid, gid)


def current_owner() -> Owner:
    """Return the user that slabs of this process belong to."""
    if _owner is not None and os.geteuid() == 0:
        return _owner
    return Owner(os.geteuid(), os.getegid())


def place_of(name: str, owner: Owner) -> Place:
    """Return where the slab of that name and owner lies.

    Raises:
        TypeError: the name is not a str.
        ValueError: the name is empty, too long, or not text.
    """
    if not isinstance(name, str):
        raise TypeError(f"a slab's name must be str, not {type(name).__name__}")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"a slab's name must be text without lone surrogates, not {name!r}") from None
    if not 1 <= len(encoded) <= _LONGEST_NAME_BYTES or b"\0" in encoded:
        raise ValueError(
            f"a slab's name must be 1 to {_LONGEST_NAME_BYTES} bytes of UTF-8 without NUL, not {name!r:.80}"
        )
    digest = hashlib.blake2b(_identity(encoded, owner.uid), digest_size=12).hexdigest()
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name[:_RECOGNISABLE])
    return Place(name, owner, f"{DIRECTORY}/{PREFIX}{readable}.{digest}")


def _identity(name: bytes, uid: int) -> bytes:
    numbers = (
        len(name),
        uid,
        native.LAYOUT_VERSION,
        native.MUTEX_BYTES,
        struct.calcsize("P"),
        _namespace("pid"),
        _namespace("time"),
    )
    return struct.pack("<7Q", *numbers) + name + sys.byteorder.encode() + _libc().encode()


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "other"
    except (ValueError, OSError):  # not glibc
        return "other"


def _namespace(kind: str) -> int:
    try:
        return os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:  # a kernel without time namespaces, or no /proc: then there is only one
        return 0
