"""dogpile.cache's backend over the slab, with a mutex for the whole host.

    region = make_region().configure("llm_edge_cache.slab", arguments={"name": "my-app"})

The mutex is a flight record of the slab (`llm_edge_cache.flight`): it has an owner, a deadline that a thread of the
owner's process moves on, and no place among the entries, so it cannot be evicted. It is free as soon as its owner dies;
an owner that is *stopped* loses it after two seconds. Releasing a mutex that was lost does nothing.

The backend has no serializer of dogpile's kind, whose default unpickles: it takes the objects and applies its own.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

try:
    from dogpile.cache.api import NO_VALUE, CacheBackend, CachedValue, CacheMutex
except ImportError as error:
    raise ImportError("the dogpile adapter needs dogpile.cache: pip install 'llm-edge-cache[dogpile]'") from error

from llm_edge_cache.adapters.objects import MISSING, ObjectStore, open_slab
from llm_edge_cache.adapters.serializers import serializer_of
from llm_edge_cache.errors import SlabError
from llm_edge_cache.flight import Flights, Lead
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["FlightMutex", "SlabBackend"]

_log = logging.getLogger("llm_edge_cache")

_RENEWAL_SECONDS: Final = 0.5  # a quarter of what a flight lasts without
_LOOK_SECONDS: Final = 1.0  # one wait for another's mutex; it ends earlier when that is free
_RETRY_SECONDS: Final = 0.02
_PATIENCE_SECONDS: Final = 5.0
"""How long acquire() tries where there is no record to be had, before it goes ahead without."""


class _Bytes:
    """What a region's own serializer made is kept as it is."""

    tag: Final = b"B"

    def dumps(self, value: bytes, /) -> bytes:
        return value

    def loads(self, data: bytes, /) -> bytes:
        return data


class SlabBackend(CacheBackend):
    """Values by key in a slab that all processes of the host share.

    Args:
        arguments: `name`: the slab's, needed. `config`: a SlabConfig, or a mapping of its fields; None takes what is
            live. `serializer`: "msgspec" (the default), "json", "pickle", or an object with dumps() and loads(); not
            used where the region has one. `slab_expiration_time`: seconds after which a value is gone, more than the
            region's expiration_time; None = until it is evicted. `distributed_lock`: False leaves locking to
            threads of one process. Others are ignored.

    Raises:
        ValueError: there is no name.
        As SharedSlab and `serializer_of`.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        name = arguments.get("name")
        if not name:
            raise ValueError('the backend "llm_edge_cache.slab" needs the argument "name", the name of a slab')
        config = arguments.get("config")
        slab = open_slab(name, SlabConfig(**config) if isinstance(config, Mapping) else config)
        self._objects: Final = ObjectStore(slab, serializer_of(arguments.get("serializer")))
        self._bytes: Final = ObjectStore(slab, _Bytes())
        self._ttl: Final[float | None] = arguments.get("slab_expiration_time")
        self._mutexes: Final = _Mutexes(slab) if arguments.get("distributed_lock", True) else None

    def has_lock_timeout(self) -> bool:
        """A process that is stopped for more than two seconds loses its mutexes."""
        return True

    def get_mutex(self, key: str) -> FlightMutex | None:
        """Return the host's mutex of a key."""
        return None if self._mutexes is None else FlightMutex(self._mutexes, key)

    # ---- objects ----

    def get(self, key: str) -> Any:
        """Return the CachedValue, or NO_VALUE."""
        return _cached_value(self._objects.get(key, MISSING))

    def get_multi(self, keys: Iterable[str]) -> Sequence[Any]:
        """Return them in the order of the keys."""
        keys = list(keys)
        found = self._objects.get_many(keys)
        return [_cached_value(found.get(key, MISSING)) for key in keys]

    def set(self, key: str, value: Any) -> None:
        """Store a CachedValue; the old one is gone in any case.

        Raises:
            TypeError, ValueError: the serializer cannot carry it; the message names the type and the option.
        """
        self._objects.set(key, list(value), self._ttl)

    def set_multi(self, mapping: Mapping[str, Any]) -> None:
        """Store several; if the serializer cannot carry one, none is stored."""
        self._objects.set_many({key: list(value) for key, value in mapping.items()}, self._ttl)

    # ---- bytes of the region's serializer ----

    def get_serialized(self, key: str) -> Any:
        """Return the bytes, or NO_VALUE."""
        return self._bytes.get(key, NO_VALUE)

    def get_serialized_multi(self, keys: Iterable[str]) -> Sequence[Any]:
        """Return them in the order of the keys."""
        keys = list(keys)
        found = self._bytes.get_many(keys)
        return [found.get(key, NO_VALUE) for key in keys]

    def set_serialized(self, key: str, value: bytes) -> None:
        """Store bytes."""
        self._bytes.set(key, value, self._ttl)

    def set_serialized_multi(self, mapping: Mapping[str, bytes]) -> None:
        """Store several."""
        self._bytes.set_many(mapping, self._ttl)

    # ---- both ----

    def delete(self, key: str) -> None:
        """Delete it, if it is there."""
        self._objects.delete(key)

    def delete_multi(self, keys: Iterable[str]) -> None:
        """Delete those that are there."""
        self._objects.delete_many(keys)


def _cached_value(stored: Any) -> Any:
    if isinstance(stored, list) and len(stored) == 2 and isinstance(stored[1], dict) and stored[1].keys() >= _METADATA:
        return CachedValue(*stored)
    return NO_VALUE  # also what comes from elsewhere: another framework's cache in this slab


_METADATA: Final = frozenset({"ct", "v"})


# ---- the mutex ----


class _Mutexes:
    """The mutexes that this process holds in one slab, and the thread that renews them."""

    def __init__(self, slab: SharedSlab) -> None:
        self.slab: Final = slab
        self.start_over()
        _all_mutexes.add(self)

    def start_over(self) -> None:
        """Hold nothing; a forked child's copies are the parent's."""
        self.flights = Flights(self.slab)
        self._lock = threading.Lock()
        self._is_renewing = False

    def renew_from_now_on(self) -> None:
        """See to it that the thread runs; called once a flight is led."""
        with self._lock:
            if not self._is_renewing:
                self._is_renewing = True
                threading.Thread(target=self._run, name="llm-edge-cache-mutexes", daemon=True).start()

    def _run(self) -> None:
        while self._has_work():
            time.sleep(_RENEWAL_SECONDS)
            try:
                self.flights.renew()
            except SlabError as error:
                _log.debug("mutexes were not renewed: %s", error)

    def _has_work(self) -> bool:
        # Under the lock: 1 the thread sees no flight  2 another one is led, whose leader sees the thread run
        # 3 the thread ends, and nobody renews it.
        with self._lock:
            self._is_renewing = self.flights.has_leads()
            return self._is_renewing


_all_mutexes: Final[weakref.WeakSet[_Mutexes]] = weakref.WeakSet()


def _after_fork() -> None:
    for mutexes in list(_all_mutexes):
        mutexes.start_over()


os.register_at_fork(after_in_child=_after_fork)


class FlightMutex(CacheMutex):
    """The mutex of one key, for all threads and processes of the host; not reentrant, released by whichever thread."""

    def __init__(self, mutexes: _Mutexes, key: str) -> None:
        """Made by `SlabBackend.get_mutex`."""
        self._mutexes = mutexes
        # Not the key itself, and no key of the manager's: those are SHA-256, too, of something else.
        self._key = hashlib.sha256(b"dogpile mutex\0" + key.encode("utf-8", "surrogatepass")).hexdigest().encode()
        # Of this process, oldest first. More than one only if one was lost, or there was none to be had; and a forked
        # child has copies of its parent's.
        self._leads: Final[collections.deque[Lead]] = collections.deque()

    def acquire(self, wait: bool = True) -> bool:
        """Take it.

        Args:
            wait: until it is free; else return at once.

        Returns:
            Whether it was taken. Where there is nothing to take (the slab was unlinked, or its flight records are in
            use for five seconds), waiting ends with True all the same: a value that is computed twice does no harm.
        """
        flights = self._mutexes.flights
        me = weakref.ref(self)  # one that is dropped while it is held is renewed no more
        patience = time.monotonic() + _PATIENCE_SECONDS
        while True:
            role = flights.join(self._key, lambda: me() is not None)
            if isinstance(role, Lead):
                if role.is_coordinated or not self._mutexes.slab._follow() or (wait and time.monotonic() > patience):
                    self._leads.append(role)
                    self._mutexes.renew_from_now_on()
                    return True
                flights.end(role)
            if not wait:
                return False
            if isinstance(role, Lead):
                time.sleep(_RETRY_SECONDS)
            else:
                flights.wait(role, _LOOK_SECONDS)
                patience = time.monotonic() + _PATIENCE_SECONDS

    def release(self) -> None:
        """Give it back and wake one that waits.

        Raises:
            RuntimeError: it is not held.
        """
        if not self._leads:
            raise RuntimeError("release of a mutex that is not held")
        while self._leads:
            # Forgotten before it is free: 1 A frees it  2 B, with the same object, takes it  3 A forgets B's.
            lead = self._leads.popleft()
            if self._mutexes.flights.holds(lead):
                self._mutexes.flights.end(lead)
                return

    def locked(self) -> bool:
        """Tell whether anybody holds it; to see, it is taken for a moment, and held for whoever tries just then."""
        role = self._mutexes.flights.join(self._key)
        if not isinstance(role, Lead):
            return True
        self._mutexes.flights.end(role)
        return False
