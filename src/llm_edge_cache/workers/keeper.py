"""A master's hold on the slab: it creates the slab, hands it over, reaps after dead workers, and serves nothing."""

from __future__ import annotations

import os

from llm_edge_cache import SharedSlab
from llm_edge_cache.naming import set_owner
from llm_edge_cache.settings import SlabSettings

__all__ = ["SlabKeeper"]


class SlabKeeper:
    """The slab as a master process holds it. Not for several threads."""

    def __init__(self) -> None:
        self._slab: SharedSlab | None = None  # None: not opened yet, or closed

    @property
    def is_open(self) -> bool:
        """Tell whether a slab is held."""
        return self._slab is not None

    def open(self, settings: SlabSettings, uid: int, gid: int) -> None:
        """Create the slab, or attach to the live one, for the processes of a user.

        Free what workers of an earlier master left unfinished.

        Args:
            settings: name and configuration.
            uid: user that the workers run as.
            gid: group that the workers run as.

        Raises:
            SlabError: the slab cannot be had; the handle held before, if any, is held still.
        """
        if uid != os.geteuid():
            set_owner(uid, gid)
        slab = SharedSlab(settings.name, settings.config)
        self.close()
        self._slab = slab
        self.reap()

    def reap(self) -> None:
        """Free the memory that dead processes had reserved for values they were writing."""
        if self._slab is not None:
            self._slab.reap()

    def close(self) -> None:
        """Let go of the slab. It stays: the next master, and every worker, finds it warm."""
        slab, self._slab = self._slab, None
        if slab is not None:
            slab.close()
