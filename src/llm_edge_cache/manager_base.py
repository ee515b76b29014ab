"""What both managers have in common: how they are made, and what they tell of the host without asking Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_edge_cache.engine import DEFAULT_L1, Engine
from llm_edge_cache.lookup import MetricsSnapshot
from llm_edge_cache.settings import L1Config, L2Config
from llm_edge_cache.slab import SharedSlab

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ManagerBase"]


class ManagerBase:
    """A face of an engine.

    Args:
        l1: The tier in shared memory. Left out, whatever slab is live under the default name is used.
        l2: The tier in Redis; None: there is none.
        slab: A slab to use in place of the one that l1 names; it stays open at the end.

    Raises:
        RedisConfigError: l2's URL is not usable.
        SlabError: The slab cannot be had; see SharedSlab.
    """

    def __init__(
        self, l1: L1Config = DEFAULT_L1, l2: L2Config | None = None, *, slab: SharedSlab | None = None
    ) -> None:
        self._use(Engine(l1, l2, slab))

    @classmethod
    def over(cls, engine: Engine) -> Self:
        """Return another face of a cache that is open in this process; to close either is to close both."""
        manager = cls.__new__(cls)
        manager._use(engine)
        return manager

    def _use(self, engine: Engine) -> None:
        self._engine = engine
        self._core = engine.core
        self._look = engine.core.look

    @property
    def engine(self) -> Engine:
        """This process's part of the cache, for what is built on it."""
        return self._engine

    @property
    def slab(self) -> SharedSlab:
        """The slab that L1 lives in."""
        return self._engine.slab

    @property
    def has_l2(self) -> bool:
        """Whether there is a Redis behind L1."""
        return self._engine.l2 is not None

    def metrics_snapshot(self) -> MetricsSnapshot:
        """Return the counts of all processes of this host."""
        return self._engine.snapshot()

    def l1_entry_count(self) -> int:
        """Return how many entries L1 holds."""
        return len(self._engine.slab)
