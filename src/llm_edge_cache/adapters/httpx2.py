"""The transports of `llm_edge_cache.adapters.httpx` under the name of the library that the official clients use now."""

from llm_edge_cache.adapters.httpx import AsyncCachingTransport, CachingTransport

__all__ = ["AsyncCachingTransport", "CachingTransport"]
