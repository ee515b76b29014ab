"""Django's cache in the slab: one for all workers of the host.

    CACHES = {
        "default": {
            "BACKEND": "llm_edge_cache.adapters.django.SharedSlabCache",
            "LOCATION": "my-site",  # the slab's name
            "OPTIONS": {"memory_bytes": 256 << 20},
        }
    }

An operation takes microseconds and waits for nobody, so the async methods run it in the event loop, not in a thread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Final

try:
    from django.core.cache.backends.base import (
        DEFAULT_TIMEOUT,
        MEMCACHE_MAX_KEY_LENGTH,
        BaseCache,
        InvalidCacheBackendError,
    )
    from django.utils.module_loading import import_string
    from django.utils.safestring import SafeString
except ImportError as error:
    raise ImportError("the Django adapter needs Django: pip install 'llm-edge-cache[django]'") from error

from llm_edge_cache.adapters.objects import ObjectStore, open_slab
from llm_edge_cache.adapters.serializers import Extension, Serializer, serializer_of
from llm_edge_cache.slabconfig import SlabConfig

__all__ = ["SharedSlabCache"]

# What the template tag `cache` stores, and every rendered template.
_SAFE_STRING: Final = Extension(64, SafeString, str.encode, lambda data: SafeString(data.decode()))

_SLAB_FIELDS: Final = frozenset(field.name for field in dataclasses.fields(SlabConfig))
_DJANGO_FIELDS: Final = frozenset({"MAX_ENTRIES", "CULL_FREQUENCY", "serializer"})


class SharedSlabCache(BaseCache):
    """A cache backend over a slab. Aliases with one LOCATION share one slab.

    Args:
        location: LOCATION, the slab's name.
        params: the rest of the alias: TIMEOUT, VERSION, KEY_PREFIX, KEY_FUNCTION as in Django. OPTIONS: the fields of
            SlabConfig; MAX_ENTRIES, which is max_entries; `serializer`: "msgspec", "json", "pickle", or (the path of)
            a class or object with dumps() and loads(). CULL_FREQUENCY is ignored: the slab evicts one by one.

    Raises:
        InvalidCacheBackendError: LOCATION or an option is not usable. The slab itself is opened at the first use.
    """

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        super().__init__(params)
        options = params.get("OPTIONS", {})
        if not location or not isinstance(location, str):
            raise InvalidCacheBackendError(f"LOCATION must be the name of a slab, not {location!r}")
        self._location = location
        try:
            self._config = _config_of(options)
            self._serializer = _serializer_of(options.get("serializer"))
        except (TypeError, ValueError) as error:
            raise InvalidCacheBackendError(f"OPTIONS of the cache at {location!r}: {error}") from error

    @functools.cached_property
    def _store(self) -> ObjectStore:
        return ObjectStore(open_slab(self._location, self._config), self._serializer)

    def validate_key(self, key: str) -> None:
        """Warn of what memcached would refuse, as all of Django's backends do."""
        if len(key) > MEMCACHE_MAX_KEY_LENGTH or " " in key or not key.isprintable():  # the quick look
            super().validate_key(key)

    def get_backend_timeout(self, timeout: Any = DEFAULT_TIMEOUT) -> float | None:
        """Return seconds; None: no expiry; 0 and less: over at once."""
        return self.default_timeout if timeout is DEFAULT_TIMEOUT else timeout  # type: ignore[no-any-return]

    def add(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Store where there is nothing, atomically across processes; tells whether it did."""
        return self._store.add(
            self.make_and_validate_key(key, version=version), value, self.get_backend_timeout(timeout)
        )

    def get(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """Return the value, or the default."""
        return self._store.get(self.make_and_validate_key(key, version=version), default)

    def set(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """Store a value; the old one is gone in any case.

        Raises:
            TypeError, ValueError: the serializer cannot carry it; the message names the type and the option.
        """
        self._store.set(self.make_and_validate_key(key, version=version), value, self.get_backend_timeout(timeout))

    def touch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give it a new timeout; tells whether it was there."""
        return self._store.touch(self.make_and_validate_key(key, version=version), self.get_backend_timeout(timeout))

    def delete(self, key: str, version: int | None = None) -> bool:
        """Tell whether it was there."""
        return self._store.delete(self.make_and_validate_key(key, version=version))

    def get_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        """Return the values that are there."""
        made = {self.make_and_validate_key(key, version=version): key for key in keys}
        return {made[name]: value for name, value in self._store.get_many(made).items()}

    def set_many(
        self, data: Mapping[str, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[str]:
        """Store several; returns the keys that the slab refused. If the serializer cannot carry one, none is stored."""
        made = {self.make_and_validate_key(key, version=version): key for key in data}
        values = {name: data[key] for name, key in made.items()}
        return [made[name] for name in self._store.set_many(values, self.get_backend_timeout(timeout))]

    def delete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        """Delete several."""
        self._store.delete_many([self.make_and_validate_key(key, version=version) for key in keys])

    def has_key(self, key: str, version: int | None = None) -> bool:
        """Tell whether get() would find it."""
        return self._store.has(self.make_and_validate_key(key, version=version))

    def incr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        """Add to a number, atomically across processes, and keep its timeout; returns the sum.

        Raises:
            ValueError: there is nothing.
            TypeError: what is there is no number.
        """
        try:
            return self._store.incr(self.make_and_validate_key(key, version=version), delta)
        except KeyError:
            raise ValueError(f"Key '{key}' not found") from None

    def clear(self) -> None:
        """Empty the slab, for all aliases and processes that share it."""
        self._store.clear()

    # ---- the same for coroutines; what is not here is made of these by Django ----

    async def aadd(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See add()."""
        return self.add(key, value, timeout, version)

    async def aget(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """See get()."""
        return self.get(key, default, version)

    async def aset(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """See set()."""
        self.set(key, value, timeout, version)

    async def atouch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See touch()."""
        return self.touch(key, timeout, version)

    async def adelete(self, key: str, version: int | None = None) -> bool:
        """See delete()."""
        return self.delete(key, version)

    async def aget_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        """See get_many()."""
        return self.get_many(keys, version)

    async def aset_many(
        self, data: Mapping[str, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[str]:
        """See set_many()."""
        return self.set_many(data, timeout, version)

    async def adelete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        """See delete_many()."""
        self.delete_many(keys, version)

    async def ahas_key(self, key: str, version: int | None = None) -> bool:
        """See has_key()."""
        return self.has_key(key, version)

    async def aincr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        """See incr()."""
        return self.incr(key, delta, version)

    async def aclear(self) -> None:
        """See clear()."""
        self.clear()


def _config_of(options: Mapping[str, Any]) -> SlabConfig | None:
    """Return the slab's configuration; None, to take what is live, where no option speaks of it."""
    unknown = sorted(set(options) - _SLAB_FIELDS - _DJANGO_FIELDS)
    if unknown:
        allowed = ", ".join(sorted(_SLAB_FIELDS | _DJANGO_FIELDS))
        raise ValueError(f"there is no option {unknown[0]!r}; there are {allowed}")
    fields = {name: options[name] for name in _SLAB_FIELDS & set(options)}
    if "MAX_ENTRIES" in options:
        if "max_entries" in fields:
            raise ValueError("MAX_ENTRIES and max_entries are one option: give one of them")
        fields["max_entries"] = options["MAX_ENTRIES"]
    return SlabConfig(**fields) if fields else None


def _serializer_of(choice: Any) -> Serializer:
    """Return the serializer of an option, which may be the path of a class as with Django's Redis backend."""
    if isinstance(choice, str) and "." in choice:
        try:
            choice = import_string(choice)
        except ImportError as error:
            raise ValueError(f"serializer {choice!r} cannot be imported: {error}") from error
    return serializer_of(choice() if isinstance(choice, type) else choice, extensions=(_SAFE_STRING,))
