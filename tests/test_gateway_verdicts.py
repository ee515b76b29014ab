"""Every exchange of tests/data/exchanges.jsonl, which are invented, gets the verdict that is written beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in_upstream import headers_of, read_recordings, request_bytes

from llm_edge_cache import TokenUsage
from llm_edge_cache.gateway.protocols import PROTOCOLS, FrameSplitter, Verdict, WireProtocol, parse_body

ROWS = list(read_recordings(Path(__file__).parent / "data" / "exchanges.jsonl"))
PLAIN = [row for row in ROWS if not row["streaming"]]
STREAMS = [row for row in ROWS if row["streaming"]]
EVENT_STREAM = [(b"content-type", b"text/event-stream")]


def named(row: dict[str, Any]) -> str:
    return row["id"]


def expected(row: dict[str, Any]) -> Verdict:
    told = row["expected"]
    usage = TokenUsage(*told["usage"]) if told["usage"] else None
    return Verdict(told["reason"], usage, told["model"], told["finish_reason"])


def protocol(row: dict[str, Any]) -> WireProtocol:
    return PROTOCOLS[row["path"]]


def judge_stream(row: dict[str, Any], body: bytes, size: int, *, is_clean_end: bool = True) -> Verdict:
    splitter = FrameSplitter()
    judge = protocol(row).stream_judge(row["status"], headers_of(row["response_headers"]))
    for start in range(0, len(body), size):
        for frame in splitter.feed(body[start : start + size]):
            judge.feed(frame)
    return judge.finish(splitter.rest(), is_clean_end=is_clean_end)


@pytest.mark.parametrize("row", PLAIN, ids=named)
def test_an_answer_in_one_piece(row: dict[str, Any]) -> None:
    verdict = protocol(row).judge(row["status"], headers_of(row["response_headers"]), row["response_body"].encode())
    if row["expected"]["reason"] in ("error", "status", "unparsable"):
        assert verdict.reason == row["expected"]["reason"]
    else:
        assert verdict == expected(row)
    assert verdict.storable == (row["expected"]["reason"] == "complete")


@pytest.mark.parametrize("size", [1, 7, 4096])
@pytest.mark.parametrize("row", STREAMS, ids=named)
def test_a_stream_in_chunks_of_any_size(row: dict[str, Any], size: int) -> None:
    verdict = judge_stream(row, row["response_body"].encode(), size)
    if row["expected"]["reason"] == "error":
        assert verdict.reason == "error"
    else:
        assert verdict == expected(row)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_request_bypasses_the_cache_where_it_needs_the_server_s_state(row: dict[str, Any]) -> None:
    body = parse_body(request_bytes(row))
    assert protocol(row).bypass_reason(body) == row["expected"]["bypass"]
    assert body.is_stream == row["streaming"]


@pytest.mark.parametrize("row", [row for row in STREAMS if row["expected"]["reason"] == "complete"], ids=named)
def test_a_stream_that_breaks_off_anywhere_is_not_kept_unless_its_end_mark_had_come(row: dict[str, Any]) -> None:
    body = row["response_body"].encode()
    for length in range(len(body)):
        verdict = judge_stream(row, body[:length], 4096, is_clean_end=False)
        # The end mark is the last thing in each of these; what may be missing is line ends after it.
        assert not verdict.storable or not body[length:].strip(), body[:length][-60:]


@pytest.mark.parametrize("row", [row for row in STREAMS if row["expected"]["reason"] == "complete"], ids=named)
def test_an_error_event_anywhere_voids_a_stream(row: dict[str, Any]) -> None:
    body = row["response_body"].encode()
    frames = FrameSplitter().feed(body)
    for position in range(len(frames)):
        broken = b"".join([*frames[:position], protocol(row).error_event("sorry"), *frames[position:]])
        assert not judge_stream(row, broken, 4096).storable


@pytest.mark.parametrize("row", [row for row in STREAMS if row["expected"]["reason"] == "complete"], ids=named)
@pytest.mark.parametrize("garbage", [b"data: \xff\n\n", b"data: {nor this\n\n", b"data: []\n\n", b": \xfe\n\n"])
def test_garbage_anywhere_voids_a_stream(row: dict[str, Any], garbage: bytes) -> None:
    frames = FrameSplitter().feed(row["response_body"].encode())
    for position in range(len(frames) + 1):
        broken = b"".join([*frames[:position], garbage, *frames[position:]])
        assert judge_stream(row, broken, 4096).reason == "unparsable"


@pytest.mark.parametrize("row", [row for row in PLAIN if row["expected"]["reason"] == "complete"], ids=named)
def test_an_answer_that_was_cut_anywhere_is_not_kept(row: dict[str, Any]) -> None:
    body = row["response_body"].encode()
    for length in range(len(body)):
        assert protocol(row).judge(200, [], body[:length]).reason == "unparsable"


@pytest.mark.parametrize("path", PROTOCOLS)
def test_what_is_compressed_is_not_judged(path: str) -> None:
    headers = [*EVENT_STREAM, (b"content-encoding", b"gzip")]
    assert PROTOCOLS[path].judge(200, headers, b"{}").reason == "encoding"
    assert PROTOCOLS[path].stream_judge(200, headers).finish().reason == "encoding"


def test_the_identity_encoding_is_none() -> None:
    row = next(row for row in PLAIN if row["id"] == "chat text")
    headers = [(b"content-encoding", b" Identity ")]
    assert PROTOCOLS[row["path"]].judge(200, headers, row["response_body"].encode()).storable


@pytest.mark.parametrize("path", PROTOCOLS)
def test_nothing_is_no_stream(path: str) -> None:
    assert not PROTOCOLS[path].stream_judge(200, EVENT_STREAM).finish().storable


def test_which_finish_reasons_are_cut_is_the_operator_s_choice() -> None:
    by_name = {row["id"]: row for row in ROWS}
    for name in ("chat cut by length", "response incomplete", "message cut"):
        row = by_name[name]
        body = row["response_body"].encode()
        assert protocol(row).judge(200, [], body, cut_reasons=frozenset({"content_filter"})).storable
    for name in ("chat stream cut by length", "response stream incomplete", "message stream cut"):
        row = by_name[name]
        judge = protocol(row).stream_judge(200, EVENT_STREAM, cut_reasons=frozenset())
        for frame in FrameSplitter().feed(row["response_body"].encode()):
            judge.feed(frame)
        assert judge.finish().storable


def test_something_after_the_end_mark_voids_a_stream() -> None:
    for name in ("chat stream", "response stream", "message stream"):
        row = next(row for row in STREAMS if row["id"] == name)
        body = row["response_body"].encode()
        assert judge_stream(row, body + b'data: {"type":"more"}\n\n', 4096).reason == "unparsable"
        assert judge_stream(row, body + b": a comment says nothing\n\ndata: [DONE]\n\n", 4096).storable


def test_the_end_mark_counts_even_without_its_empty_line() -> None:
    row = next(row for row in STREAMS if row["id"] == "chat stream")
    body = row["response_body"].encode()
    assert judge_stream(row, body.rstrip(), 4096).storable
    assert not judge_stream(row, body.rstrip()[:-1], 4096).storable


def test_a_byte_order_mark_before_a_stream_is_fine_and_elsewhere_it_hides_a_field() -> None:
    row = next(row for row in STREAMS if row["id"] == "chat stream without DONE")
    first, last = FrameSplitter().feed(row["response_body"].encode())
    assert judge_stream(row, b"\xef\xbb\xbf" + first + last, 7).storable
    assert not judge_stream(row, first + b"\xef\xbb\xbf" + last, 7).storable


def test_the_judge_tells_when_the_end_mark_has_come() -> None:
    row = next(row for row in STREAMS if row["id"] == "message stream")
    judge = protocol(row).stream_judge(200, EVENT_STREAM)
    *frames, last = FrameSplitter().feed(row["response_body"].encode())
    for frame in frames:
        judge.feed(frame)
        assert not judge.has_ended
    judge.feed(last)
    assert judge.has_ended


@pytest.mark.parametrize("path", PROTOCOLS)
@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [None, 1, "x", {"message": [], "delta": 3, "finish_reason": {}}]},
        {"choices": {}, "usage": []},
        {"type": "message", "content": [None, {"type": []}], "stop_reason": 1, "usage": {"input_tokens": "many"}},
        {"status": [], "output": [None, {"type": {}}], "incomplete_details": [], "usage": {"input_tokens": -1}},
        {"data": [None, {"embedding": None}], "usage": {"total_tokens": True}},
        {"type": "response.completed", "response": None},
        {"type": "message_delta", "delta": None, "usage": {"output_tokens": None}},
    ],
    ids=str,
)
def test_answers_of_odd_types_are_not_kept_and_raise_nothing(path: str, answer: dict[str, Any]) -> None:
    text = json.dumps(answer).encode()
    assert not PROTOCOLS[path].judge(200, [], text).storable
    judge = PROTOCOLS[path].stream_judge(200, EVENT_STREAM)
    judge.feed(b"data: " + text + b"\n\n")
    assert not judge.finish().storable


# ---- failures ----


@pytest.mark.parametrize("path", PROTOCOLS)
def test_an_error_body_names_type_and_message_and_is_never_an_answer(path: str) -> None:
    body = PROTOCOLS[path].error_body(429, "slow down", code="too_many")
    error = json.loads(body)["error"]
    assert error["message"] == "slow down"
    assert error["type"] == "rate_limit_error"
    assert PROTOCOLS[path].judge(200, [], body).reason == "error"


@pytest.mark.parametrize("path", PROTOCOLS)
def test_an_error_s_type_can_be_given(path: str) -> None:
    assert json.loads(PROTOCOLS[path].error_body(500, "x", error_type="own_error"))["error"]["type"] == "own_error"


def test_error_types_follow_the_status() -> None:
    openai, anthropic = PROTOCOLS["/v1/chat/completions"], PROTOCOLS["/v1/messages"]

    def types(protocol: WireProtocol) -> list[str]:
        return [json.loads(protocol.error_body(status, "x"))["error"]["type"] for status in (400, 401, 413, 502, 529)]

    invalid = "invalid_request_error"
    assert types(openai) == [invalid, "authentication_error", invalid, "server_error", "server_error"]
    assert types(anthropic) == [invalid, "authentication_error", "request_too_large", "api_error", "overloaded_error"]


@pytest.mark.parametrize("path", PROTOCOLS)
def test_an_error_event_is_one_whole_frame(path: str) -> None:
    event = PROTOCOLS[path].error_event("the upstream hung up\n\nand: more")
    splitter = FrameSplitter()
    assert splitter.feed(event) == [event]
    assert splitter.rest() == b""
