"""The file of a snapshot: how records lie in it, and how they are found again in a damaged one.

    preamble | opening state | record | record | ... | closing state | preamble

    preamble   magic (8) | version u32 | bytes of the state u32 | xxh3-64 of the state    the last one ends the file
    state      MessagePack map (`_State`); the closing one knows how many records there are
    record     sync (8, random for this file) | xxh3-64 of the rest | fields | key | value
    fields     bytes of the key u16 | 0 u16 | bytes of the value u32 | idle limit in ms u32, 0 = none
               | expiry, ns since the epoch u64, 0 = never                                   all little-endian

A record is complete in itself, and its sync tells where one begins, so damage loses the records that it hits and no
other. The state stands at both ends, so damage has to hit both to lose the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, NoReturn

import msgspec
import xxhash

from llm_edge_cache.errors import SnapshotError

__all__ = [
    "BATCH_BYTES",
    "SYNC_BYTES",
    "Record",
    "Records",
    "Source",
    "State",
    "closed_by",
    "opened",
    "opened_by",
    "packed",
    "replaced",
]

VERSION: Final = 1
BATCH_BYTES: Final = 1 << 19
"""How much is read or written at once, if no entry is larger."""
SYNC_BYTES: Final = 8
_MAGIC: Final = b"\x89LECSNP\n"
_PREAMBLE: Final = struct.Struct("<8sII8s")
_FIELDS: Final = struct.Struct("<HHIIQ")
_HEAD: Final = struct.Struct("<8s8sHHIIQ")
"""All of a record but key and value: sync, checksum, fields."""
_FIELDS_AT: Final = SYNC_BYTES + 8
_LARGEST_STATE: Final = 16 << 20
_LONGEST_KEY: Final = 1024

_digest: Final = xxhash.xxh3_64_digest
_pack_fields: Final = _FIELDS.pack


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What holds for the whole file. Fields are only ever added, with a default."""

    sync: bytes
    name: str
    """The slab's."""
    taken_at: float
    """Seconds since the epoch."""
    config: tuple[int, int, int, int, int]
    """As the kernel keeps it."""
    entries: int | None = None
    """Records in the file; only the closing state knows."""
    cursor: int = 0
    """`Word.CURSOR` before the first entry was read: what came after it may be missing in what was read."""
    followed: int = 0
    begin: int = 0
    cleared: int = 0
    tag_epoch: int = 0
    tag_count: int = 1
    tags: dict[int, int] = {}
    """By position in the table of so many, those that are not 0."""


# ---- writing ----


def _encode(state: State) -> bytes:
    return msgspec.msgpack.encode(state)


def _preamble(encoded: bytes) -> bytes:
    return _PREAMBLE.pack(_MAGIC, VERSION, len(encoded), _digest(encoded))


def opened_by(state: State) -> bytes:
    """Return what the file begins with."""
    encoded = _encode(state)
    return _preamble(encoded) + encoded


def closed_by(state: State) -> bytes:
    """Return what the file ends with."""
    encoded = _encode(state)
    return encoded + _preamble(encoded)


def packed(sync: bytes, key: bytes, value: bytes, *, expires_ns: int, idle_ms: int) -> tuple[bytes, bytes, bytes]:
    """Return a record, in three parts."""
    body = b"".join((_pack_fields(len(key), 0, len(value), idle_ms, expires_ns), key, value))
    return sync, _digest(body), body


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another at the end of the block, and is gone after any failure.

    Only SIGKILL leaves one behind, under a name of its own.
    """
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")
    try:
        # The name was chosen before the file is made, so an interrupt right after that finds it as well.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(partial, flags, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            _refuse(path, error)
        raise


def _sync_directory(path: Path) -> None:
    """Make a rename outlive a crash of the host; not every file system knows how."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(directory)
    finally:
        os.close(directory)


def _refuse(path: Path, error: OSError) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise SnapshotError(
            f"there is no space for {path}: a snapshot needs the entries' bytes and some; nothing was written"
        ) from error
    raise SnapshotError(f"{path} cannot be written: {error.strerror or error}") from error


# ---- reading ----


class Source:
    """A snapshot that is open, and where its records lie."""

    def __init__(self, file: BinaryIO, path: str) -> None:
        self.file = file
        self.path = path
        self.file_bytes = os.fstat(file.fileno()).st_size
        versions: set[int] = set()
        self.opening = self._read_opening(versions)
        self.closing = self._read_closing(versions)
        if self.opening is None and self.closing is None:
            self._refuse(versions)

    @property
    def state(self) -> State:
        """The state to restore: the closing one's tags are the later ones, its place in the stream is the first's."""
        state = self.closing or self.opening
        assert state is not None
        return state

    @property
    def entries(self) -> int | None:
        """How many records the file had."""
        return self.closing.entries if self.closing is not None else None

    def _read_opening(self, versions: set[int]) -> State | None:
        self.begin = 0  # of the records; where it is not known they are searched from here
        length = self._length_of(self._read(0, _PREAMBLE.size), versions)
        state = None if length is None else self._decoded(self._read(_PREAMBLE.size, length))
        if state is not None and length is not None:
            self.begin = _PREAMBLE.size + length
        return state

    def _read_closing(self, versions: set[int]) -> State | None:
        self.end = self.file_bytes
        at = self.file_bytes - _PREAMBLE.size
        length = self._length_of(self._read(at, _PREAMBLE.size), versions) if at >= _PREAMBLE.size else None
        if length is None or length > at:
            return None
        state = self._decoded(self._read(at - length, length))
        if state is not None:
            self.end = at - length
        return state

    def _read(self, at: int, count: int) -> bytes:
        self.file.seek(at)
        return self.file.read(count)

    def _length_of(self, preamble: bytes, versions: set[int]) -> int | None:
        if len(preamble) < _PREAMBLE.size:
            return None
        magic, version, length, self._expected = _PREAMBLE.unpack(preamble)
        if magic != _MAGIC:
            return None
        versions.add(version)
        return length if version == VERSION and length <= _LARGEST_STATE else None

    def _decoded(self, encoded: bytes) -> State | None:
        if _digest(encoded) != self._expected:
            return None
        try:
            state = msgspec.msgpack.decode(encoded, type=State)
        except msgspec.MsgspecError:
            return None
        return state if len(state.sync) == SYNC_BYTES else None

    def _refuse(self, versions: set[int]) -> NoReturn:
        others = sorted(versions - {VERSION})
        if others:
            raise SnapshotError(
                f"{self.path} has snapshot format {others[0]}, this version reads {VERSION}: "
                "restore it with the version that wrote it"
            )
        if not versions:
            raise SnapshotError(f"{self.path} is no snapshot of a slab")
        raise SnapshotError(f"{self.path} is damaged at both ends: nothing in it can be trusted")


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Source]:
    """Open a snapshot. Raises SnapshotError."""
    name = os.fspath(path)
    try:
        # A FIFO or a terminal would make us wait for what is no snapshot anyway.
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            yield Source(file, name)
    except OSError as error:
        raise SnapshotError(f"{name} cannot be read: {error.strerror or error}") from error


class Record(NamedTuple):
    """One entry."""

    key: bytes
    value: memoryview
    expires_ns: int
    idle_ms: int


class Records:
    """Iterates over the records between two places of a file; None stands for a damaged one."""

    def __init__(self, source: Source) -> None:
        self._file = source.file
        self._file.seek(source.begin)
        self._sync = source.state.sync
        self._largest = max(source.state.config[4], 1)
        self._unread = max(source.end - source.begin, 0)
        self._data = b""
        self._view = memoryview(b"")
        self._at = 0
        self.done = source.begin
        """Bytes of the file that were dealt with."""

    def __iter__(self) -> Iterator[Record | None]:
        while self._at < len(self._data) or self._has(1):
            record = self._next()
            if record is None:
                self._resynchronise()
            yield record

    def _has(self, count: int) -> bool:
        """See to it that so many bytes from here on are in memory. Returns whether there are."""
        missing = count - (len(self._data) - self._at)
        if missing > 0 and self._unread:
            more = self._file.read(min(max(BATCH_BYTES, missing), self._unread))
            self._unread = self._unread - len(more) if more else 0
            self._data = self._data[self._at :] + more
            self._view = memoryview(self._data)
            self._at = 0
            missing = count - len(self._data)
        return missing <= 0

    def _next(self) -> Record | None:
        """Return the record that begins here and go on behind it; None, and stay, if there is no sound one."""
        # Mostly all of it is in memory already, and asking costs as much as the rest.
        if len(self._data) - self._at < _HEAD.size and not self._has(_HEAD.size):
            return None
        sync, digest, key_bytes, _, value_bytes, idle_ms, expires_ns = _HEAD.unpack_from(self._data, self._at)
        length = _HEAD.size + key_bytes + value_bytes
        if sync != self._sync or not 1 <= key_bytes <= _LONGEST_KEY or value_bytes > self._largest:
            return None
        if self._at + length > len(self._data) and not self._has(length):
            return None
        data, view, at, end = self._data, self._view, self._at, self._at + length
        if _digest(view[at + _FIELDS_AT : end]) != digest:
            return None
        value_at = at + _HEAD.size + key_bytes
        self._at = end
        self.done += length
        return Record(data[at + _HEAD.size : value_at], view[value_at:end], expires_ns, idle_ms)

    def _resynchronise(self) -> None:
        """Go on at the next sync, or at the end."""
        skip = 1
        while True:
            found = self._data.find(self._sync, self._at + skip)
            if found < 0 and self._unread:
                behind = max(self._at + skip, len(self._data) - SYNC_BYTES + 1)
                self.done += behind - self._at
                self._at, skip = behind, 0
                self._has(len(self._data) - self._at + 1)
                continue
            target = found if found >= 0 else len(self._data)
            self.done += target - self._at
            self._at = target
            return
