"""Server-sent events: a stream cut into its frames, byte for byte, and what one frame says.

A frame is what ends with an empty line, that line included; a line ends with LF, CR or CRLF. Nothing is decoded,
normalised or dropped: all frames and the rest, joined, are the input, so a recorded stream is replayed as it came.

Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from llm_edge_cache.errors import CacheError

__all__ = ["BOM", "DEFAULT_FRAME_LIMIT", "Event", "FrameSplitter", "FrameTooLargeError", "parse_frame"]

BOM: Final = b"\xef\xbb\xbf"
"""May stand before the first frame, and belongs to no field."""
DEFAULT_FRAME_LIMIT: Final = 16 << 20
"""Bytes. Images come as base64 in one frame."""

_END_OF_LINE: Final = re.compile(rb"\r\n|\n|\r")
# `\r(?!\n)`: a CRLF must not be taken for two ends of lines when the match has to backtrack.
_EMPTY_LINE: Final = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")
_LONGEST_END: Final = 4  # bytes of two line ends


class FrameTooLargeError(CacheError):
    """One frame exceeds the limit: what comes is no event stream, or none that can be kept."""


class FrameSplitter:
    """Cuts a stream into frames, whatever the chunks in which it comes.

    After a CR at the very end of what has come, a frame is held back until the next byte tells whether that byte is the
    LF of a CRLF; otherwise the same stream could give different frames. Streams that use LF or CRLF wait for nothing.

    Args:
        limit: bytes that a single frame may have.
    """

    def __init__(self, limit: int = DEFAULT_FRAME_LIMIT) -> None:
        self._limit: Final = limit
        self._buffer = bytearray()
        self._searched = 0  # no empty line ends before this position of the buffer

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the frames that this chunk completes.

        Raises:
            FrameTooLargeError: a frame exceeds the limit. `rest()` returns all bytes since the last returned frame.
        """
        buffer = self._buffer
        buffer += chunk
        frames = []
        start = 0
        while (end := self._end_of_frame(start)) is not None:
            self._check_size(end - start)
            frames.append(bytes(buffer[start:end]))
            start = self._searched = end
        self._check_size(len(buffer) - start)
        del buffer[:start]
        self._searched = max(0, len(buffer) - _LONGEST_END + 1)
        return frames

    def rest(self) -> bytes:
        """Return what no empty line has ended yet, and forget it. To be called when the stream has ended."""
        left = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return left

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise FrameTooLargeError(f"an event of more than {self._limit} bytes in the stream")

    def _end_of_frame(self, start: int) -> int | None:
        """Return the position after the next empty line, of a frame that begins at `start`."""
        buffer = self._buffer
        # An empty line at the beginning of a frame has no line before it.
        found = _END_OF_LINE.match(buffer, start) or _EMPTY_LINE.search(buffer, max(start, self._searched))
        if found is None or (found.end() == len(buffer) and buffer.endswith(b"\r")):
            return None
        return found.end()


class Event(NamedTuple):
    """What one frame says."""

    name: bytes
    """The `event` field; empty where there is none."""
    data: bytes | None
    """The `data` fields, joined by LF; None where there is none: such a frame is no event for anybody."""
    is_text: bool
    """False if it is no UTF-8: some readers break at that, others pass over it."""


def parse_frame(frame: bytes) -> Event:
    """Return what a frame says. Comments, ids, retry times and unknown fields say nothing here.

    The bytes of the one-line shape are not checked to be UTF-8: whoever parses the data does that.

    Args:
        frame: as the splitter cut it, or as it was left without an empty line; without the stream's `BOM`.
    """
    if (
        frame.startswith(b"data: ")
        and frame.endswith(b"\n\n")
        and frame.find(b"\n") == len(frame) - 2
        and b"\r" not in frame
    ):
        return Event(b"", frame[6:-2], True)  # the shape of nearly all frames: one line of data
    name = b""
    data = []
    for line in _END_OF_LINE.split(frame):
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    return Event(name, b"\n".join(data) if data else None, _is_utf8(frame))


def _is_utf8(frame: bytes) -> bool:
    try:
        frame.decode()
    except UnicodeDecodeError:
        return False
    return True
