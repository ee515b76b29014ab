"""LangChain's cache of model answers in both tiers: one for all workers of the host, and all hosts.

    set_llm_cache(LLMEdgeCache())

What is stored of an answer are the fields of its generations and messages, as plain data (`serializers`), and what is
read becomes langchain-core's own classes: the four of `_GENERATIONS` and those of `messages_from_dict`, by a fixed
table. No name out of the cache is imported, so whoever can write to it can make up answers, but run nothing. (That is
what `langchain_core.load.loads` does with an allow-list of the same classes, at several times the price: it builds the
list anew in every call.)
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

try:
    from langchain_core.caches import RETURN_VAL_TYPE, BaseCache
    from langchain_core.messages import BaseMessage, messages_from_dict
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, Generation, GenerationChunk
except ImportError as error:
    raise ImportError("the LangChain adapter needs langchain-core: pip install 'llm-edge-cache[langchain]'") from error

from llm_edge_cache.adapters.serializers import MsgspecSerializer
from llm_edge_cache.faces import Faces
from llm_edge_cache.model import CacheableRequest, CachedResponse, TokenUsage

if TYPE_CHECKING:
    from llm_edge_cache.lookup import LookupResult
    from llm_edge_cache.manager import CacheManager
    from llm_edge_cache.settings import L1Config, L2Config
    from llm_edge_cache.sync_manager import SyncCacheManager

__all__ = ["LLMEdgeCache"]

_log = logging.getLogger("llm_edge_cache")

_GENERATIONS: Final[dict[str, type[Generation]]] = {
    kind.__name__: kind for kind in (Generation, GenerationChunk, ChatGeneration, ChatGenerationChunk)
}
_serializer: Final = MsgspecSerializer()


class LLMEdgeCache(BaseCache):
    """A cache for `langchain_core.globals.set_llm_cache` or the `cache` of one model.

    Args:
        l1: The tier in shared memory.
        l2: The tier in Redis.
        manager: A CacheManager or SyncCacheManager to use instead of l1 and l2; it stays open at the end. Of the three
            nothing: the environment says what to use (`load_settings`).
        ttl: Seconds for which an answer is kept, in both tiers; None: those of the tiers.
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
        ttl: float | None = None,
        namespace: str = "",
    ) -> None:
        self._faces = Faces(l1, l2, manager)
        self._ttl = ttl
        self._namespace = namespace
        self._tags = (f"langchain:{namespace}",)

    # ---- LangChain's interface ----

    def lookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """Return the generations of a prompt to a model so configured, made anew for this caller; None: not there."""
        return _generations_of(self._faces.threads.lookup(self._request(prompt, llm_string)))

    def update(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """Store the generations of a prompt.

        What cannot be carried is not stored, with a warning in the log and no exception: the answer was paid for, and
        is its caller's. An old one is gone then.
        """
        request, response = self._request(prompt, llm_string), _response_of(return_val)
        if response is None:
            self._faces.threads.invalidate(request)
        else:
            self._faces.threads.store(request, response, l1_ttl=self._ttl, l2_ttl=self._ttl, tags=self._tags)

    def clear(self, **kwargs: Any) -> None:  # noqa: ARG002 - the interface's; none of them means anything here
        """Make everything void that was stored through a cache of this namespace, on all hosts."""
        self._faces.threads.invalidate_tag(*self._tags)

    async def alookup(self, prompt: str, llm_string: str) -> RETURN_VAL_TYPE | None:
        """See lookup()."""
        return _generations_of(await self._faces.loops.lookup(self._request(prompt, llm_string)))

    async def aupdate(self, prompt: str, llm_string: str, return_val: RETURN_VAL_TYPE) -> None:
        """See update()."""
        request, response = self._request(prompt, llm_string), _response_of(return_val)
        if response is None:
            await self._faces.loops.invalidate(request)
        else:
            await self._faces.loops.store(request, response, l1_ttl=self._ttl, l2_ttl=self._ttl, tags=self._tags)

    async def aclear(self, **kwargs: Any) -> None:  # noqa: ARG002
        """See clear()."""
        await self._faces.loops.invalidate_tag(*self._tags)

    # ---- life ----

    def close(self) -> None:
        """Send what is queued for Redis, and let go of everything, unless the manager is the caller's own."""
        self._faces.close()

    async def aclose(self) -> None:
        """As close(), from the event loop that used it."""
        await self._faces.aclose()

    def _request(self, prompt: str, llm_string: str) -> CacheableRequest:
        return CacheableRequest("langchain", prompt, parameters={"llm_string": llm_string}, namespace=self._namespace)


# ---- generations as plain data ----


def _response_of(generations: RETURN_VAL_TYPE) -> CachedResponse | None:
    try:
        data = _serializer.dumps([_plain(one) for one in generations])
    except (TypeError, ValueError) as error:
        _log.warning("a LangChain answer is not cached: %s", str(error).partition(":")[0])  # not its advice: no option
        return None
    return CachedResponse("", "langchain", _usage_of(generations), raw=data)


def _generations_of(found: LookupResult) -> RETURN_VAL_TYPE | None:
    if found.response is None:
        return None
    try:
        return [_revived(*fields) for fields in _serializer.loads(found.response.raw)]
    except Exception as error:  # of another version, or damaged: pydantic and the table say so in many ways
        _log.warning("a cached LangChain answer cannot be read: %s", type(error).__name__)
        return None


def _plain(generation: Generation) -> list[Any]:
    """Return the class's name, text, info and message; of a subclass, as the class of langchain-core beneath it."""
    name = next((kind.__name__ for kind in type(generation).__mro__ if kind.__name__ in _GENERATIONS), None)
    if name is None or not isinstance(generation, _GENERATIONS[name]):
        raise TypeError(f"a generation must be one of {', '.join(_GENERATIONS)}, not {type(generation).__name__}")
    if isinstance(generation, ChatGeneration):  # whose text is its message's
        message = generation.message
        return [name, "", generation.generation_info, [message.type, message.model_dump()]]
    return [name, generation.text, generation.generation_info, None]


def _revived(name: str, text: str, info: dict[str, Any] | None, message: list[Any] | None) -> Generation:
    kind = _GENERATIONS[name]
    if not issubclass(kind, ChatGeneration):
        return kind(text=text, generation_info=info)
    assert message is not None
    (revived,) = messages_from_dict([{"type": message[0], "data": message[1]}])
    return kind(message=revived, generation_info=info)


def _usage_of(generations: RETURN_VAL_TYPE) -> TokenUsage | None:
    """Return what an answer cost, where its message says so."""
    for generation in generations:
        message = getattr(generation, "message", None)
        usage = getattr(message, "usage_metadata", None) if isinstance(message, BaseMessage) else None
        if usage:
            return TokenUsage(usage["input_tokens"], usage["output_tokens"], usage["total_tokens"])
    return None
