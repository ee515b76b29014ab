"""`POST /v1/chat/completions`: OpenAI's chat, which most providers speak."""

from __future__ import annotations

from typing import Any, Final

from llm_edge_cache.gateway.protocols.base import dict_of
from llm_edge_cache.gateway.protocols.openai import ChoicesProtocol

__all__ = ["OpenAIChat"]

_ANSWERS: Final = ("content", "tool_calls", "refusal", "images")
_ANSWER_OBJECTS: Final = ("function_call", "audio")


class OpenAIChat(ChoicesProtocol):
    """Chat completions."""

    name = "openai.chat"
    path = "/v1/chat/completions"
    server_state_fields = ("store",)

    @staticmethod
    def has_answer(choice: dict[str, Any]) -> bool:
        """Does a choice's message, or the delta of a chunk, say anything? Reasoning alone is no answer."""
        message = dict_of(choice.get("message") or choice.get("delta"))
        if any(message.get(field) for field in _ANSWERS):
            return True
        # Some servers write these out with nothing in them.
        return any(any(dict_of(message.get(field)).values()) for field in _ANSWER_OBJECTS)
