"""Django's cache in the slab: what Django's own tests ask of a backend, and what only a shared one has to hold."""

from __future__ import annotations

import asyncio
import datetime as dt
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from django.conf import settings
from django.contrib.sessions.backends.cache import SessionStore
from django.core.cache import CacheHandler
from django.core.cache.backends.base import CacheKeyWarning, InvalidCacheBackendError
from django.http import HttpRequest, HttpResponse
from django.template import engines
from django.test import RequestFactory, override_settings
from django.utils.safestring import SafeString, mark_safe
from django.views.decorators.cache import cache_page

from llm_edge_cache import SharedSlab
from llm_edge_cache.adapters.django import SharedSlabCache

BACKEND = "llm_edge_cache.adapters.django.SharedSlabCache"
SMALL = {"memory_bytes": 4 << 20}

if not settings.configured:
    settings.configure(
        SECRET_KEY="of tests",
        USE_TZ=True,
        ALLOWED_HOSTS=["testserver"],
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
        SESSION_ENGINE="django.contrib.sessions.backends.cache",
    )
    django.setup()


def make(name: str, **params: Any) -> SharedSlabCache:
    return SharedSlabCache(name, {**params, "OPTIONS": {**SMALL, **params.get("OPTIONS", {})}})


def slab_of(cache: SharedSlabCache) -> SharedSlab:
    return cache._store.slab


@pytest.fixture(params=["msgspec", "pickle"])
def cache(request: pytest.FixtureRequest, name: str) -> SharedSlabCache:
    return make(name, OPTIONS={"serializer": request.param})


@pytest.fixture
def configured(name: str) -> Iterator[Callable[..., Any]]:
    """Make the alias "default" of Django's settings a cache in the slab."""
    contexts = []

    def configure(**options: Any) -> Any:
        caches = {"default": {"BACKEND": BACKEND, "LOCATION": name, "OPTIONS": {**SMALL, **options}}}
        contexts.append(override_settings(CACHES=caches))
        contexts[-1].enable()

    yield configure
    for context in reversed(contexts):
        context.disable()


# ---- the operations ----


def test_a_value_is_set_got_and_deleted(cache: SharedSlabCache) -> None:
    assert cache.get("k") is None
    assert cache.get("k", "default") == "default"
    cache.set("k", {"a": [1, None]})
    assert cache.get("k") == {"a": [1, None]}
    assert cache.has_key("k")
    assert "k" in cache
    assert cache.delete("k") is True
    assert cache.delete("k") is False
    assert "k" not in cache


def test_none_is_a_value(cache: SharedSlabCache) -> None:
    cache.set("k", None)
    assert cache.get("k", "default") is None
    assert cache.has_key("k")
    assert cache.add("k", 1) is False
    assert cache.get_or_set("k", 1) is None


def test_add_stores_where_nothing_is(cache: SharedSlabCache) -> None:
    assert cache.add("k", "first") is True
    assert cache.add("k", "second") is False
    assert cache.get("k") == "first"


def test_many_at_once(cache: SharedSlabCache) -> None:
    assert cache.set_many({"a": 1, "b": "2", "c": [3]}) == []
    assert cache.get_many(iter(["a", "b", "d"])) == {"a": 1, "b": "2"}
    cache.delete_many(iter(["a", "b"]))
    assert cache.get_many(["a", "b", "c"]) == {"c": [3]}


def test_set_many_names_what_the_slab_refused(cache: SharedSlabCache) -> None:
    assert cache.set_many({"large": "x" * (5 << 20), "small": 1}) == ["large"]
    assert cache.get_many(["large", "small"]) == {"small": 1}


def test_get_or_set_calls_what_can_be_called_once(cache: SharedSlabCache) -> None:
    calls: list[int] = []
    for _ in range(2):
        assert cache.get_or_set("k", lambda: calls.append(1) or "computed") == "computed"
    assert calls == [1]


def test_counting(cache: SharedSlabCache) -> None:
    cache.set("n", 41)
    assert cache.incr("n") == 42
    assert cache.decr("n", 2) == 40
    assert cache.incr("n", -40) == 0
    assert cache.get("n") == 0


@pytest.mark.parametrize("method", ["incr", "decr", "incr_version"])
def test_counting_what_is_missing_is_a_value_error(cache: SharedSlabCache, method: str) -> None:
    with pytest.raises(ValueError, match="Key 'k' not found"):
        getattr(cache, method)("k")


def test_counting_what_is_no_number_is_a_type_error(cache: SharedSlabCache) -> None:
    cache.set("k", None)
    with pytest.raises(TypeError):
        cache.incr("k")


def test_counting_keeps_the_timeout(cache: SharedSlabCache) -> None:
    cache.set("n", 1, timeout=100)
    cache.incr("n")
    slab_of(cache)._advance_clock(101)
    assert cache.get("n") is None


def test_clear_empties_the_cache(cache: SharedSlabCache) -> None:
    cache.set_many({"a": 1, "b": 2})
    cache.clear()
    assert cache.get_many(["a", "b"]) == {}


def test_mutable_values_are_copies(cache: SharedSlabCache) -> None:
    cache.set("k", [1])
    cache.get("k").append(2)
    assert cache.get("k") == [1]


# ---- timeouts ----


def test_the_default_is_300_seconds(cache: SharedSlabCache) -> None:
    cache.set("k", 1)
    slab_of(cache)._advance_clock(290)
    assert cache.get("k") == 1
    slab_of(cache)._advance_clock(11)
    assert cache.get("k") is None


def test_timeout_none_is_for_ever(name: str) -> None:
    cache = make(name, TIMEOUT=None)
    cache.set("k", 1)
    cache.set("l", 1, timeout=10)
    slab_of(cache)._advance_clock(10 * 365 * 86400)
    assert cache.get_many(["k", "l"]) == {"k": 1}


@pytest.mark.parametrize("timeout", [0, -5])
def test_timeout_0_and_less_is_over_at_once(cache: SharedSlabCache, timeout: int) -> None:
    cache.set("k", "old")
    cache.set("k", "new", timeout)
    assert cache.get("k") is None
    assert cache.add("k", "new", timeout) is True
    assert cache.get("k") is None
    cache.set_many({"k": 1, "l": 2}, timeout)
    assert cache.get_many(["k", "l"]) == {}
    cache.set("k", "old")
    assert cache.touch("k", timeout) is True
    assert cache.get("k") is None


@pytest.mark.parametrize("timeout", [0, -5])
def test_a_default_of_0_and_less_stores_nothing(name: str, timeout: int) -> None:
    cache = make(name, TIMEOUT=timeout)
    cache.set("k", 1)
    assert cache.get("k") is None


def test_timeouts_may_be_fractions_and_beyond_memcached_s_month(cache: SharedSlabCache) -> None:
    cache.set("short", 1, 0.5)
    cache.set("long", 1, 60 * 60 * 24 * 31)
    slab_of(cache)._advance_clock(1)
    assert cache.get_many(["short", "long"]) == {"long": 1}


def test_touch_gives_a_new_timeout(cache: SharedSlabCache) -> None:
    cache.set("k", 1, timeout=10)
    assert cache.touch("k", 1000) is True
    slab_of(cache)._advance_clock(900)
    assert cache.get("k") == 1
    assert cache.touch("k", None) is True
    slab_of(cache)._advance_clock(10**8)
    assert cache.get("k") == 1
    assert cache.touch("k") is True  # the default
    assert cache.touch("missing") is False
    slab_of(cache)._advance_clock(301)
    assert cache.get("k") is None


# ---- keys ----


def test_versions_are_apart(cache: SharedSlabCache, name: str) -> None:
    second = make(name, VERSION=2, OPTIONS={"serializer": "pickle"})
    cache.set("k", 1)
    cache.set("k", 2, version=2)
    assert cache.get("k") == cache.get("k", version=1) == second.get("k", version=1) == 1
    assert cache.get("k", version=2) == second.get("k") == 2
    assert cache.get("k", version=3) is None


def test_a_version_is_moved(cache: SharedSlabCache) -> None:
    cache.set("k", "v", version=1)
    assert cache.incr_version("k") == 2
    assert cache.get("k") is None
    assert cache.get("k", version=2) == "v"
    assert cache.decr_version("k", version=2) == 1
    assert cache.get("k") == "v"


def test_prefixes_are_apart(name: str) -> None:
    one, two = make(name, KEY_PREFIX="one"), make(name, KEY_PREFIX="two")
    one.set("k", 1)
    assert two.get("k") is None
    assert slab_of(one).get(b"one:1:k") == b"1"


def own_keys(key: str, prefix: str, version: int) -> str:
    return f"{version}-{key}-{prefix}"


@pytest.mark.parametrize("function", [own_keys, "test_adapters_django.own_keys"])
def test_key_function_makes_the_keys(name: str, function: Any) -> None:
    cache = make(name, KEY_FUNCTION=function, KEY_PREFIX="p")
    cache.set("k", 1)
    assert slab_of(cache).get(b"1-k-p") == b"1"


@pytest.mark.parametrize("key", ["with space", "with\ttab", "with\x7f", "x" * 251])
def test_keys_that_memcached_would_refuse_warn_and_work(cache: SharedSlabCache, key: str) -> None:
    with pytest.warns(CacheKeyWarning, match="will cause errors if used with memcached"):
        cache.set(key, 1)
    with pytest.warns(CacheKeyWarning):
        assert cache.get(key) == 1


def test_keys_longer_than_the_slab_s_work(cache: SharedSlabCache) -> None:
    with pytest.warns(CacheKeyWarning):
        cache.set_many({"x" * 2000: 1, "x" * 2001: 2})
    with pytest.warns(CacheKeyWarning):
        assert cache.get_many(["x" * 2000, "x" * 2001]) == {"x" * 2000: 1, "x" * 2001: 2}


def test_other_alphabets_are_keys_and_values(cache: SharedSlabCache) -> None:
    cache.set("ключ", {"ключ": "значение"})
    assert cache.get("ключ") == {"ключ": "значение"}


# ---- values ----


class Model:
    def __init__(self, name: str) -> None:
        self.name = name


def test_the_default_serializer_keeps_types(name: str) -> None:
    cache = make(name)
    value = {"day": dt.date(2026, 1, 2), "at": dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc), "pair": (1, {2})}
    cache.set("k", value)
    assert cache.get("k") == value
    assert type(cache.get("k")["pair"]) is tuple


def test_what_it_cannot_carry_is_an_error_that_names_type_and_option_and_the_old_value_is_gone(name: str) -> None:
    cache = make(name)
    cache.set("k", "old")
    with pytest.raises(TypeError, match=r'cannot carry \S*Model: .*serializer="pickle"'):
        cache.set("k", {"m": Model("x")})
    assert cache.get("k", "gone") == "gone"


def test_pickle_is_the_operator_s_choice(name: str) -> None:
    cache = make(name, OPTIONS={"serializer": "pickle"})
    cache.set("k", Model("x"))
    assert cache.get("k").name == "x"
    with pytest.raises(pickle.PickleError, match="cannot carry function"):
        cache.set("k", lambda: None)
    assert cache.get("k") is None


def test_the_default_serializer_never_unpickles(name: str) -> None:
    make(name, OPTIONS={"serializer": "pickle"}).set("k", Model("x"))
    cache = make(name)
    assert cache.get("k") is None
    assert cache.add("k", "ours") is True


def test_markup_stays_safe(name: str) -> None:
    cache = make(name)
    cache.set("k", [mark_safe("<b>"), "<b>"])
    assert [type(one) for one in cache.get("k")] == [SafeString, str]


class Upper:
    """A serializer of somebody's own."""

    def dumps(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def loads(self, data: bytes) -> str:
        return data.decode()


@pytest.mark.parametrize("choice", [Upper, Upper()])
def test_a_serializer_may_be_a_class_or_an_object(name: str, choice: Any) -> None:
    cache = make(name, OPTIONS={"serializer": choice})
    cache.set("k", "x")
    assert cache.get("k") == "X"


def test_a_serializer_may_be_a_path(name: str) -> None:
    cache = make(name, OPTIONS={"serializer": "django.core.signing.JSONSerializer"})
    cache.set("k", {"a": [1]})
    assert cache.get("k") == {"a": [1]}


# ---- settings ----


def test_aliases_with_one_location_share_one_slab(name: str) -> None:
    caches = CacheHandler(
        {
            "default": {"BACKEND": BACKEND, "LOCATION": name, "OPTIONS": SMALL},
            "prefixed": {"BACKEND": BACKEND, "LOCATION": name, "KEY_PREFIX": "p"},
        }
    )
    caches["default"].set("k", 1)
    caches["prefixed"].set("k", 2)
    assert slab_of(caches["prefixed"]).config.memory_bytes == SMALL["memory_bytes"]
    assert sorted(entry.key for entry in slab_of(caches["default"]).scan()) == [b":1:k", b"p:1:k"]


def test_a_process_opens_the_slab_once_for_all_its_threads(name: str) -> None:
    handler = CacheHandler({"default": {"BACKEND": BACKEND, "LOCATION": name, "OPTIONS": SMALL}})
    first = handler["default"]
    second = handler.create_connection("default")  # what another thread or request gets
    assert first is not second
    assert slab_of(first) is slab_of(second)


def test_nothing_is_opened_before_the_first_use(name: str) -> None:
    cache = make(name)
    assert not SharedSlab.exists(name)
    cache.get("k")
    assert SharedSlab.exists(name)


def test_max_entries_bounds_the_slab(name: str) -> None:
    cache = make(name, OPTIONS={"MAX_ENTRIES": 30})
    cache.set_many({f"k{number}": number for number in range(100)})
    assert len(slab_of(cache)) <= 30
    assert slab_of(cache).config.max_entries == 30


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"memory": 1}, "no option 'memory'; there are CULL_FREQUENCY"),
        ({"memory_bytes": 1}, "memory_bytes=1 is too small"),
        ({"MAX_ENTRIES": 1, "max_entries": 2}, "one option"),
        ({"MAX_ENTRIES": "many"}, "max_entries must be an int"),
        ({"serializer": "yaml"}, "serializer must be"),
        ({"serializer": "no.such.Thing"}, "'no.such.Thing' cannot be imported"),
    ],
)
def test_an_option_that_cannot_be_is_a_clear_error(name: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidCacheBackendError, match=complaint):
        SharedSlabCache(name, {"OPTIONS": options})


def test_a_location_is_needed() -> None:
    with pytest.raises(InvalidCacheBackendError, match="LOCATION must be the name of a slab"):
        SharedSlabCache("", {})


# ---- coroutines ----


def test_the_async_twins_do_the_same(cache: SharedSlabCache) -> None:
    async def all_of_them() -> None:
        assert await cache.aget("k", 5) == 5
        assert await cache.aadd("k", 1) is True
        assert await cache.aadd("k", 2) is False
        assert await cache.aincr("k") == 2
        assert await cache.adecr("k", 2) == 0
        assert await cache.ahas_key("k")
        assert await cache.atouch("k", 1000) is True
        await cache.aset("k", "v")
        assert await cache.aget("k") == "v"
        assert await cache.aset_many({"a": 1, "b": 2}) == []
        assert await cache.aget_many(["a", "b", "c"]) == {"a": 1, "b": 2}
        await cache.adelete_many(["a"])
        assert await cache.aget_many(["a", "b"]) == {"b": 2}
        assert await cache.aget_or_set("new", lambda: "made") == "made"
        assert await cache.aincr_version("k") == 2
        assert await cache.aget("k", version=2) == "v"
        assert await cache.adelete("b") is True
        await cache.aclear()
        assert len(slab_of(cache)) == 0

    asyncio.run(all_of_them())


# ---- Django's own users of the cache ----


def test_sessions_live_in_it_under_the_default_serializer(configured: Callable[..., Any]) -> None:
    configured()
    session = SessionStore()
    session["cart"] = {"items": [1, 2], "total": "9.90"}
    session.save()
    again = SessionStore(session.session_key)
    assert again["cart"] == {"items": [1, 2], "total": "9.90"}
    again.flush()
    assert not SessionStore().exists(session.session_key)


def test_pages_are_cached_with_pickle(configured: Callable[..., Any]) -> None:
    configured(serializer="pickle")
    calls = []

    @cache_page(60)
    def view(request: HttpRequest) -> HttpResponse:
        calls.append(1)
        return HttpResponse(f"answer {len(calls)}")

    answers = [view(RequestFactory().get("/page")).content for _ in range(2)]
    assert answers == [b"answer 1", b"answer 1"]


def test_pages_without_pickle_are_the_documented_error(configured: Callable[..., Any]) -> None:
    configured()
    with pytest.raises(TypeError, match=r'HttpResponse: .*serializer="pickle"'):
        cache_page(60)(lambda request: HttpResponse("x"))(RequestFactory().get("/page"))


def test_template_fragments_are_cached_under_the_default_serializer(configured: Callable[..., Any]) -> None:
    configured()
    template = engines["django"].from_string("{% load cache %}{% cache 60 side %}<b>{{ x }}</b>{% endcache %}")
    assert [template.render({"x": x}) for x in ("1 & 2", "other")] == ["<b>1 &amp; 2</b>"] * 2


# ---- other processes ----


def test_another_process_has_the_hit(cache: SharedSlabCache, name: str, run_python: Callable[..., str]) -> None:
    cache.set("k", [1, "two"])
    program = """
import sys
from django.conf import settings
from django.contrib.sessions.backends.cache import SessionStore
settings.configure(CACHES={"default": {"BACKEND": sys.argv[1], "LOCATION": sys.argv[2],
                                       "OPTIONS": {"serializer": sys.argv[3]}}})
from django.core.cache import cache
print(cache.get("k"))
"""
    serializer = "pickle" if cache._serializer.tag == b"P" else "msgspec"
    assert run_python(program, BACKEND, name, serializer) == "[1, 'two']"


def _count(cache: SharedSlabCache) -> None:
    for _ in range(1000):
        cache.incr("n")
    cache.add("first", multiprocessing.current_process().name)


def test_forked_workers_count_atomically_and_one_of_them_adds(cache: SharedSlabCache) -> None:
    cache.set("n", 0)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(cache,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert cache.get("n") == 3000
    assert cache.get("first") in {worker.name for worker in workers}
