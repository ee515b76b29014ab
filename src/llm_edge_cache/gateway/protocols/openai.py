"""What OpenAI's endpoints have in common: the shape of their errors, of their usage, and of answers made of choices."""

from __future__ import annotations

from abc import abstractmethod
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

__all__ = ["ChoicesProtocol", "ChoicesStreamJudge", "OpenAIProtocol", "openai_error_type", "read_usage"]

_ERROR_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def openai_error_type(status: int) -> str:
    """Return the word for the kind of failure that goes with an HTTP status."""
    return _ERROR_TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def read_usage(usage: object) -> TokenUsage | None:
    """Return what an answer cost, from the `usage` object of chat, completions or embeddings; None: it does not say."""
    fields = dict_of(usage)
    prompt, completion = count_of(fields.get("prompt_tokens")), count_of(fields.get("completion_tokens"))
    total = count_of(fields.get("total_tokens")) or prompt + completion
    if total == 0:
        return None
    return TokenUsage(prompt or total - completion, completion, total)


class OpenAIProtocol(WireProtocol):
    """An endpoint whose failures have OpenAI's shape."""

    def error_body(self, status: int, message: str, *, error_type: str | None = None, code: str | None = None) -> bytes:
        """Return `{"error": {"message", "type", "param", "code"}}`."""
        kind = error_type or openai_error_type(status)
        return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})

    def error_event(self, message: str, *, status: int = 502) -> bytes:
        """Return a frame with the error object, which clients look for in every frame."""
        return b"data: " + self.error_body(status, message) + b"\n\n"


class ChoicesProtocol(OpenAIProtocol):
    """An endpoint whose answers are a list of choices, each with its own finish reason."""

    @staticmethod
    @abstractmethod
    def has_answer(choice: dict[str, Any]) -> bool:
        """Does a choice, or one chunk of it, hold any part of an answer?"""

    def _judge_answer(self, answer: dict[str, Any], cut_reasons: frozenset[str]) -> Verdict:
        choices = dicts_of(answer.get("choices"))
        finish_reason, is_cut = _finish_reason([choice.get("finish_reason") for choice in choices], cut_reasons)
        reason: Reason
        if not isinstance(answer.get("choices"), list):
            reason = "unparsable"
        elif any(choice.get("error") for choice in choices):
            reason = "error"
        elif is_cut:
            reason = "cut"
        elif not choices or not all(map(self.has_answer, choices)):
            reason = "empty"
        else:
            # A finish reason is not asked for: several servers give none (or ""), and HTTP vouches for the whole body.
            reason = "complete"
        return Verdict(reason, read_usage(answer.get("usage")), text_of(answer.get("model")), finish_reason)

    def _stream_judge(self, cut_reasons: frozenset[str], fault: Reason | None) -> StreamJudge:
        return ChoicesStreamJudge(self, cut_reasons, fault)


class ChoicesStreamJudge(StreamJudge):
    """Follows chunks with choices up to `[DONE]`."""

    def __init__(self, protocol: ChoicesProtocol, cut_reasons: frozenset[str], fault: Reason | None) -> None:
        super().__init__(cut_reasons, fault)
        self._has_answer: Final = protocol.has_answer
        self._answered: dict[object, bool] = {}  # by the choice's index: has any part of its answer come?
        self._finished: dict[object, object] = {}  # by the choice's index: its finish reason

    def _take_done(self) -> None:
        self.has_ended = True

    def _take(self, fields: dict[str, Any]) -> None:
        self.model = text_of(fields.get("model")) or self.model
        # Some servers count in every chunk: the last one is right.
        self.usage = read_usage(fields.get("usage")) or self.usage
        for choice in dicts_of(fields.get("choices")):
            self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index = count_of(choice.get("index"))
        if choice.get("error"):
            self._void("error")
        self._answered[index] = self._answered.get(index, False) or self._has_answer(choice)
        if choice.get("finish_reason"):
            self._finished[index] = choice["finish_reason"]

    def _conclude(self) -> Reason:
        self.finish_reason, is_cut = _finish_reason(list(self._finished.values()), self._cut_reasons)
        if not self._is_whole or not self._is_finished():
            return "incomplete"
        if is_cut:
            return "cut"
        return "complete" if all(self._answered.values()) else "empty"

    def _is_finished(self) -> bool:
        """Has every choice come to its end?

        Usually each says so by its finish reason, and then `[DONE]` may be missing, as from some servers it is. Some
        relays give no finish reason at all; there the end mark together with the final count of tokens, which comes
        after all text, says the same. A stream in which some choices finished and others did not was cut.
        """
        if self._finished:
            return self._finished.keys() >= self._answered.keys()
        return self.has_ended and self.usage is not None


def _finish_reason(reasons: list[object], cut_reasons: frozenset[str]) -> tuple[str | None, bool]:
    """Return the finish reason to report, and whether it is that of a cut answer."""
    known = [reason for reason in reasons if isinstance(reason, str) and reason]
    for reason in known:
        if reason in cut_reasons:
            return reason, True
    return (known[0] if known else None), False
