"""The life of a slab's segment: created, attached to, retired and unlinked, each under the lock of its name.

One rule carries the rest: at no time do two processes of one host and one ABI serve different slabs under one name. So
whoever takes a live segment's name away *retires* the segment first: a word that every operation reads anyway tells all
attached processes to come here again, and they find the successor, or none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from llm_edge_cache import naming
from llm_edge_cache.errors import (
    SlabConfigError,
    SlabMemoryError,
    SlabNotFoundError,
    SlabPermissionError,
    SlabVersionError,
)
from llm_edge_cache.memory import SlabMemory, available_bytes, require_available
from llm_edge_cache.namelock import hold, open_trusted
from llm_edge_cache.naming import LOCK_SUFFIX, PREFIX, Owner, Place
from llm_edge_cache.native import native
from llm_edge_cache.slabconfig import MiB, SlabConfig

if TYPE_CHECKING:
    from llm_edge_cache._native import Mapping

__all__ = [
    "Segment",
    "attach",
    "hand_over",
    "is_live",
    "live_names",
    "open_or_create",
    "process_lock",
    "successor",
    "unlink",
]

_log = logging.getLogger("llm_edge_cache")

REPLACED: Final = 1  # reasons in the retired word, for whoever looks into a segment
UNLINKED: Final = 2

_SHRINK_SPARES: Final = MiB  # of what is available, left to others by shrink=True


class Segment:
    """A live segment as this process has it: one per process and segment, shared by its slab objects.

    It goes, and gives this process's record back, when the last slab object and the last operation let go of it.
    """

    __slots__ = ("__weakref__", "config", "mapping", "memory", "place")

    def __init__(self, place: Place, memory: SlabMemory, mapping: Mapping) -> None:
        """Hold what `attach` found; only this module makes one."""
        self.place = place
        self.memory = memory
        self.mapping = mapping
        self.config = SlabConfig.from_native(mapping.config)

    def is_live(self) -> bool:
        """Tell whether the name still leads here."""
        return not self.mapping.retired and self.memory.is_current()


class _Registry:
    """The segments of this process, by path."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.segments: weakref.WeakValueDictionary[str, Segment] = weakref.WeakValueDictionary()

    def after_fork(self) -> None:
        """A lock that another thread of the parent held would stay locked for ever."""
        self.lock = threading.RLock()


_registry = _Registry()
os.register_at_fork(after_in_child=_registry.after_fork)


def process_lock() -> threading.RLock:
    """Return the lock under which a slab object of this process changes its segment."""
    return _registry.lock


@contextlib.contextmanager
def _exclusive(place: Place) -> Iterator[None]:
    with _registry.lock, hold(place):
        yield


def open_or_create(place: Place, config: SlabConfig | None, *, replace: bool, shrink: bool) -> Segment:
    """Attach to the live segment, or create it.

    Args:
        place: where.
        config: what it must be; None takes what is live, else the defaults.
        replace: retire what is live.
        shrink: where shared memory is too small, create a smaller one and warn.

    Raises:
        SlabConfigError: what is live differs, and live processes are attached to it.
        SlabMemoryError, SlabPermissionError, SlabVersionError, SlabBusyError: as they say.
    """
    with _exclusive(place):
        live = _live_or_outdated(place, config, replace=replace, shrink=shrink)
        return live if live is not None else _create(place, config or SlabConfig(), shrink=shrink)


def attach(place: Place) -> Segment:
    """Attach to the live segment.

    Raises:
        SlabNotFoundError: there is none; the message says which there are.
        SlabPermissionError, SlabVersionError, SlabBusyError: as they say.
    """
    found = successor(place)
    if found is None:
        names = live_names(place.owner)
        there_are = "live are " + ", ".join(map(repr, names)) if names else "no slab of this user is live on this host"
        raise SlabNotFoundError(f"there is no live slab {place.name!r}; {there_are}")
    return found


def successor(place: Place) -> Segment | None:
    """Attach to what is live under the name now; None when nothing is."""
    if not os.path.lexists(place.segment):
        return None
    with _exclusive(place):
        return _live(place)


def unlink(place: Place) -> bool:
    """Retire what is live under the name and take it away. Returns whether there was anything."""
    if not os.path.lexists(place.segment):
        return False
    with _exclusive(place):
        live = _live_of_this_layout(place)
        if live is None:
            _discard(place)
            return False
        _retire(live, UNLINKED)
        return True


def hand_over(segment: Segment, owner: Owner) -> Segment:
    """Give a segment to another user, whose processes then find it under the same name.

    Where that user has a live one under the name already (a warm one of an earlier master), this one is retired and
    that one is taken.

    Raises:
        SlabPermissionError: this process may not give files away.
    """
    place = naming.place_of(segment.place.name, owner)
    if place.segment == segment.place.segment:
        return segment
    with _exclusive(segment.place), _exclusive(place):
        warm = _live(place)
        if warm is not None:
            _retire(segment, REPLACED)
            return warm
        segment.memory.hand_to(owner.uid, owner.gid)
        os.rename(segment.place.segment, place.segment)
        return _moved(segment, place)


def live_names(owner: Owner) -> list[str]:
    """Return the names of the live slabs that this process could attach to, sorted."""
    files = (file for file in os.listdir(naming.DIRECTORY) if file.startswith(PREFIX) and file.endswith(LOCK_SUFFIX))
    names = (_read_name(f"{naming.DIRECTORY}/{file}", owner) for file in files)
    return sorted(name for name in names if name is not None and is_live(naming.place_of(name, owner)))


def is_live(place: Place) -> bool:
    """Tell whether a live segment lies there."""
    try:
        memory = SlabMemory.open(place)
    except SlabPermissionError:
        return False
    if memory is None:
        return False
    state, _ = _judge(memory)
    memory.close()
    return state == "live"


def _read_name(lock: str, owner: Owner) -> str | None:
    """The slab's name that a lock file remembers, if the file lies where that name belongs."""
    try:
        file = open_trusted(lock, owner)
    except (SlabPermissionError, OSError):
        return None
    try:
        name = os.pread(file, 4096, 0).decode()
        return name if naming.place_of(name, owner).lock == lock else None
    except ValueError:  # not text, or no slab's name
        return None
    finally:
        os.close(file)


# ---- under the name's lock ----


def _live_or_outdated(place: Place, config: SlabConfig | None, *, replace: bool, shrink: bool) -> Segment | None:
    """What is live, if it is what is asked for; None when nothing is, or after it was retired because it is not."""
    in_use_here = _registry.segments.get(place.segment) is not None
    live = _live_of_this_layout(place) if replace else _live(place)
    if live is None:
        return None
    differences = _differences(live, config, shrink)
    if not replace and not differences:
        return live
    attached = live.mapping.attached()
    if not replace and (in_use_here or attached > 1):
        raise SlabConfigError(_conflict(live, config, differences, attached))
    if not shrink:
        # What attached processes map stays taken until they come here.
        released = 0 if in_use_here or attached > 1 else live.memory.size
        require_available(place.name, (config or SlabConfig()).memory_bytes, released)
    _retire(live, REPLACED)
    return None


def _conflict(live: Segment, config: SlabConfig | None, differences: list[str], attached: int) -> str:
    fields = ", ".join(
        f"{field} is {getattr(live.config, field)!r}, asked for {getattr(config, field)!r}" for field in differences
    )
    return (
        f"slab {live.place.name!r} is live with another configuration, and in use by {attached} process(es): {fields}. "
        "Pass config=None to take it as it is, the same configuration to share it, or replace=True to start a new one"
    )


def _live_of_this_layout(place: Place) -> Segment | None:
    try:
        return _live(place)
    except SlabVersionError:
        return None


def _live(place: Place) -> Segment | None:
    """What is live under the name, as this process's one Segment of it."""
    known = _registry.segments.get(place.segment)
    if known is not None:
        if known.is_live():
            return known
        # Somebody removed the file behind our back, or replaced it: who still has it must not go on beside a new one.
        if not known.memory.is_linked():
            known.mapping.retire(UNLINKED)
    memory = SlabMemory.open(place)
    return None if memory is None else _attach(place, memory)


def _attach(place: Place, memory: SlabMemory) -> Segment | None:
    state, version = _judge(memory)
    if state == "foreign" and version not in (0, native.LAYOUT_VERSION):
        memory.close()
        raise SlabVersionError(
            f"{place.segment} has layout version {version}, this is {native.LAYOUT_VERSION}: "
            f"unlink slab {place.name!r} with the version that made it, or remove the file"
        )
    if state != "live":
        memory.close()
        return None
    segment = Segment(place, memory, native.attach(memory, _boot_id()))
    _registry.segments[place.segment] = segment
    return segment


def _judge(memory: SlabMemory) -> tuple[str, int]:
    """Say what a segment is: "live", "retired" or "foreign"; and of which layout version, 0 = it has none."""
    state, version, config = native.probe(memory.view, _boot_id())
    if state == "live":
        try:
            SlabConfig.from_native(config)
        except ValueError:  # no slab was made with that
            return "foreign", version
    return state, version


def _create(place: Place, config: SlabConfig, *, shrink: bool) -> Segment:
    _discard(place)
    memory, config = _make_memory(place, config, shrink=shrink)
    try:
        native.create(
            memory.view,
            config.to_native(),
            _boot_id(),
            time.clock_gettime_ns(time.CLOCK_MONOTONIC),
            time.time_ns(),
            os.urandom(24),
        )
        segment = Segment(place, memory, native.attach(memory, _boot_id()))
    except BaseException:
        memory.unlink()
        memory.close()
        raise
    _registry.segments[place.segment] = segment
    return segment


def _make_memory(place: Place, config: SlabConfig, *, shrink: bool) -> tuple[SlabMemory, SlabConfig]:
    try:
        return SlabMemory.create(place, config.memory_bytes), config
    except SlabMemoryError as error:
        smaller = _smaller(config) if shrink else None
        if smaller is None:
            raise
        warnings.warn(f"{error}. Created with {smaller.memory_bytes} bytes", RuntimeWarning, stacklevel=2)
        return SlabMemory.create(place, smaller.memory_bytes), smaller


def _smaller(config: SlabConfig) -> SlabConfig | None:
    """The configuration in the memory that there is; None when no slab fits there."""
    size = ((available_bytes() or 0) - _SHRINK_SPARES) // MiB * MiB
    try:
        return config.with_memory(min(size, config.memory_bytes))
    except ValueError:
        return None


def _discard(place: Place) -> None:
    """Take away whatever file lies there: retired, half made by a process that was killed, or garbage."""
    try:
        memory = SlabMemory.open(place)
    except OSError:
        memory = None
    if memory is not None:
        _log.warning("slab %r: %s was no live segment and is removed", place.name, place.segment)
        native.condemn(memory.view)
        memory.close()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place.segment)


def _retire(segment: Segment, reason: int) -> None:
    segment.mapping.retire(reason)
    segment.memory.unlink()
    _registry.segments.pop(segment.place.segment, None)


def _moved(segment: Segment, place: Place) -> Segment:
    _registry.segments.pop(segment.place.segment, None)
    segment.place = place
    segment.memory.move(place)
    _registry.segments[place.segment] = segment
    return segment


def _differences(live: Segment, config: SlabConfig | None, shrink: bool) -> list[str]:
    if config is None:
        return []
    if shrink and live.config.memory_bytes < config.memory_bytes:
        config = config.with_memory(live.config.memory_bytes)
    return live.config.differences(config)


_boot: bytes | None = None


def _boot_id() -> bytes:
    """Which boot this is: after another one, clock readings and process identities mean nothing."""
    global _boot  # noqa: PLW0603 - a constant of the host, read once
    if _boot is None:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            _boot = uuid.UUID(file.read().strip()).bytes
    return _boot
