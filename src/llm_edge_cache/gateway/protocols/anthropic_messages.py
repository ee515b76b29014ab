"""`POST /v1/messages`: Anthropic's Messages API."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from llm_edge_cache.gateway.protocols.base import (
    Reason,
    StreamJudge,
    Verdict,
    WireProtocol,
    count_of,
    dict_of,
    dicts_of,
    text_of,
)
from llm_edge_cache.model import TokenUsage

__all__ = ["AnthropicMessages"]

_ERROR_TYPES: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_THOUGHTS: Final = ("thinking", "redacted_thinking")
# Tokens of the prompt are counted in three places: those read from the provider's prompt cache are not `input_tokens`.
_PROMPT_COUNTS: Final = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class AnthropicMessages(WireProtocol):
    """Messages."""

    name = "anthropic.messages"
    path = "/v1/messages"
    server_state_fields = ("container",)

    def error_body(
        self,
        status: int,
        message: str,
        *,
        error_type: str | None = None,
        code: str | None = None,  # noqa: ARG002 (there is no place for it)
    ) -> bytes:
        """Return `{"type": "error", "error": {"type", "message"}}`, without a code."""
        return msgspec.json.encode(
            {"type": "error", "error": {"type": error_type or _error_type(status), "message": message}}
        )

    def error_event(self, message: str, *, status: int = 502) -> bytes:
        """Return an `error` event."""
        return b"event: error\ndata: " + self.error_body(status, message) + b"\n\n"

    def _judge_answer(self, answer: dict[str, Any], cut_reasons: frozenset[str]) -> Verdict:
        stop_reason = text_of(answer.get("stop_reason"))
        reason: Reason
        if answer.get("type") != "message" or not isinstance(answer.get("content"), list):
            reason = "unparsable"
        elif stop_reason is None:
            reason = "incomplete"
        elif stop_reason in cut_reasons:
            reason = "cut"
        else:
            reason = "complete" if any(map(_is_answer, dicts_of(answer["content"]))) else "empty"
        return Verdict(reason, _read_usage(dict_of(answer.get("usage"))), text_of(answer.get("model")), stop_reason)

    def _stream_judge(self, cut_reasons: frozenset[str], fault: Reason | None) -> StreamJudge:
        return _MessagesStreamJudge(cut_reasons, fault)


class _MessagesStreamJudge(StreamJudge):
    """Follows `message_start`, blocks of content, `message_delta`, up to `message_stop`."""

    def __init__(self, cut_reasons: frozenset[str], fault: Reason | None) -> None:
        super().__init__(cut_reasons, fault)
        self._counts: dict[str, Any] = {}  # usage: what the start says, overwritten by what later events say
        self._open_blocks: set[int] = set()
        self._has_started = False
        self._has_answer = False

    def _take(self, fields: dict[str, Any]) -> None:
        kind = fields.get("type")
        if kind == "content_block_delta":
            self._has_answer = self._has_answer or bool(dict_of(fields.get("delta")).get("text"))
        elif kind == "content_block_start":
            self._open_blocks.add(count_of(fields.get("index")))
            self._has_answer = self._has_answer or _is_answer(dict_of(fields.get("content_block")))
        elif kind == "content_block_stop":
            self._open_blocks.discard(count_of(fields.get("index")))
        elif kind == "message_start":
            message = dict_of(fields.get("message"))
            self._has_started = True
            self.model = text_of(message.get("model"))
            self._count(message.get("usage"))
        elif kind == "message_delta":
            self.finish_reason = text_of(dict_of(fields.get("delta")).get("stop_reason")) or self.finish_reason
            self._count(fields.get("usage"))
        elif kind == "message_stop":
            self.has_ended = True

    def _count(self, usage: object) -> None:
        """Take the counts that are given; they are running totals."""
        self._counts.update((name, count) for name, count in dict_of(usage).items() if count is not None)
        self.usage = _read_usage(self._counts)

    def _conclude(self) -> Reason:
        if not (self.has_ended and self._has_started) or self._open_blocks or self.finish_reason is None:
            return "incomplete"
        if self.finish_reason in self._cut_reasons:
            return "cut"
        return "complete" if self._has_answer else "empty"


def _is_answer(block: dict[str, Any]) -> bool:
    """Is a block of content a tool's call or result, or a text that is not empty? Thinking alone is no answer."""
    kind = block.get("type")
    return bool(block.get("text")) if kind == "text" else kind not in _THOUGHTS


def _read_usage(counts: dict[str, Any]) -> TokenUsage | None:
    prompt = sum(count_of(counts.get(name)) for name in _PROMPT_COUNTS)
    completion = count_of(counts.get("output_tokens"))
    return TokenUsage(prompt, completion, prompt + completion) if prompt + completion else None


def _error_type(status: int) -> str:
    return _ERROR_TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
