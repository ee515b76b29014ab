"""Entries come back as they were, and nothing else comes back at all."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_edge_cache import CachedResponse, CacheError, TokenUsage, codec
from llm_edge_cache.codec import CodecError, Entry, EntryCodec

RESPONSE = CachedResponse(
    "Paris.", "gpt-4o", TokenUsage(9, 2, 11), 1.7e9, raw={"id": "x"}, finish_reason="stop", metadata={"tier": 1}
)
ENTRY = Entry(RESPONSE, 1.7e9 + 300, {"tag:geography": 7, "all": 2**63})
CODEC = EntryCodec()
HAS_ZSTD = codec._zstd() is not None
needs_zstd = pytest.mark.skipif(not HAS_ZSTD, reason="no zstd installed")


@pytest.fixture
def no_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_zstd", lambda: None)


def framed(body: bytes, mark: bytes = b"\x11") -> bytes:
    return mark + xxhash.xxh3_64_digest(body) + body


def reason_of(data: bytes) -> str:
    with pytest.raises(CodecError) as caught:
        CODEC.decode(data)
    assert isinstance(caught.value, CacheError)
    reason: str = caught.value.reason
    return reason


# ---- round trips ----

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
integers = st.integers(-(2**63), 2**64 - 1)
counts = st.integers(0, 2**63 - 1)
values = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
times = st.none() | st.floats(0, 1e11)
responses = st.builds(
    CachedResponse,
    texts,
    texts,
    st.none() | st.builds(TokenUsage, counts, counts, counts),
    times,
    raw=values,
    finish_reason=st.none() | texts,
    metadata=st.dictionaries(texts, values, max_size=3),
)
entries = st.builds(Entry, responses, times, st.dictionaries(texts, integers, max_size=3))


@given(entries)
def test_an_entry_comes_back_as_it_was(entry: Entry) -> None:
    assert CODEC.decode(CODEC.encode(entry)) == entry


@needs_zstd
@given(entries, st.integers(0, 200))
def test_a_compressed_entry_comes_back_as_it_was(entry: Entry, above: int) -> None:
    assert CODEC.decode(EntryCodec(compress_above=above).encode(entry)) == entry


def test_what_is_left_out_comes_back_as_the_default() -> None:
    assert CODEC.decode(CODEC.encode(Entry(CachedResponse("", "m")))) == Entry(CachedResponse("", "m"), None, {})


def test_the_bytes_are_pinned() -> None:
    body = bytes.fromhex("9582a7636f6e74656e74a24869a56d6f64656ca16dcb3ff800000000000081a1740100c2")
    assert CODEC.encode(Entry(CachedResponse("Hi", "m"), 1.5, {"t": 1})) == framed(body)


def test_one_codec_s_bytes_are_another_s() -> None:
    assert EntryCodec().decode(CODEC.encode(ENTRY)) == ENTRY


# ---- packed for L1, sealed for L2 ----


@given(entries)
def test_a_packed_entry_comes_back_as_it_was(entry: Entry) -> None:
    assert CODEC.unpack(CODEC.pack(entry)) == entry
    assert CODEC.read(CODEC.pack(entry)) == entry


@needs_zstd
@given(entries, st.integers(0, 200))
def test_a_packed_and_compressed_entry_comes_back_as_it_was(entry: Entry, above: int) -> None:
    assert CODEC.unpack(EntryCodec(compress_above=above).pack(entry)) == entry


@pytest.mark.parametrize("above", [None, pytest.param(0, marks=needs_zstd)])
def test_sealing_is_what_l2_has_beyond_l1(above: int | None) -> None:
    entry, maker = Entry(CachedResponse("ab" * 100, "m")), EntryCodec(compress_above=above)
    packed = maker.pack(entry)
    assert codec.seal(packed) == maker.encode(entry)
    assert codec.unsealed(maker.encode(entry)) == packed


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_no_packed_entry(data: bytes) -> None:
    with pytest.raises(CodecError) as caught:
        CODEC.unpack(data)
    assert caught.value.reason in {"content", "compression"}


@given(st.binary(max_size=60))
def test_the_hot_path_raises_nothing_but_what_it_says(data: bytes) -> None:
    with pytest.raises(codec.UNREADABLE):
        CODEC.read(data)


@needs_zstd
def test_the_hot_path_leaves_compressed_entries_to_unpack() -> None:
    with pytest.raises(codec.UNREADABLE):
        CODEC.read(EntryCodec(compress_above=0).pack(Entry(CachedResponse("ab" * 100, "m"))))


# ---- what is not ours ----


def test_every_flipped_bit_is_noticed() -> None:
    data = bytearray(CODEC.encode(ENTRY))
    for position in range(len(data) * 8):
        data[position // 8] ^= 1 << position % 8
        assert reason_of(bytes(data)) == ("format" if position < 8 else "checksum")
        data[position // 8] ^= 1 << position % 8
    assert CODEC.decode(bytes(data)) == ENTRY


@needs_zstd
def test_every_flipped_bit_of_a_compressed_entry_is_noticed() -> None:
    data = bytearray(EntryCodec(compress_above=0).encode(Entry(CachedResponse("ab" * 100, "m"))))
    assert data[0] == 0x12
    for position in range(len(data) * 8):
        data[position // 8] ^= 1 << position % 8
        assert reason_of(bytes(data)) in {"format", "checksum"}
        data[position // 8] ^= 1 << position % 8


def test_every_truncation_is_noticed() -> None:
    data = CODEC.encode(ENTRY)
    for length in range(len(data)):
        assert reason_of(data[:length]) == ("truncated" if length <= 9 else "checksum")


def test_what_follows_is_noticed() -> None:
    data = CODEC.encode(ENTRY)
    assert reason_of(data + b"\0") == "checksum"
    assert reason_of(framed(data[9:] + b"\0")) == "content"


@given(st.binary(max_size=100))
def test_garbage_is_noticed(data: bytes) -> None:
    assert reason_of(data) in {"truncated", "format", "checksum"}


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_garbage_under_a_right_checksum_raises_nothing_else(body: bytes) -> None:
    for mark in (b"\x11", b"\x12"):
        assert reason_of(framed(body, mark)) in {"truncated", "content", "compression"}


@given(st.data())
def test_a_damaged_body_under_a_right_checksum_raises_nothing_else(data: st.DataObject) -> None:
    body = bytearray(CODEC.encode(ENTRY)[9:])
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        assert isinstance(CODEC.decode(framed(bytes(body))), Entry)


@pytest.mark.parametrize("mark", sorted(set(range(256)) - {0x11, 0x12}))
def test_other_formats_are_noticed(mark: int) -> None:
    assert reason_of(bytes([mark]) + CODEC.encode(ENTRY)[1:]) == "format"


def test_a_pickle_is_nothing_to_us() -> None:
    assert (
        reason_of(b"\x80\x04\x95\x1e\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.")
        == "format"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"\xc1",  # never used in MessagePack
        b"\xc0",
        b"\x90",  # an entry of nothing
        b"\x91\x80",  # a response without content
        b"\xdd\xff\xff\xff\xff",  # four milliards of items
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * 100_000,  # nested too deep
        msgspec.msgpack.encode([{"content": "a", "model": "m", "raw": None}, "soon"]),
        msgspec.msgpack.encode([{"content": b"a", "model": "m"}]),
        msgspec.msgpack.encode([{"content": "a", "model": "m", "tokens": [1, 2, 3]}]),
        b"\x91\x82\xa7content\xa1\xff\xa5model\xa1m",  # no UTF-8
        b"\x91\x83\xa7content\xa1a\xa5model\xa1m\xa3raw" + b"\x91" * 100_000,
    ],
    ids=lambda body: str(body[:8]),
)
def test_sound_bytes_that_are_no_entry_are_noticed(body: bytes) -> None:
    assert reason_of(framed(body)) == "content"


def test_fields_of_a_newer_version_are_passed_over() -> None:
    body = msgspec.msgpack.encode([{"content": "a", "model": "m", "mood": "good"}, None, {}, 0, False, "newer"])
    assert CODEC.decode(framed(body)) == Entry(CachedResponse("a", "m"))


def test_fields_that_an_older_version_lacked_are_filled_in() -> None:
    body = msgspec.msgpack.encode([{"content": "a", "model": "m"}])
    assert CODEC.decode(framed(body)) == Entry(CachedResponse("a", "m"))


def test_errors_show_nothing_of_the_bytes() -> None:
    with pytest.raises(CodecError) as caught:
        CODEC.decode(framed(msgspec.msgpack.encode([{"content": 1, "model": "secret"}])))
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


# ---- what cannot be kept ----


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("error", "entry"),
    [
        (TypeError, Entry(CachedResponse(b"a", "m"))),  # type: ignore[arg-type]
        (TypeError, Entry(CachedResponse("a", None))),  # type: ignore[arg-type]
        (TypeError, Entry(CachedResponse("a", "m", cached_at="now"))),  # type: ignore[arg-type]
        (TypeError, Entry(CachedResponse("a", "m", TokenUsage(1, 2, 3.5)))),  # type: ignore[arg-type]
        (TypeError, Entry(CachedResponse("a", "m", TokenUsage(True, 2, 3)))),
        (TypeError, Entry(CachedResponse("a", "m", TokenUsage(1, -2, 3)))),
        (TypeError, Entry(CachedResponse("a", "m", raw=object()))),
        (TypeError, Entry(CachedResponse("a", "m", metadata={1: 2}))),  # type: ignore[dict-item]
        (TypeError, Entry(CachedResponse("a", "m"), "soon")),  # type: ignore[arg-type]
        (TypeError, Entry(CachedResponse("a", "m"), None, {"t": 1.5})),  # type: ignore[dict-item]
        (TypeError, Entry("a")),  # type: ignore[arg-type]
        (ValueError, Entry(CachedResponse("a", "m", raw=2**64))),
        (ValueError, Entry(CachedResponse("\ud800", "m"))),
        (ValueError, Entry(CachedResponse("a", "m", raw=nested(100_000)))),
    ],
    ids=lambda value: "" if isinstance(value, Entry) else value.__name__,
)
def test_what_could_not_be_read_back_is_not_encoded(error: type[Exception], entry: Entry) -> None:
    with pytest.raises(error):
        CODEC.encode(entry)


# ---- zstd ----


@needs_zstd
def test_entries_above_the_threshold_are_compressed_if_that_helps() -> None:
    compressing = EntryCodec(compress_above=500)
    short, long = Entry(CachedResponse("a" * 100, "m")), Entry(CachedResponse("a" * 1000, "m"))
    assert compressing.encode(short) == CODEC.encode(short)
    assert len(compressing.encode(long)) < 200
    assert compressing.encode(long)[0] == 0x12
    assert EntryCodec(compress_above=0).encode(Entry(CachedResponse("a", "m")))[0] == 0x11  # it would grow


@needs_zstd
def test_a_frame_that_claims_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = EntryCodec(compress_above=0).encode(Entry(CachedResponse("a" * 5000, "m")))
    assert CODEC.decode(data).response.content == "a" * 5000
    monkeypatch.setattr(codec, "_LARGEST_BODY", 1000)
    assert reason_of(data) == "compression"


@needs_zstd
def test_broken_frames_are_noticed() -> None:
    frame = EntryCodec(compress_above=0).encode(Entry(CachedResponse("a" * 5000, "m")))[9:]
    for broken in (frame[:-1], frame + b"\0", frame + frame, b"\0" + frame, frame[:4]):
        assert reason_of(framed(broken, b"\x12")) == "compression"


def test_a_threshold_without_zstd_is_a_clear_error(no_zstd: None) -> None:
    with pytest.raises(ImportError, match=r"install backports\.zstd"):
        EntryCodec(compress_above=1000)


def test_a_compressed_entry_without_zstd_is_a_miss_that_says_why(no_zstd: None) -> None:
    with pytest.raises(CodecError, match=r"install backports\.zstd") as caught:
        CODEC.decode(framed(b"\x28\xb5\x2f\xfd", b"\x12"))
    assert caught.value.reason == "compression"


def test_a_negative_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="compress_above must be 0 or more"):
        EntryCodec(compress_above=-1)


def test_zstd_is_looked_for_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    codec._zstd.cache_clear()
    try:
        assert codec._zstd() is None
    finally:
        codec._zstd.cache_clear()
