"""cachelib's interface over the slab, and with it Flask-Caching's.

    cache = SharedSlabCache("my-app")

    Cache(app, config={"CACHE_TYPE": "llm_edge_cache.adapters.cachelib.factory", "CACHE_ARGS": ["my-app"]})

`factory` serves every version of Flask-Caching; from 2.5 on the class may be named as well.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Mapping
from typing import Any

try:
    from cachelib.base import BaseCache
except ImportError as error:
    raise ImportError("the cachelib adapter needs cachelib: pip install 'llm-edge-cache[cachelib]'") from error

from llm_edge_cache.adapters.objects import ObjectStore, open_slab
from llm_edge_cache.adapters.serializers import Extension, Serializer, serializer_of
from llm_edge_cache.errors import SlabBusyError
from llm_edge_cache.slabconfig import SlabConfig

try:
    from markupsafe import Markup
except ImportError:  # not without Flask
    _EXTENSIONS: tuple[Extension, ...] = ()
else:
    # What Flask-Caching's template tag `cache` stores.
    _EXTENSIONS = (Extension(65, Markup, str.encode, lambda data: Markup(data.decode())),)  # noqa: S704 - it was markup

__all__ = ["SharedSlabCache", "factory"]

Timeout = int | float | dt.timedelta


class SharedSlabCache(BaseCache):
    """A cache in a slab that all processes of the host share.

    Args:
        name: the slab's name.
        default_timeout: seconds, or a timedelta, where set() does not say; 0 = for ever.
        config: of the slab. None takes what is live, and the defaults where nothing is.
        serializer: "msgspec" (also None), "json", "pickle", or an object with dumps() and loads().
        key_prefix: before every key; clear() then deletes those keys only.
        ignore_delete_many_errors: False: delete_many() raises where a stopped process holds the slab up.

    Raises:
        As SharedSlab and `serializer_of`.
    """

    def __init__(
        self,
        name: str,
        *,
        default_timeout: Timeout = 300,
        config: SlabConfig | None = None,
        serializer: Any = None,
        key_prefix: str | None = None,
        ignore_delete_many_errors: bool = True,
    ) -> None:
        super().__init__()
        self.ignore_delete_many_errors = ignore_delete_many_errors  # no argument of cachelib's before 0.16
        self.default_timeout = _seconds(default_timeout)  # type: ignore[assignment] # fractions are welcome here
        self._serializer = serializer
        self._store = ObjectStore(open_slab(name, config), _serializer_of(serializer), key_prefix or "")

    @classmethod
    def factory(cls, app: Any, config: Mapping[str, Any], args: list[Any], kwargs: dict[str, Any]) -> SharedSlabCache:  # noqa: ARG003 - Flask-Caching calls it so
        """Return a cache from Flask-Caching's CACHE_ARGS and CACHE_OPTIONS."""
        return cls(*args, **kwargs)

    @property
    def serializer(self) -> Any:
        """What was given as serializer; another may be put in its place, as Flask-Caching's CACHE_SERIALIZER does."""
        return self._serializer

    @serializer.setter
    def serializer(self, choice: Any) -> None:
        self._store.serializer = _serializer_of(choice)
        self._serializer = choice

    def get(self, key: str) -> Any:
        """Return the value, or None."""
        return self._store.get(key)

    def get_many(self, *keys: str) -> list[Any]:
        """Return the values in the order of the keys, None for what is missing."""
        found = self._store.get_many(keys)
        return [found.get(key) for key in keys]

    def set(self, key: str, value: Any, timeout: Timeout | None = None) -> bool:
        """Store a value; the old one is gone in any case but a busy slab.

        Returns:
            False: it is too large, or the slab is held up by a stopped process.

        Raises:
            TypeError, ValueError: the serializer cannot carry it; the message names the type and the option.
        """
        try:
            return self._store.set(key, value, self._ttl(timeout))
        except SlabBusyError:
            return False

    def set_many(self, mapping: Mapping[str, Any], timeout: Timeout | None = None) -> list[str]:
        """Store several; returns the keys that were stored. If the serializer cannot carry one, none is."""
        try:
            refused = set(self._store.set_many(mapping, self._ttl(timeout)))
        except SlabBusyError:
            return []
        return [key for key in mapping if key not in refused]

    def add(self, key: str, value: Any, timeout: Timeout | None = None) -> bool:
        """Store where there is nothing, atomically across processes; tells whether it did."""
        try:
            return self._store.add(key, value, self._ttl(timeout))
        except SlabBusyError:
            return False

    def delete(self, key: str) -> bool:
        """Tell whether it was there."""
        return self._store.delete(key)

    def delete_many(self, *keys: str) -> list[str]:
        """Delete several; returns those that are not there any more, whether they were or not.

        Raises:
            RuntimeError: some could not be deleted, and ignore_delete_many_errors is False.
        """
        try:
            self._store.delete_many(keys)
        except SlabBusyError as error:
            if not self.ignore_delete_many_errors:
                raise RuntimeError(f"not every key could be deleted: {error}") from error
            return [key for key in keys if not self.has(key)]
        return list(keys)

    def has(self, key: str) -> bool:
        """Tell whether get() would find it."""
        return self._store.has(key)

    def clear(self) -> bool:
        """Empty the slab for all that share it; with a key_prefix, delete the keys that begin with it."""
        self._store.clear()
        return True

    def inc(self, key: str, delta: int = 1) -> int | None:
        """Add to a number, atomically across processes; one that is missing begins at 0 and lives the default timeout.

        Returns:
            The sum; None: the slab has no memory for it, or is held up by a stopped process.

        Raises:
            TypeError: what is there is no number.
        """
        try:
            return self._counted(key, delta)
        except (SlabBusyError, MemoryError):
            return None

    def _counted(self, key: str, delta: int) -> int | None:
        while True:
            with contextlib.suppress(KeyError):
                return self._store.incr(key, delta)  # type: ignore[no-any-return]
            # 1 it is missing  2 another process begins it  3 we add nothing, and count on from what that one began
            if self._store.add(key, delta, self._ttl(None)):
                return delta
            if not self._store.has(key):  # refused
                return None

    def dec(self, key: str, delta: int = 1) -> int | None:
        """Subtract; see inc()."""
        return self.inc(key, -delta)

    def _ttl(self, timeout: Timeout | None) -> float | None:
        seconds = self.default_timeout if timeout is None else _seconds(timeout)
        return None if seconds == 0 else seconds


def _serializer_of(choice: Any) -> Serializer:
    return serializer_of(choice, extensions=_EXTENSIONS)


def _seconds(timeout: Timeout) -> float:
    return timeout.total_seconds() if isinstance(timeout, dt.timedelta) else timeout


def factory(*args: Any, **options: Any) -> SharedSlabCache:
    """Return a cache for Flask-Caching, however it asks: `(app, config, args, kwargs)`, or with them spread out."""
    return SharedSlabCache.factory(*args) if len(args) == 4 else SharedSlabCache(*args, **options)
