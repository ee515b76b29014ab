"""The splitter loses nothing and gives the same frames whatever the chunks; a frame is read as the standard says."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_edge_cache.gateway.protocols import Event, FrameSplitter, FrameTooLargeError, parse_frame

LINE_ENDS = (b"\n", b"\r\n", b"\r")
PIECES = [b"data: x", b"data:", b"event: e", b":", b"\xef\xbb\xbf", b"\xff", "é".encode(), *LINE_ENDS, *LINE_ENDS, b" "]
streams = st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join)


def split(stream: bytes, sizes: list[int]) -> tuple[list[bytes], bytes]:
    """Feed a stream in chunks of these sizes, over and over."""
    splitter, frames, start, turn = FrameSplitter(), [], 0, 0
    while start < len(stream):
        size = sizes[turn % len(sizes)]
        frames += splitter.feed(stream[start : start + size])
        start, turn = start + size, turn + 1
    return frames, splitter.rest()


def reference(stream: bytes) -> tuple[list[bytes], bytes]:
    """The same, line by line: a frame ends after its first empty line, which a CR at the very end does not complete."""
    lines = re.findall(rb"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+$", stream)
    frames, frame = [], b""
    for number, line in enumerate(lines):
        frame += line
        is_undecided = number == len(lines) - 1 and line == b"\r"
        if line in LINE_ENDS and not is_undecided:
            frames.append(frame)
            frame = b""
    return frames, frame


@given(streams)
def test_frames_are_those_of_a_splitter_by_lines(stream: bytes) -> None:
    assert split(stream, [max(1, len(stream))]) == reference(stream)


@given(streams, st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_no_chunking_changes_a_frame_or_loses_a_byte(stream: bytes, sizes: list[int]) -> None:
    frames, rest = split(stream, sizes)
    assert b"".join(frames) + rest == stream
    assert (frames, rest) == reference(stream)


@pytest.mark.parametrize("end", LINE_ENDS)
def test_every_line_end_ends_frames(end: bytes) -> None:
    frames = [b"data: a" + end + end, b"event: e" + end + b"data: b" + end + end]
    assert split(b"".join(frames) + b":", [3]) == (frames, b":")


def test_a_frame_is_handed_out_with_its_last_byte() -> None:
    for end in (b"\n\n", b"\r\n\r\n"):
        splitter = FrameSplitter()
        frame = b"data: a" + end
        assert splitter.feed(frame[:-1]) == []
        assert splitter.feed(frame[-1:]) == [frame]


def test_after_a_last_cr_the_frame_waits_for_what_may_be_its_lf() -> None:
    splitter = FrameSplitter()
    assert splitter.feed(b"data: a\r\n\r") == []
    assert splitter.feed(b"\ndata: b") == [b"data: a\r\n\r\n"]
    splitter = FrameSplitter()
    assert splitter.feed(b"data: a\r\r") == []
    assert splitter.feed(b"d") == [b"data: a\r\r"]


def test_the_rest_is_what_no_empty_line_has_ended() -> None:
    splitter = FrameSplitter()
    splitter.feed(b"data: a\n\ndata: b\n")
    assert splitter.rest() == b"data: b\n"
    assert splitter.rest() == b""


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_a_frame_beyond_the_limit_is_refused_and_its_bytes_are_still_there(size: int) -> None:
    small, large = b"data: a\n\n", b"data: " + b"x" * 40 + b"\n\n"
    stream, splitter, frames = small + large, FrameSplitter(limit=32), list[bytes]()

    def feed_all() -> None:
        for start in range(0, len(stream), size):
            frames.extend(splitter.feed(stream[start : start + size]))

    with pytest.raises(FrameTooLargeError, match="more than 32 bytes"):
        feed_all()
    assert stream.startswith(b"".join(frames) + splitter.rest())


def test_a_frame_at_the_limit_is_fine() -> None:
    frame = b"data: 12345678\n\n"
    assert FrameSplitter(limit=len(frame)).feed(frame * 3) == [frame] * 3


def test_a_long_frame_in_small_chunks_is_searched_once() -> None:
    """The buffer remembers how far it has looked: otherwise 4 MB in chunks of 64 bytes would take minutes."""
    frame = b"data: " + b"x" * (4 << 20) + b"\n\n"
    assert split(frame, [64]) == ([frame], b"")


# ---- one frame ----


@pytest.mark.parametrize(
    ("frame", "event"),
    [
        (b"data: x\n\n", Event(b"", b"x", True)),
        (b"data:x\n\n", Event(b"", b"x", True)),
        (b"data:  x\n\n", Event(b"", b" x", True)),
        (b"data: x\r\n\r\n", Event(b"", b"x", True)),
        (b"data: x\r\r", Event(b"", b"x", True)),
        (b"data: x\rdata: y\n\n", Event(b"", b"x\ny", True)),
        (b"data: x\ndata: y\n\n", Event(b"", b"x\ny", True)),
        (b"data\n\n", Event(b"", b"", True)),
        (b"data: x", Event(b"", b"x", True)),
        (b"data: x\ny", Event(b"", b"x", True)),
        (b"event: e\ndata: x\n\n", Event(b"e", b"x", True)),
        (b"data: x\nevent:e\n\n", Event(b"e", b"x", True)),
        (b"id: 1\nretry: 5\ndata: x:y\n\n", Event(b"", b"x:y", True)),
        (b": data: x\n\n", Event(b"", None, True)),
        (b"event: e\n\n", Event(b"e", None, True)),
        (b" data: x\n\n", Event(b"", None, True)),
        (b"\n", Event(b"", None, True)),
        (b"", Event(b"", None, True)),
        (b": \xff\n\n", Event(b"", None, False)),
    ],
)
def test_what_a_frame_says(frame: bytes, event: Event) -> None:
    assert parse_frame(frame) == event


@given(streams)
def test_no_frame_is_too_odd_to_be_read(stream: bytes) -> None:
    frames, rest = split(stream, [4096])
    for frame in [*frames, rest]:
        parse_frame(frame)
