"""`POST /v1/responses`: OpenAI's Responses API.

An absent `store` means true to OpenAI. It does not bypass the cache all the same: nearly no client gives the field, and
what it changes is that the answer can be fetched or continued by its id later, which is as true of a cached answer, for
as long as the provider keeps the one that was recorded. Whoever writes `store: true` asks for a stored answer of their
own, and gets one.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from llm_edge_cache.gateway.protocols.base import Reason, StreamJudge, Verdict, count_of, dict_of, dicts_of, text_of
from llm_edge_cache.gateway.protocols.openai import OpenAIProtocol, openai_error_type
from llm_edge_cache.model import TokenUsage

__all__ = ["OpenAIResponses"]

_COMPLETE: Final = ("completed", "complete")  # the latter is not OpenAI's
_FAILURE_EVENTS: Final = ("response.failed", "response.cancelled")
_END_EVENTS: Final = ("response.completed", "response.incomplete", *_FAILURE_EVENTS)


class OpenAIResponses(OpenAIProtocol):
    """Responses."""

    name = "openai.responses"
    path = "/v1/responses"
    server_state_fields = ("store", "background", "previous_response_id", "conversation")

    def error_event(self, message: str, *, status: int = 502) -> bytes:
        """Return an `error` event, as this API has it."""
        event = {"type": "error", "code": openai_error_type(status), "message": message, "param": None}
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"

    def _judge_answer(self, answer: dict[str, Any], cut_reasons: frozenset[str]) -> Verdict:
        return _judge_response(answer, cut_reasons, _has_answer(answer.get("output")))

    def _stream_judge(self, cut_reasons: frozenset[str], fault: Reason | None) -> StreamJudge:
        return _ResponsesStreamJudge(cut_reasons, fault)


class _ResponsesStreamJudge(StreamJudge):
    """Follows typed events up to the one that brings the whole response."""

    def __init__(self, cut_reasons: frozenset[str], fault: Reason | None) -> None:
        super().__init__(cut_reasons, fault)
        self._has_answer = False  # among the finished items: the last event may leave them out
        self._verdict: Verdict | None = None

    def _take(self, fields: dict[str, Any]) -> None:
        kind = fields.get("type")
        if kind == "response.output_item.done":
            self._has_answer = self._has_answer or _has_answer([fields.get("item")])
        elif kind in _END_EVENTS:
            self.has_ended = True
            response = dict_of(fields.get("response"))
            has_answer = self._has_answer or _has_answer(response.get("output"))
            self._verdict = verdict = _judge_response(response, self._cut_reasons, has_answer)
            self.usage, self.model, self.finish_reason = verdict.usage, verdict.model, verdict.finish_reason
            if kind in _FAILURE_EVENTS:
                self._void("error")

    def _conclude(self) -> Reason:
        return "incomplete" if self._verdict is None else self._verdict.reason


def _judge_response(response: dict[str, Any], cut_reasons: frozenset[str], has_answer: bool) -> Verdict:
    status = response.get("status")
    cut_reason = text_of(dict_of(response.get("incomplete_details")).get("reason"))
    reason: Reason
    if response.get("error") or status == "failed":
        reason = "error"
    elif not isinstance(response.get("output"), list):
        reason = "unparsable"
    elif cut_reason is not None and cut_reason in cut_reasons:
        reason = "cut"
    elif status not in _COMPLETE and cut_reason is None:
        reason = "incomplete"
    else:
        reason = "complete" if has_answer else "empty"
    return Verdict(
        reason, _read_usage(response.get("usage")), text_of(response.get("model")), cut_reason or text_of(status)
    )


def _has_answer(output: object) -> bool:
    """Is there a tool call, or a message that says anything? Reasoning alone is no answer."""
    for item in dicts_of(output):
        kind = item.get("type")
        if kind == "message":
            if any(part.get("text") or part.get("refusal") for part in dicts_of(item.get("content"))):
                return True
        elif kind != "reasoning":
            return True
    return False


def _read_usage(usage: object) -> TokenUsage | None:
    fields = dict_of(usage)
    prompt, completion = count_of(fields.get("input_tokens")), count_of(fields.get("output_tokens"))
    total = count_of(fields.get("total_tokens")) or prompt + completion
    return TokenUsage(prompt, completion, total) if total else None
