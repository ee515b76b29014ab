"""SharedSlab: the L1 store that all processes of a host share. The operations are native; this file adds their life."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from llm_edge_cache import naming, segment
from llm_edge_cache.errors import SlabBusyError, SlabClosedError, SlabError
from llm_edge_cache.native import native
from llm_edge_cache.slabconfig import DEFAULT, EntryInfo, SlabConfig, SlabStats

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

__all__ = ["SharedSlab", "list_slabs"]

_log = logging.getLogger("llm_edge_cache")
_SCAN_BUCKETS = 64  # looked at in one native call, with the GIL held

native.configure(DEFAULT, SlabClosedError, SlabBusyError)


class SharedSlab(native.SlabBase):
    """A key-value store in shared memory, one per name, user and host.

    May be used from many threads, survives `fork`, and is picklable: it attaches by name in the receiver. Never holds
    a lock between two calls. Closing, and the end of the process, leave the slab as it is: it is the warm cache of the
    host until `unlink` or reboot. When it is replaced or unlinked, every process attaches again by name at its next
    operation; while there is no successor, reads miss and writes are refused.

    Keys are 1 to 1,024 bytes; keys and values are bytes-like in, bytes out. Operations raise SlabClosedError after
    close().
    """

    __slots__ = ("__weakref__", "_config", "_place", "_segment")

    _segment: segment.Segment | None  # None once closed
    _place: naming.Place  # where it was found last
    _config: SlabConfig  # of the segment held last

    def __init__(
        self, name: str, config: SlabConfig | None = None, *, replace: bool = False, shrink: bool = False
    ) -> None:
        """Create the slab, or attach to the live one of that name; free of races, whoever comes first.

        Args:
            name: 1 to 1,024 bytes of text.
            config: what the slab must be. None takes what is live, and the defaults where nothing is. One that differs
                from the live slab's replaces it if no live process is attached to that.
            replace: retire what is live and start a new one; attached processes move over at their next operation.
            shrink: where there is too little shared memory, create a smaller slab and emit a RuntimeWarning; likewise
                accept a live one that is smaller.

        Raises:
            SlabConfigError: the live slab differs, and processes are attached to it.
            SlabMemoryError: too little shared memory; the message says how much is needed and what to do.
            SlabPermissionError: a file of another user, or one open to others, lies under the name.
            SlabVersionError: a segment of another layout lies under the name.
            SlabBusyError: a process was stopped while it opened the same slab.
            TypeError, ValueError: the name or the configuration is none.
        """
        if config is not None and not isinstance(config, SlabConfig):
            raise TypeError(f"config must be a SlabConfig or None, not {type(config).__name__}")
        place = naming.place_of(name, naming.current_owner())
        self._adopt(segment.open_or_create(place, config, replace=replace, shrink=shrink))

    @classmethod
    def attach(cls, name: str) -> Self:
        """Attach to the live slab of that name.

        Raises:
            SlabNotFoundError: there is none; the message says which there are.
            As the constructor otherwise.
        """
        return cls._attach(naming.place_of(name, naming.current_owner()))

    @staticmethod
    def exists(name: str) -> bool:
        """Tell whether a slab of that name is live."""
        return segment.is_live(naming.place_of(name, naming.current_owner()))

    @property
    def name(self) -> str:
        """The slab's name."""
        return self._place.name

    @property
    def config(self) -> SlabConfig:
        """The live slab's configuration; nothing in it is left to be derived."""
        if not self.closed:
            self._follow()
        return self._config

    def scan(self, prefix: Buffer = b"") -> Iterator[EntryInfo]:
        """Iterate over the entries whose keys begin with a prefix.

        Weakly consistent: an entry that is there all the time is seen, one that comes, goes or moves meanwhile may be
        seen, missed, or seen twice. Holds nothing up.
        """
        with memoryview(prefix) as view:
            return self._scan(view.tobytes())

    def stats(self) -> SlabStats:
        """Return the sums over all processes that ever attached to the live slab."""
        is_live = self._follow()
        totals = self._mapping.totals()
        if not is_live:  # nothing can be read any more
            totals.update(entries=0, payload_bytes=0, used_bytes=0)
        config = self._config
        return SlabStats(
            max_entries=config.max_entries or 0,
            memory_bytes=config.memory_bytes,
            created_at=totals["created_wall_ns"] / 1e9,
            **{field: totals[field] for field in _COUNTED},
        )

    def chown(self, uid: int, gid: int) -> None:
        """Hand the slab to another user, whose processes then find it under its name.

        For a master that starts as root and drops to that user. This object, and the others of this process and its
        forks, go on with it. Where that user has a live slab of this name already, this object moves over to that one.

        Raises:
            SlabPermissionError: this process may not give files away.
        """
        held = self._held()
        self._adopt(segment.hand_over(held, naming.Owner(uid, gid)))

    def close(self) -> None:
        """Let go of the slab, which stays. Calls under way in other threads end first; closing again does nothing."""
        with segment.process_lock():
            self._segment = None
            self._bind(None)

    def unlink(self) -> None:
        """Retire what is live under the name and free its memory: every process misses now. Also once closed."""
        segment.unlink(self._place)

    def __enter__(self) -> Self:
        """Return this slab."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __repr__(self) -> str:
        """Show name and state."""
        return f"<{type(self).__name__} {self.name!r}{', closed' if self.closed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the name; the receiver attaches, and raises SlabNotFoundError where nothing is live."""
        return (_attach_as, (type(self), *self._place[:2]))

    # ---- the segment behind it ----

    @classmethod
    def _attach(cls, place: naming.Place) -> Self:
        slab = cls.__new__(cls)
        slab._adopt(segment.attach(place))
        return slab

    def _adopt(self, found: segment.Segment) -> None:
        self._segment = found
        self._place = found.place
        self._config = found.config
        self._bind(found.mapping)

    def _held(self) -> segment.Segment:
        if self._segment is None:
            raise SlabClosedError("the slab is closed")
        return self._segment

    def _follow(self) -> bool:
        """Move over to the successor of a retired segment. Returns whether the segment is live now."""
        return not self._mapping.retired or self._reattach()

    def _reattach(self) -> bool:
        """Attach again by name; the native operations call this when they meet a retired segment.

        Returns:
            True to try again (also when closed meanwhile: the next try says so), False when there is no successor.
        """
        with segment.process_lock():
            if self._segment is None:
                return True
            try:
                found = segment.successor(self._segment.place)
            except (SlabError, OSError) as error:
                _log.debug("slab %r was retired, and its successor cannot be attached: %s", self.name, error)
                return False
            if found is not None:
                self._adopt(found)
            return found is not None

    def _scan(self, prefix: bytes) -> Iterator[EntryInfo]:
        cursor = 0
        while cursor != _SCAN_END:
            cursor, rows = self._scan_step(cursor, _SCAN_BUCKETS, prefix)
            for row in rows:
                yield EntryInfo(*row)


_SCAN_END = (1 << 64) - 1
_COUNTED = tuple(
    field for field in SlabStats.__struct_fields__ if field not in ("max_entries", "memory_bytes", "created_at")
)


def _attach_as(cls: type[SharedSlab], name: str, owner: tuple[int, int]) -> SharedSlab:
    return cls._attach(naming.place_of(name, naming.Owner(*owner)))


def list_slabs() -> list[str]:
    """Return the names of this user's live slabs on this host, sorted."""
    return segment.live_names(naming.current_owner())
