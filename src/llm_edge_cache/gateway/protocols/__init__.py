"""The wire protocols that the gateway understands: pure functions from bytes to decisions.

body = parse_body(raw)                              BadRequestError -> protocol.error_body(400, error.message, ...)
protocol = PROTOCOLS[path]
protocol.bypass_reason(body)                        not None: leave the cache alone
cache_key(path, query, upstream, headers, body, scope=caller_scope(headers))

protocol.judge(status, headers, answer).storable    an answer in one piece

splitter, judge = FrameSplitter(), protocol.stream_judge(status, headers)
for frame in splitter.feed(chunk): judge.feed(frame)
judge.finish(splitter.rest()).storable              a stream
"""

from __future__ import annotations

from llm_edge_cache.gateway.protocols.base import (
    CUT_REASONS,
    Reason,
    StreamJudge,
    Verdict,
    WireProtocol,
    is_event_stream,
)
from llm_edge_cache.gateway.protocols.body import BadRequestError, RequestBody, parse_body
from llm_edge_cache.gateway.protocols.cachekey import SHARED_SCOPE, Headers, cache_key, caller_scope, is_key_header
from llm_edge_cache.gateway.protocols.registry import PROTOCOLS
from llm_edge_cache.gateway.protocols.sse import Event, FrameSplitter, FrameTooLargeError, parse_frame

__all__ = [
    "CUT_REASONS",
    "PROTOCOLS",
    "SHARED_SCOPE",
    "BadRequestError",
    "Event",
    "FrameSplitter",
    "FrameTooLargeError",
    "Headers",
    "Reason",
    "RequestBody",
    "StreamJudge",
    "Verdict",
    "WireProtocol",
    "cache_key",
    "caller_scope",
    "is_event_stream",
    "is_key_header",
    "parse_body",
    "parse_frame",
]
