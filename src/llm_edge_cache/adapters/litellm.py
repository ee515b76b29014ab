"""LiteLLM's response cache in both tiers: one for all workers of the host, and all hosts.

    litellm.cache = litellm.Cache(type="local")
    litellm.cache.cache = LLMEdgeCache()

LiteLLM makes the keys, and decides what is cached and when; this keeps it. LiteLLM reports what its cache raises in its
own log, and goes on without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

try:
    from litellm.caching.base_cache import BaseCache
except ImportError as error:
    raise ImportError("the LiteLLM adapter needs litellm: pip install 'llm-edge-cache[litellm]'") from error

from llm_edge_cache.adapters.serializers import MsgspecSerializer
from llm_edge_cache.faces import Faces
from llm_edge_cache.model import CacheableRequest, CachedResponse

if TYPE_CHECKING:
    from llm_edge_cache.lookup import LookupResult
    from llm_edge_cache.manager import CacheManager
    from llm_edge_cache.settings import L1Config, L2Config
    from llm_edge_cache.sync_manager import SyncCacheManager

__all__ = ["LLMEdgeCache"]

_serializer: Final = MsgspecSerializer()


class LLMEdgeCache(BaseCache):
    """A backend for `litellm.Cache`.

    Args:
        l1: The tier in shared memory.
        l2: The tier in Redis.
        manager: A CacheManager or SyncCacheManager to use instead of l1 and l2; it stays open at the end. Of the three
            nothing: the environment says what to use (`load_settings`).
        default_ttl: Seconds for which an answer is kept where LiteLLM gives no ttl; None: those of the tiers.
        namespace: Caches of different namespaces never meet.

    Raises:
        TypeError: manager is none, or given together with l1 or l2.
        SlabError, RedisConfigError, SettingsError: as from SyncCacheManager.
    """

    def __init__(
        self,
        l1: L1Config | None = None,
        l2: L2Config | None = None,
        *,
        manager: CacheManager | SyncCacheManager | None = None,
        default_ttl: float | None = None,
        namespace: str = "",
    ) -> None:
        super().__init__()
        self._default_ttl = default_ttl
        self.default_ttl: Any = default_ttl  # where LiteLLM looks; it knows of integers alone
        self._faces = Faces(l1, l2, manager)
        self._namespace = namespace
        self._tags = (f"litellm:{namespace}",)

    # ---- LiteLLM's interface; from threads ----

    def get_cache(self, key: str, **kwargs: Any) -> Any:  # noqa: ARG002 - what semantic caches look at
        """Return what was stored under a key; None: nothing."""
        return _value_of(self._faces.threads.lookup(self._request(key)))

    def batch_get_cache(self, keys: Iterable[str], **kwargs: Any) -> list[Any]:
        """Return what was stored under each of the keys; None where there is nothing."""
        return [self.get_cache(key, **kwargs) for key in keys]

    def set_cache(self, key: str, value: Any, **kwargs: Any) -> None:
        """Store a value for kwargs["ttl"] seconds; the old one is gone in any case. One of 0 and less is over at once.

        Raises:
            TypeError, ValueError: it cannot be carried; the message names the type.
        """
        request, ttl = self._request(key), self._seconds(kwargs.get("ttl"))
        response = None
        try:
            response = None if _is_over(ttl) else _response_of(value)
        finally:
            if response is None:
                self._faces.threads.invalidate(request)
        if response is not None:
            self._faces.threads.store(request, response, l1_ttl=ttl, l2_ttl=ttl, tags=self._tags)

    def delete_cache(self, key: str) -> None:
        """Make what was stored under a key void, on all hosts."""
        self._faces.threads.invalidate(self._request(key))

    def flush_cache(self) -> None:
        """Make everything void that was stored through a cache of this namespace, on all hosts."""
        self._faces.threads.invalidate_tag(*self._tags)

    def close(self) -> None:
        """Send what is queued for Redis, and let go of everything, unless the manager is the caller's own."""
        self._faces.close()

    # ---- the same for coroutines ----

    async def async_get_cache(self, key: str, **kwargs: Any) -> Any:  # noqa: ARG002
        """See get_cache()."""
        return _value_of(await self._faces.loops.lookup(self._request(key)))

    async def async_batch_get_cache(self, keys: Iterable[str], **kwargs: Any) -> list[Any]:
        """See batch_get_cache()."""
        return [await self.async_get_cache(key, **kwargs) for key in keys]

    async def async_set_cache(self, key: str, value: Any, **kwargs: Any) -> None:
        """See set_cache()."""
        request, ttl = self._request(key), self._seconds(kwargs.get("ttl"))
        response = None
        try:
            response = None if _is_over(ttl) else _response_of(value)
        finally:
            if response is None:
                await self._faces.loops.invalidate(request)
        if response is not None:
            await self._faces.loops.store(request, response, l1_ttl=ttl, l2_ttl=ttl, tags=self._tags)

    async def async_set_cache_pipeline(self, cache_list: Sequence[tuple[str, Any]], **kwargs: Any) -> None:
        """Store several pairs of key and value."""
        for key, value in cache_list:
            await self.async_set_cache(key, value, **kwargs)

    async def batch_cache_write(self, key: str, value: Any, **kwargs: Any) -> None:
        """Store a value; at once, since nothing is gained by waiting for more."""
        await self.async_set_cache(key, value, **kwargs)

    async def async_delete_cache(self, key: str) -> None:
        """See delete_cache()."""
        await self._faces.loops.invalidate(self._request(key))

    async def delete_cache_keys(self, keys: Iterable[str]) -> None:
        """Delete several."""
        for key in keys:
            await self.async_delete_cache(key)

    async def ping(self) -> bool:
        """Tell whether all tiers that are configured work."""
        return (await self._faces.loops.health_check()).is_fully_healthy

    async def test_connection(self) -> dict[str, Any]:
        """Tell the same in LiteLLM's words."""
        health = await self._faces.loops.health_check()
        if health.is_fully_healthy:
            return {"status": "success", "message": "the cache works"}
        which = "the slab" if not health.l1_healthy else "Redis"
        return {"status": "failed", "message": f"{which} cannot be used", "error": f"{which} cannot be used"}

    async def disconnect(self) -> None:
        """As close(), from the event loop that used it."""
        await self._faces.aclose()

    def _request(self, key: str) -> CacheableRequest:
        return CacheableRequest("litellm", key, namespace=self._namespace)

    def _seconds(self, ttl: Any) -> float | None:
        """Return a ttl as a number; what is none counts as not given, as in all of LiteLLM's caches."""
        try:
            return self._default_ttl if ttl is None else float(ttl)
        except (TypeError, ValueError):
            return self._default_ttl


def _is_over(ttl: float | None) -> bool:
    return ttl is not None and not ttl > 0


def _response_of(value: Any) -> CachedResponse:
    return CachedResponse("", "litellm", raw=_serializer.dumps(value))


def _value_of(found: LookupResult) -> Any:
    if found.response is None:
        return None
    try:
        return _serializer.loads(found.response.raw)
    except Exception:  # of another version, or damaged: a decoder says so in many ways
        return None
