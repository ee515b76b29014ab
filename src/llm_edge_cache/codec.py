"""From an entry to the bytes that the tiers keep, and back.

L1 keeps an entry *packed*: in MessagePack, or that in a zstd frame. Which of the two, its first byte tells: an entry
begins as an array (0x9.), a zstd frame with 0x28; a later format may begin with anything else. L2 keeps it *sealed*:

    0        1                       9
    format | xxh3-64 of the rest   | the packed entry

`format` is one byte: version of this layout and what the rest is. Any two formats differ in at least two bits, and the
checksum sees every other bit, so no single flipped bit goes unnoticed. The checksum is against accidents, not against
forgers: whoever may write to Redis may write answers. L1 has none: what it holds never left this host's memory.

Fields are only ever added, at the end and with a default: older readers pass over them, newer ones fill them in.
Anything else needs a new format. Nothing is ever unpickled.

Sources: MessagePack specification; XXH3 (github.com/Cyan4973/xxHash); RFC 8878 for zstd.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final, Literal

import msgspec
import xxhash

from llm_edge_cache.errors import CacheError
from llm_edge_cache.model import CachedResponse

__all__ = ["UNREADABLE", "CodecError", "Entry", "EntryCodec", "Reason", "seal", "unsealed"]

Reason = Literal["truncated", "format", "checksum", "compression", "content"]

_PLAIN: Final = b"\x11"
_ZSTD: Final = b"\x12"
_HEADER_BYTES: Final = 9
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_LARGEST_BODY: Final = 64 << 20  # bytes; what a zstd frame may claim to hold

_encode: Final = msgspec.msgpack.Encoder().encode
_digest: Final = xxhash.xxh3_64_digest

UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError, MemoryError)
"""What `EntryCodec.read` raises for anything but an entry in MessagePack."""


class CodecError(CacheError):
    """These bytes are no entry of ours: count them by `reason`, delete them, go on as if they were not there.

    The reasons: "truncated" (too short for a header), "format" (another version or nobody's), "checksum", "compression"
    (the zstd frame is broken or too large, or no zstd is installed), "content" (sound bytes, but no entry).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Final = reason


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What is stored under a key: a response, and until when and under which generations it holds."""

    response: CachedResponse
    expires_at: float | None = None
    """Seconds since the epoch; None = never. Absolute, so the same instant in both tiers and on every host."""
    generations: dict[str, int] = {}
    """The tags, each with the epoch or id at which the computation began."""
    microseconds: int = 0
    """How long the computation took."""
    is_negative: bool = False
    """There is no answer, and that is to be remembered; the response is empty."""


class EntryCodec:
    """Encodes and decodes entries; one for a process, used from any thread.

    Args:
        compress_above: Bytes of MessagePack above which an entry is compressed with zstd, if that makes it smaller.
            None: never. Entries that others compressed are read wherever zstd is installed.
        level: zstd's compression level.

    Raises:
        ImportError: compress_above is given and there is no zstd.
        ValueError: compress_above is negative.
    """

    def __init__(self, *, compress_above: int | None = None, level: int = 3) -> None:
        if compress_above is not None and compress_above < 0:
            raise ValueError(f"compress_above must be 0 or more bytes, or None, not {compress_above}")
        if compress_above is not None and _zstd() is None:
            raise ImportError(_NO_ZSTD)
        self._compress_above = compress_above
        self._level = level
        self.read: Final = msgspec.msgpack.Decoder(Entry).decode
        """The hot path: takes what `pack` made without compression, and raises one of UNREADABLE for all else."""

    def pack(self, entry: Entry) -> bytes:
        """Return an entry as L1 keeps it.

        Raises:
            TypeError: A field of the entry is of a wrong type, or something in raw or metadata cannot be kept.
            ValueError: An integer is outside 64 bits, a string contains a lone surrogate, or the nesting is too deep.
        """
        try:
            body = _encode(entry)
            self.read(body)  # nothing is stored that could not be read
        except msgspec.ValidationError as error:
            raise TypeError(f"an entry cannot be kept: {error}") from None
        except (OverflowError, msgspec.DecodeError) as error:
            raise ValueError(f"an entry cannot be kept: {error}") from None
        except RecursionError:
            raise ValueError("an entry cannot be kept: it is nested too deep") from None
        if self._compress_above is not None and self._compress_above < len(body) <= _LARGEST_BODY:
            frame: bytes = _zstd().compress(body, level=self._level)
            if len(frame) < len(body):
                return frame
        return body

    def unpack(self, packed: bytes) -> Entry:
        """Return the entry that `pack` made these bytes of.

        Raises:
            CodecError: They are not such bytes. Nothing else is raised, whatever they are.
        """
        body = _decompressed(packed) if packed[:4] == _ZSTD_MAGIC else packed
        try:
            return self.read(body)
        except UNREADABLE as error:
            raise CodecError("content", f"no entry: {type(error).__name__}") from None

    def encode(self, entry: Entry) -> bytes:
        """Return an entry as L2 keeps it: packed and sealed. Raises what `pack` does."""
        return seal(self.pack(entry))

    def decode(self, data: bytes) -> Entry:
        """Return the entry that `encode` made these bytes of.

        Raises:
            CodecError: They are not such bytes. Nothing else is raised, whatever they are.
        """
        packed = unsealed(data)  # cheaper than a memoryview for all usual sizes
        if data[:_HEADER_BYTES] != _PLAIN + _digest(packed):
            packed = _unpacked(data, packed)
        try:
            return self.read(packed)
        except UNREADABLE as error:
            raise CodecError("content", f"no entry: {type(error).__name__}") from None


def seal(packed: bytes) -> bytes:
    """Return a packed entry as L2 keeps it."""
    return (_ZSTD if packed[:4] == _ZSTD_MAGIC else _PLAIN) + _digest(packed) + packed


def unsealed(data: bytes) -> bytes:
    """Return the packed entry within what L2 keeps, unchecked."""
    return data[_HEADER_BYTES:]


def _unpacked(data: bytes, rest: bytes) -> bytes:
    """Return the body of what is not plain, or say what is wrong with it."""
    if not rest:
        raise CodecError("truncated", f"{len(data)} bytes are no entry")
    if data[:1] not in (_PLAIN, _ZSTD):
        raise CodecError("format", f"format {data[0]:#04x} is unknown")
    if data[:_HEADER_BYTES] != _ZSTD + _digest(rest):
        raise CodecError("checksum", "the checksum does not match")
    return _decompressed(rest)


# ---- zstd, which is optional ----

_NO_ZSTD: Final = "compression needs zstd: Python 3.14 has it, for others install backports.zstd"


@functools.cache
def _zstd() -> Any:
    """Return the module, or None; both have one interface."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:  # noqa: PERF203 - two rounds, once
            continue
    return None


def _decompressed(frame: bytes) -> bytes:
    zstd = _zstd()
    if zstd is None:
        raise CodecError("compression", _NO_ZSTD)
    decompressor = zstd.ZstdDecompressor()
    try:
        body: bytes = decompressor.decompress(frame, max_length=_LARGEST_BODY)
    except (zstd.ZstdError, MemoryError) as error:
        raise CodecError("compression", f"a broken zstd frame: {type(error).__name__}") from None
    if not decompressor.eof or decompressor.unused_data:
        raise CodecError("compression", "not one zstd frame of acceptable size")
    return body
