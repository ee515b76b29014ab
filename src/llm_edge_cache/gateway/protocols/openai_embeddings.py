"""`POST /v1/embeddings`: vectors for texts. Never a stream."""

from __future__ import annotations

from typing import Any

from llm_edge_cache.gateway.protocols.base import Reason, StreamJudge, Verdict, dicts_of, text_of
from llm_edge_cache.gateway.protocols.openai import OpenAIProtocol, read_usage

__all__ = ["OpenAIEmbeddings"]


class OpenAIEmbeddings(OpenAIProtocol):
    """Embeddings."""

    name = "openai.embeddings"
    path = "/v1/embeddings"

    def _judge_answer(self, answer: dict[str, Any], cut_reasons: frozenset[str]) -> Verdict:  # noqa: ARG002
        data = dicts_of(answer.get("data"))
        reason: Reason
        if not isinstance(answer.get("data"), list):
            reason = "unparsable"
        elif not data or not all(item.get("embedding") for item in data):
            reason = "empty"
        else:
            reason = "complete"
        return Verdict(reason, read_usage(answer.get("usage")), text_of(answer.get("model")))

    def _stream_judge(self, cut_reasons: frozenset[str], fault: Reason | None) -> StreamJudge:
        return _NoStreamJudge(cut_reasons, fault or "unparsable")


class _NoStreamJudge(StreamJudge):
    """There is no such stream, so nothing of it is understood."""

    def _take(self, fields: dict[str, Any]) -> None:
        pass

    def _conclude(self) -> Reason:
        return "unparsable"
