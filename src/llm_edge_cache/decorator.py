"""A function's results in the shared cache: computed once, for all workers of the host, and all hosts.

    @cached(ttl=60)
    def answer(question: str) -> Answer: ...

What is stored is the result in MessagePack, and what comes out is of the type that the annotation says, made anew for
each caller; the caller that computed it gets it from there as well, so nobody can tell the difference. Nothing is
pickled.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import inspect
import itertools
import time
import typing
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar, overload

import msgspec

from llm_edge_cache.callkeys import call_key, name_of
from llm_edge_cache.codec import UNREADABLE, Entry
from llm_edge_cache.core import Begun, Look
from llm_edge_cache.effects import Steps
from llm_edge_cache.errors import CacheError
from llm_edge_cache.faces import Faces
from llm_edge_cache.fetch import FetchOptions
from llm_edge_cache.flight import Lead
from llm_edge_cache.invalidation import Invalidation, tags_of
from llm_edge_cache.manager import CacheManager
from llm_edge_cache.model import CachedResponse
from llm_edge_cache.regions import Counter, Histogram, Word
from llm_edge_cache.settings import load_settings
from llm_edge_cache.sync_manager import SyncCacheManager

if TYPE_CHECKING:
    from typing_extensions import ParamSpec

    _P = ParamSpec("_P")
else:
    from typing import ParamSpec

    _P = ParamSpec("_P")

__all__ = ["CacheInfo", "CachedFunction", "cached"]

_T = TypeVar("_T")
_R_co = TypeVar("_R_co", covariant=True)
Manager = CacheManager | SyncCacheManager

_L1_HITS: Final = int(Counter.L1_HITS)
_L1_TIMES: Final = int(Histogram.L1)
_TIME_SAVED: Final = int(Counter.MICROSECONDS_SAVED)
_CONTACT: Final = int(Word.CONTACT)
_TRIES: Final = 2
_OTHER: Final = object()
"""Stands for a result that is none of this function's."""
_encode: Final = msgspec.msgpack.Encoder().encode


class CacheInfo(NamedTuple):
    """How a function's cache has done."""

    hits: int
    """Calls by this process that found a result."""
    misses: int
    """Calls by this process that did not, but got one: computed by themselves or others."""
    maxsize: int
    """Entries that the slab may hold, of all its users."""
    currsize: int
    """Entries that it holds."""


class CachedFunction(Protocol[_P, _R_co]):
    """What `cached` makes of a function. Of a coroutine function, `invalidate` returns an awaitable too."""

    __wrapped__: Callable[..., Any]

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co:
        """Return the result for these arguments."""

    def invalidate(self, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Make the result for these arguments void, on all hosts."""

    def refresh(self, *args: _P.args, **kwargs: _P.kwargs) -> _R_co:
        """Compute the result for these arguments anew, and store it; others get the old one meanwhile.

        A computation that was under way already may still store its own afterwards.
        """

    def cache_info(self) -> CacheInfo:
        """Return how it has done."""


# ---- what an entry is to a function: Entry, with the result in its place and the rest left out ----


class _KeptResponse(msgspec.Struct, Generic[_T], frozen=True, gc=False):
    raw: _T | None = None


class _Kept(msgspec.Struct, Generic[_T], frozen=True, array_like=True, gc=False):
    response: _KeptResponse[_T]
    expires_at: float | None = None
    generations: dict[str, int] = {}
    microseconds: int = 0
    is_negative: bool = False


class _Results:
    """One function's results: everything but calling it.

    Args:
        function: the function.
        faces: returns the cache at the first call.
        ttl, key, tags, prefix: as of `cached`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        faces: Callable[[], Faces],
        *,
        ttl: float | None,
        key: Callable[..., Any] | None,
        tags: Iterable[str] | Callable[..., Iterable[str]],
        prefix: str | None,
    ) -> None:
        self.name: Final = prefix or name_of(function)
        self.key: Final = call_key(function, self.name, key)
        self._options: Final = FetchOptions(l1_ttl=ttl, l2_ttl=ttl, tags=() if callable(tags) else tags_of(tags))
        self._tags = tags if callable(tags) else None
        self._faces_of = faces
        self.hits: Final = itertools.count()  # counts without a lock
        self.misses: Final = itertools.count()
        kind = _type_of(function)
        self._decode: Final = msgspec.msgpack.Decoder(kind).decode
        self._read: Final = msgspec.msgpack.Decoder(_Kept[kind]).decode  # type: ignore[valid-type]

    @functools.cached_property
    def faces(self) -> Faces:
        """The cache, opened by the first call."""
        return self._faces_of()

    @functools.cached_property
    def look(self) -> Callable[[bytes], Any]:
        """A quick look at L1: returns the result if nothing is to be asked about it, else _OTHER."""
        core, slab = self.faces.engine.core, self.faces.engine.slab
        get, word, record, read, trusted_ns = slab.get, slab._word, slab._record, self._read, core.trusted_ns
        clock, hits = time.monotonic_ns, self.hits

        def look(key: bytes) -> Any:
            start = clock()
            data = get(key)
            if data is None or (trusted_ns and start - word(_CONTACT) > trusted_ns):
                return _OTHER
            try:
                entry = read(data)
            except UNREADABLE:
                return _OTHER
            if entry.generations or entry.is_negative:
                return _OTHER
            # No look at expires_at: no result is kept in L1 for longer than it is valid, since none is served stale.
            record(_L1_HITS, _L1_TIMES, start, _TIME_SAVED, entry.microseconds)
            next(hits)
            return entry.response.raw

        return look

    def options_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FetchOptions:
        """Return how the result of a call is stored."""
        if self._tags is None:
            return self._options
        return msgspec.structs.replace(self._options, tags=tags_of(self._tags(*args, **kwargs)))

    def response_of(self, result: Any) -> CachedResponse:
        """Return what is stored of a result.

        Raises:
            TypeError: it cannot be carried, or is not of the annotated type.
        """
        try:
            data = _encode(result)
            self._decode(data)
        except (TypeError, OverflowError, *UNREADABLE) as error:
            raise TypeError(
                f"{self.name} returned a {type(result).__qualname__}, which cannot be kept as what it is annotated to "
                f"return: {error}"
            ) from None
        return CachedResponse("", "", raw=msgspec.Raw(data))

    def result_of(self, response: CachedResponse | None) -> Any:
        """Return the result that was stored, made anew; _OTHER, if it is not of the annotated type.

        It was of that type when it was stored, by another version of the program.
        """
        if response is None:
            return _OTHER
        try:
            return self._decode(_encode(response.raw))
        except UNREADABLE:
            return _OTHER

    def keep(self, key: bytes, begun: Begun, response: CachedResponse, options: FetchOptions) -> None:
        """Store a result that was computed beside all flights."""
        microseconds = (time.monotonic_ns() - begun.began_ns) // 1000
        self.faces.engine.fetching.keep(Lead(key, -1, 0), begun, Entry(response, microseconds=microseconds), options)

    def invalidation(self, key: bytes) -> Steps[None]:
        """Make a result void."""
        return self.faces.engine.invalidator.invalidate(Invalidation("key", key.decode()))

    def info(self) -> CacheInfo:
        """Return how it has done."""
        slab = self.faces.engine.slab
        return CacheInfo(_count_of(self.hits), _count_of(self.misses), slab.config.max_entries or 0, len(slab))


def _count_of(counter: itertools.count[int]) -> int:
    """Return what the counter would give next, without taking it."""
    return int(repr(counter)[len("count(") : -1])


def _type_of(function: Callable[..., Any]) -> Any:
    """Return the type that a function is annotated to return; Any, where it is not.

    Raises:
        TypeError: the annotation cannot be read, or msgspec does not know such a type.
    """
    function = inspect.unwrap(function)
    annotation = inspect.get_annotations(function).get("return", Any)

    def stub() -> None: ...

    stub.__annotations__ = {"return": annotation}  # the others' may be for type checkers only
    try:
        names = getattr(function, "__globals__", {})
        kind = typing.get_type_hints(stub, globalns=names, include_extras=True)["return"]
        msgspec.msgpack.Decoder(kind)
    except (TypeError, NameError) as error:
        raise TypeError(
            f"{getattr(function, '__qualname__', function)!s} is annotated to return {annotation!r}, "
            f"which cannot be cached: {error}"
        ) from None
    return kind


# ---- the two faces ----


def _of_threads(function: Callable[..., Any], results: _Results) -> Callable[..., Any]:
    key_of = results.key

    look: Callable[[bytes], Any]  # in a cell and not in an object: worth 30 ns of every hit

    def first_look(key: bytes) -> Any:
        nonlocal look
        look = results.look  # opens the cache
        return look(key)

    look = first_look

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        key = key_of(args, kwargs)
        result = look(key)
        return _find(function, results, key, args, kwargs, refresh) if result is _OTHER else result

    def refresh(*args: Any, **kwargs: Any) -> Any:
        key, options = key_of(args, kwargs), results.options_of(args, kwargs)
        results.faces.open()
        begun = results.faces.engine.core.begin(key)
        result = function(*args, **kwargs)
        try:
            response = results.response_of(result)
        except TypeError:
            invalidate(*args, **kwargs)  # an old result is not to be taken for the one that could not be stored
            raise
        results.keep(key, begun, response, options)
        return results.result_of(response)

    def invalidate(*args: Any, **kwargs: Any) -> None:
        results.faces.threads.perform(results.invalidation(key_of(args, kwargs)))

    return _with(call, refresh, invalidate, results)


def _find(  # noqa: PLR0917
    function: Callable[..., Any], results: _Results, key: bytes, args: Any, kwargs: Any, refresh: Callable[..., Any]
) -> Any:
    threads, options = results.faces.threads, results.options_of(args, kwargs)
    for _ in range(_TRIES):
        found: Any = results.faces.engine.core.look(key)
        count = results.misses if isinstance(found, Look) else results.hits
        if isinstance(found, Look):
            found = threads.fetch(found, lambda: results.response_of(function(*args, **kwargs)), options, None)
        result = results.result_of(found and found.response)
        if result is not _OTHER:
            next(count)
            return result
        threads.perform(results.invalidation(key))
    return refresh(*args, **kwargs)


def _of_loops(function: Callable[..., Any], results: _Results) -> Callable[..., Any]:
    key_of = results.key

    look: Callable[[bytes], Any]  # in a cell and not in an object: worth 30 ns of every hit

    def first_look(key: bytes) -> Any:
        nonlocal look
        look = results.look  # opens the cache
        return look(key)

    look = first_look

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        key = key_of(args, kwargs)
        result = look(key)
        return await _find_async(function, results, key, args, kwargs, refresh) if result is _OTHER else result

    async def refresh(*args: Any, **kwargs: Any) -> Any:
        key, options = key_of(args, kwargs), results.options_of(args, kwargs)
        await results.faces.aopen()
        begun = results.faces.engine.core.begin(key)
        result = await function(*args, **kwargs)
        try:
            response = results.response_of(result)
        except TypeError:
            await invalidate(*args, **kwargs)
            raise
        results.keep(key, begun, response, options)
        return results.result_of(response)

    async def invalidate(*args: Any, **kwargs: Any) -> None:
        await results.faces.loops.perform(results.invalidation(key_of(args, kwargs)))

    return _with(call, refresh, invalidate, results)


async def _find_async(  # noqa: PLR0917
    function: Callable[..., Any], results: _Results, key: bytes, args: Any, kwargs: Any, refresh: Callable[..., Any]
) -> Any:
    loops, options = results.faces.loops, results.options_of(args, kwargs)

    async def compute() -> CachedResponse:
        return results.response_of(await function(*args, **kwargs))

    for _ in range(_TRIES):
        found: Any = results.faces.engine.core.look(key)
        count = results.misses if isinstance(found, Look) else results.hits
        if isinstance(found, Look):
            found = await loops.fetch(found, compute, options, None)
        result = results.result_of(found and found.response)
        if result is not _OTHER:
            next(count)
            return result
        await loops.perform(results.invalidation(key))
    return await refresh(*args, **kwargs)


def _with(call: Any, refresh: Any, invalidate: Any, results: _Results) -> Callable[..., Any]:
    call.refresh, call.invalidate, call.cache_info = refresh, invalidate, results.info
    return call  # type: ignore[no-any-return]


# ---- which cache ----

_named: Final[dict[str | None, Faces]] = {}


def _faces_of(name: str | None, manager: Manager | Callable[[], Manager] | None) -> Faces:
    if manager is not None:
        return Faces(manager=manager() if callable(manager) else manager)
    faces = _named.get(name)
    if faces is None:
        # No lock, which a fork could copy while it is held: two threads may both open it, and one of them is dropped.
        settings = load_settings()
        l1 = dataclasses.replace(settings.l1, name=name or settings.l1.name, tti_seconds=None)
        made = Faces(l1, settings.l2)
        faces = _named.setdefault(name, made)
        if faces is not made:
            made.close()
    return faces


@atexit.register
def _close() -> None:
    """Send what is queued for Redis."""
    while _named:
        with contextlib.suppress(CacheError):
            _named.popitem()[1].close()


# ---- the decorator ----


@overload
def cached(function: Callable[_P, _R_co], /) -> CachedFunction[_P, _R_co]: ...


@overload
def cached(
    *,
    ttl: float | None = None,
    key: Callable[..., Any] | None = None,
    tags: Iterable[str] | Callable[..., Iterable[str]] = (),
    prefix: str | None = None,
    name: str | None = None,
    manager: Manager | Callable[[], Manager] | None = None,
) -> Callable[[Callable[_P, _R_co]], CachedFunction[_P, _R_co]]: ...


def cached(
    function: Callable[..., Any] | None = None,
    /,
    *,
    ttl: float | None = None,
    key: Callable[..., Any] | None = None,
    tags: Iterable[str] | Callable[..., Iterable[str]] = (),
    prefix: str | None = None,
    name: str | None = None,
    manager: Manager | Callable[[], Manager] | None = None,
) -> Any:
    """Keep a function's results in the shared cache; for functions and coroutine functions.

    The function has `invalidate(...)`, `refresh(...)` and `cache_info()` afterwards (`CachedFunction`), and is called
    at most once for the same arguments, whoever asks meanwhile on any worker or host. What it raises reaches the
    callers that wait in its process; those in others get a ComputeError. Nothing is stored then.

    Args:
        function: The function; its annotation says what it returns, a type that msgspec knows. Without one, plain data
            comes out: dicts, lists (also for tuples), numbers, texts, bytes, None.
        ttl: Seconds for which a result is kept, in both tiers; None: those of the tiers.
        key: Called with a call's arguments; what it returns stands for them. None: the arguments stand for themselves,
            every one of them, so a method needs a `key` that leaves `self` out.
        tags: What `invalidate_tag()` of the manager may make results void by; or called with a call's arguments.
        prefix: What stands for the function; another one after a change makes old results unknown. None: its module
            and qualified name. Functions that are made by one function share it, whatever they close over.
        name: The slab's name, in place of the one that the environment says.
        manager: A CacheManager or SyncCacheManager to use, or what returns one at the first call. Neither name nor
            manager: the environment says what to use (`load_settings`).

    Raises:
        TypeError: An argument is of a wrong type, the annotated type is none that msgspec knows, or it is a generator.
        ValueError: The ttl is none, or the function has no name.

    A call raises TypeError where an argument cannot be part of a key, or the result is not of the annotated type.
    """
    if name is not None and manager is not None:
        raise TypeError("give a name or a manager, not both")

    def decorate(function: Any) -> Callable[..., Any]:
        if not callable(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"cached needs a function or a coroutine function, not {function!r}")
        faces = functools.partial(_faces_of, name, manager)
        results = _Results(function, faces, ttl=ttl, key=key, tags=tags, prefix=prefix)
        make = _of_loops if inspect.iscoroutinefunction(function) else _of_threads
        return make(function, results)

    return decorate if function is None else decorate(function)
