"""Real exchanges with real providers, where they are at hand: verdicts agree with what the recorder noted of each."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import pytest
from stand_in_upstream import headers_of, protocol_of, read_recordings, request_bytes

from llm_edge_cache.gateway.protocols import FrameSplitter, Verdict, WireProtocol, cache_key, parse_body
from llm_edge_cache.gateway.protocols.body import EXCLUDED_FIELDS

BESIDE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "cassettes"
FOLDER = Path(os.environ.get("LLM_EDGE_CACHE_CASSETTES", BESIDE_REPOSITORY))

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no recordings at {FOLDER}")

# The model was asked for an empty answer, and gave one.
EMPTY = {"24124b05fd52a033"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(read_recordings(FOLDER))


def protocol(row: dict[str, Any]) -> WireProtocol:
    found = protocol_of(row)
    assert found is not None
    return found


def judge(row: dict[str, Any], size: int) -> tuple[Verdict, list[bytes]]:
    """The verdict on a recorded answer in chunks of `size` bytes, and the frames where it is a stream."""
    headers, body = headers_of(row["response_headers"]), row["response_body"].encode()
    if not row["streaming"]:
        return protocol(row).judge(row["status"], headers, body), []
    splitter, frames = FrameSplitter(), list[bytes]()
    following = protocol(row).stream_judge(row["status"], headers)
    for start in range(0, len(body), size):
        for frame in splitter.feed(body[start : start + size]):
            following.feed(frame)
            frames.append(frame)
    rest = splitter.rest()
    assert b"".join(frames) + rest == body
    return following.finish(rest), frames


def allowed_reasons(row: dict[str, Any]) -> set[str]:
    if row["status"] != 200:
        return {"status"}
    if row["id"] in EMPTY:
        return {"empty"}
    if "truncated" in row["tags"]:
        return {"cut"}
    return {"complete", "cut"} if "refusal_or_filter" in row["tags"] else {"complete"}


def test_everything_is_kept_but_failures_and_what_was_cut(rows: list[dict[str, Any]]) -> None:
    odd = {row["id"]: judge(row, 4096)[0] for row in rows}
    wrong = [(row["id"], odd[row["id"]]) for row in rows if odd[row["id"]].reason not in allowed_reasons(row)]
    assert wrong == []


def test_chunks_of_any_size_give_the_same_frames_and_verdicts(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["streaming"]:
            assert judge(row, 1) == judge(row, 7) == judge(row, 4096) == judge(row, 1 << 30)


def test_a_stream_that_lost_its_second_half_is_never_kept(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["streaming"]:
            half = {**row, "response_body": row["response_body"][: len(row["response_body"]) // 2]}
            assert not judge(half, 4096)[0].storable, row["id"]


def test_whoever_asks_for_the_server_s_state_bypasses_the_cache(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        reason = protocol(row).bypass_reason(parse_body(request_bytes(row)))
        assert (reason is not None) == bool({"server_state", "stored"} & set(row["tags"])), (row["id"], reason)


def test_nearly_all_kept_answers_name_their_model_and_say_what_they_cost(rows: list[dict[str, Any]]) -> None:
    kept = [verdict for row in rows if (verdict := judge(row, 4096)[0]).storable]
    assert sum(verdict.model is not None for verdict in kept) > 0.99 * len(kept)
    # Streams of the chat protocol say it only when asked.
    assert sum(verdict.usage is not None for verdict in kept) > 0.95 * len(kept)
    assert all(verdict.usage.total_tokens > 0 for verdict in kept if verdict.usage)


def test_questions_share_a_key_only_where_they_differ_in_what_does_not_count(rows: list[dict[str, Any]]) -> None:
    by_key = collections.defaultdict(list)
    for row in rows:
        upstream, headers = row["host"] + row["path"], headers_of(row["request_headers"])
        body = parse_body(request_bytes(row))
        by_key[cache_key(protocol(row).path, row["query"].encode(), upstream, headers, body)].append(row)
    for same in by_key.values():
        counting = [{k: v for k, v in row["request_json"].items() if k not in EXCLUDED_FIELDS} for row in same]
        assert all(fields == counting[0] for fields in counting)
