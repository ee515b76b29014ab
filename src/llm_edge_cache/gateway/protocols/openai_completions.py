"""`POST /v1/completions`: OpenAI's older text completion."""

from __future__ import annotations

from typing import Any

from llm_edge_cache.gateway.protocols.openai import ChoicesProtocol

__all__ = ["OpenAICompletions"]


class OpenAICompletions(ChoicesProtocol):
    """Text completions."""

    name = "openai.completions"
    path = "/v1/completions"

    @staticmethod
    def has_answer(choice: dict[str, Any]) -> bool:
        """Does a choice, or a chunk of it, hold any text?"""
        return bool(choice.get("text"))
