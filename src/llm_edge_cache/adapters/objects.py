"""Objects under text keys in a slab: what the adapters of general-purpose caches have in common.

A key of more than 1,024 bytes is kept as its SHA-256 behind `HASHED`, and so is every key that begins with the part of
`HASHED` that this package reserves: no hashed key equals a plain one, nor anything of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Final

from llm_edge_cache.adapters.serializers import Serializer
from llm_edge_cache.slab import SharedSlab
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["HASHED", "MISSING", "ObjectStore", "open_slab"]

_log = logging.getLogger("llm_edge_cache")

MISSING: Final = object()
"""What stands for no value; None is one."""
_RESERVED: Final = b"\0llm-edge-cache:"
HASHED: Final = _RESERVED + b"sha256:"
_LONGEST_KEY: Final = 1024
_LONGEST_PREFIX: Final = 512
_LEAST_TTL: Final = 0.001

_opened: dict[tuple[str, SlabConfig | None], SharedSlab] = {}


def open_slab(name: str, config: SlabConfig | None) -> SharedSlab:
    """Return this process's slab of that name, opened once: frameworks make a cache object per thread or request."""
    slab = _opened.get((name, config))
    if slab is None:
        # No lock, which a fork could copy while it is held: two threads may both open it, and one of them is dropped.
        slab = _opened.setdefault((name, config), SharedSlab(name, config))
    return slab


def _is_over(ttl: float | None) -> bool:
    return ttl is not None and ttl <= 0


class ObjectStore:
    """Objects by text keys in one slab.

    A ttl is in seconds; None: no expiry; 0 and less: over at once. What cannot be decoded, of another serializer or
    damaged, is a miss.

    Args:
        slab: where they are kept.
        serializer: how.
        prefix: before every key; at most 512 bytes of UTF-8.

    Raises:
        ValueError: the prefix is too long, or begins as this package's own keys do.
    """

    def __init__(self, slab: SharedSlab, serializer: Serializer, prefix: str = "") -> None:
        self.slab: Final = slab
        self.serializer = serializer
        self._prefix: Final = prefix.encode()
        self._longest: Final = _LONGEST_KEY - len(self._prefix)
        if len(self._prefix) > _LONGEST_PREFIX or self._prefix.startswith(_RESERVED):
            raise ValueError(f"a key prefix is at most 512 bytes and does not begin with {_RESERVED!r}, not {prefix!r}")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the object, or the default."""
        data = self.slab.get(self._name(key))
        if data is None:
            return default
        value = self._load(data)
        return default if value is MISSING else value

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the objects that are there, by key."""
        names = {self._name(key): key for key in keys}
        loaded = {names[name]: self._load(data) for name, data in self.slab.get_many(names).items()}
        return {key: value for key, value in loaded.items() if value is not MISSING}

    def has(self, key: str) -> bool:
        """Tell whether get() would find something."""
        return self.get(key, MISSING) is not MISSING

    def set(self, key: str, value: Any, ttl: float | None) -> bool:
        """Store an object; whatever happens, the old one is gone afterwards.

        Returns:
            False: the slab refused it, too large or no memory.

        Raises:
            TypeError, ValueError, or the serializer's own: it cannot be carried.
        """
        name = self._name(key)
        try:
            data = self._dump(value)
        except Exception:
            self.slab.delete(name)  # an old value is not to be taken for the one that could not be stored
            raise
        if _is_over(ttl):
            self.slab.delete(name)
            return True
        return self.slab.set(name, data, ttl=ttl)

    def set_many(self, mapping: Mapping[str, Any], ttl: float | None) -> list[str]:
        """Store several objects; returns the keys that the slab refused. If one cannot be carried, none is stored."""
        names = {self._name(key): key for key in mapping}
        try:
            dumped = {name: self._dump(mapping[key]) for name, key in names.items()}
        except Exception:
            self.slab.delete_many(names)  # as in set()
            raise
        if _is_over(ttl):
            self.slab.delete_many(names)
            return []
        return [names[name] for name in self.slab.set_many(dumped, ttl=ttl)]

    def add(self, key: str, value: Any, ttl: float | None) -> bool:
        """Store an object where there is none; one that this store cannot read counts as none."""
        name, data = self._name(key), self._dump(value)
        if _is_over(ttl):
            return not self.has(key)
        if self.slab.add(name, data, ttl=ttl):
            return True
        found = self.slab.gets(name)
        if found is None or self._load(found[0]) is not MISSING:
            return False
        return self.slab.cas(name, data, found[1], ttl=ttl)

    def incr(self, key: str, delta: Any) -> Any:
        """Add to a number, atomically across processes, and keep its expiry; returns the sum.

        Raises:
            KeyError: there is none.
            TypeError: what is there, or the delta, is no number.
        """
        name = self._name(key)
        if type(delta) is int:
            with contextlib.suppress(ValueError, OverflowError):  # no int, or beyond 64 bits
                return self.slab.incr(name, delta)
        while True:
            found = self.slab.gets(name)
            value = MISSING if found is None else self._load(found[0])
            if found is None or value is MISSING:
                raise KeyError(key)
            total = value + delta
            # 1 we read the value  2 another sets it with another life  3 we read that life: the version differs, and
            # we start again. (A touch leaves the version: one that comes between these two calls is lost.)
            ttl = self.slab.ttl(name)
            if self.slab.cas(name, self._dump(total), found[1], ttl=None if ttl is None else max(ttl, _LEAST_TTL)):
                return total

    def touch(self, key: str, ttl: float | None) -> bool:
        """Give an object a new life; tells whether it was there."""
        if _is_over(ttl):
            return self.delete(key)
        return self.slab.touch(self._name(key), ttl)

    def delete(self, key: str) -> bool:
        """Tell whether it was there."""
        return self.slab.delete(self._name(key))

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete several."""
        self.slab.delete_many([self._name(key) for key in keys])

    def clear(self) -> None:
        """Delete everything in the slab; with a prefix, everything that begins with it."""
        if not self._prefix:
            self.slab.clear()
            return
        for entry in self.slab.scan(self._prefix):
            self.slab.delete(entry.key)

    def _name(self, key: str) -> bytes:
        name = key.encode("utf-8", "surrogatepass")
        if not 0 < len(name) <= self._longest or name.startswith(_RESERVED):
            name = HASHED + hashlib.sha256(name).digest()
        return self._prefix + name

    def _dump(self, value: Any) -> bytes:
        if type(value) is int and -(1 << 63) <= value < 1 << 63:
            return b"%d" % value
        return self.serializer.tag + self.serializer.dumps(value)

    def _load(self, data: bytes) -> Any:
        try:
            if data[:1] == self.serializer.tag:
                return self.serializer.loads(data[1:])
            if data[:1] in _DIGITS:
                return int(data)
        except Exception as error:  # a pickle may raise whatever it likes
            _log.debug("a value that cannot be decoded is a miss: %s", type(error).__name__)
        return MISSING


_DIGITS: Final = frozenset(b"%c" % one for one in b"-0123456789")
