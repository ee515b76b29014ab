"""The cache behind an adapter or a decorator: one engine with both faces, whether it was given or is made here."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from llm_edge_cache.manager import CacheManager
from llm_edge_cache.settings import L1Config, L2Config, load_settings
from llm_edge_cache.sync_manager import SyncCacheManager

if TYPE_CHECKING:
    from llm_edge_cache.engine import Engine

__all__ = ["Faces"]


class Faces:
    """A cache for code of either kind: from threads, from event loops, or both.

    Args:
        l1: The tier in shared memory.
        l2: The tier in Redis; None: there is none.
        manager: A CacheManager or SyncCacheManager to use instead; it stays open at the end. With neither of the three
            the environment says what to use (`load_settings`), without idle expiry: what was paid for is not
            thrown away because nobody asked for two minutes.

    Raises:
        TypeError: manager is none, or given together with l1 or l2.
        RedisConfigError, SettingsError, SlabError: as from the managers.
    """

    def __init__(
        self,
        l1: L1Config | None = None,
        l2: L2Config | None = None,
        manager: CacheManager | SyncCacheManager | None = None,
    ) -> None:
        self._is_own: Final = manager is None
        if manager is None:
            manager = _new_manager(l1, l2)
        elif l1 is not None or l2 is not None:
            raise TypeError("give a manager, or l1 and l2, not both")
        elif not isinstance(manager, (CacheManager, SyncCacheManager)):
            raise TypeError(f"manager must be a CacheManager or a SyncCacheManager, not {type(manager).__name__}")
        self.engine: Final[Engine] = manager.engine
        self.threads: Final = manager if isinstance(manager, SyncCacheManager) else SyncCacheManager.over(self.engine)
        self.loops: Final = manager if isinstance(manager, CacheManager) else CacheManager.over(self.engine)

    def open(self) -> None:
        """Open the cache in this process, for what does not go through a face: those open it themselves."""
        if not self.engine.is_open:
            self.threads.open()

    async def aopen(self) -> None:
        """As open()."""
        if not self.engine.is_open:
            await self.loops.open()

    def close(self) -> None:
        """Close the cache if it was made here. The slab stays for other processes."""
        if self._is_own:
            self.threads.close()

    async def aclose(self) -> None:
        """As close(), from the event loop that used it."""
        if self._is_own:
            await self.loops.aclose()


def _new_manager(l1: L1Config | None, l2: L2Config | None) -> SyncCacheManager:
    if l1 is None and l2 is None:
        settings = load_settings()
        return SyncCacheManager(dataclasses.replace(settings.l1, tti_seconds=None), settings.l2)
    return SyncCacheManager(l1 or L1Config(), l2)
