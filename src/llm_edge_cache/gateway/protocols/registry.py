"""Which protocol is spoken at which path."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from llm_edge_cache.gateway.protocols.anthropic_messages import AnthropicMessages
from llm_edge_cache.gateway.protocols.base import WireProtocol
from llm_edge_cache.gateway.protocols.openai_chat import OpenAIChat
from llm_edge_cache.gateway.protocols.openai_completions import OpenAICompletions
from llm_edge_cache.gateway.protocols.openai_embeddings import OpenAIEmbeddings
from llm_edge_cache.gateway.protocols.openai_responses import OpenAIResponses

__all__ = ["PROTOCOLS"]

_ALL: Final = (OpenAIChat(), OpenAICompletions(), OpenAIResponses(), OpenAIEmbeddings(), AnthropicMessages())

PROTOCOLS: Final[Mapping[str, WireProtocol]] = MappingProxyType({protocol.path: protocol for protocol in _ALL})
"""By path, exactly as it stands in the request: whatever else is asked for is not cacheable."""
