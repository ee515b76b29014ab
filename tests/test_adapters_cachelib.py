"""cachelib's and Flask-Caching's cache in the slab: what their own tests ask of a backend, and what sharing adds."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import multiprocessing
from collections.abc import Callable
from typing import Any

import cachelib
import flask
import flask_caching
import pytest
from markupsafe import Markup

from llm_edge_cache import SharedSlab, SlabBusyError, SlabConfig
from llm_edge_cache.adapters.cachelib import SharedSlabCache, factory

CONFIG = SlabConfig(memory_bytes=4 << 20)
TYPE = "llm_edge_cache.adapters.cachelib.factory"
PAIRS = {
    "bool": False,
    "empty": {},
    "text": "spam",
    "number": 2048,
    "list": [{}, "eggs", [512]],
    "dict": {"sauce": [], 256: "truffle"},
}


@pytest.fixture(params=["msgspec", "pickle"])
def cache(request: pytest.FixtureRequest, name: str) -> SharedSlabCache:
    return SharedSlabCache(name, config=CONFIG, serializer=request.param)


def slab_of(cache: SharedSlabCache) -> SharedSlab:
    return cache._store.slab


# ---- cachelib ----


def test_it_is_a_cachelib_cache(cache: SharedSlabCache) -> None:
    assert isinstance(cache, cachelib.BaseCache)


def test_values_are_set_got_and_deleted(cache: SharedSlabCache) -> None:
    for key, value in PAIRS.items():
        assert cache.set(key, value) is True
        assert cache.get(key) == value
        assert cache.has(key)
        assert cache.delete(key) is True
        assert cache.delete(key) is False
        assert cache.get(key) is None
        assert not cache.has(key)


def test_many_at_once(cache: SharedSlabCache) -> None:
    assert cache.set_many(PAIRS) == list(PAIRS)
    assert cache.get_many(*PAIRS, "missing") == [*PAIRS.values(), None]
    assert cache.get_dict("text", "missing") == {"text": "spam", "missing": None}
    assert cache.delete_many("missing", *PAIRS) == ["missing", *PAIRS]
    assert cache.get_many(*PAIRS) == [None] * len(PAIRS)


def test_a_value_that_is_too_large_is_not_stored(cache: SharedSlabCache) -> None:
    assert cache.set("k", "x" * (5 << 20)) is False
    assert cache.set_many({"large": "x" * (5 << 20), "small": 1}) == ["small"]


@pytest.mark.parametrize("ignoring", [True, False])
def test_keys_that_cannot_be_deleted_are_named_or_an_error(
    name: str, monkeypatch: pytest.MonkeyPatch, ignoring: bool
) -> None:
    def is_held_up(keys: Any) -> None:
        raise SlabBusyError("a stopped process holds it")

    cache = SharedSlabCache(name, config=CONFIG, ignore_delete_many_errors=ignoring)
    cache.set("k", 1)
    monkeypatch.setattr(cache._store, "delete_many", is_held_up)
    if ignoring:
        assert cache.delete_many("k", "missing") == ["missing"]
    else:
        with pytest.raises(RuntimeError, match="not every key could be deleted"):
            cache.delete_many("k")


def test_add_stores_where_nothing_is(cache: SharedSlabCache) -> None:
    assert cache.add("k", "first") is True
    assert cache.add("k", "second") is False
    assert cache.get("k") == "first"


def test_counting_begins_at_0(cache: SharedSlabCache) -> None:
    assert cache.inc("n", 10) == 10
    assert cache.dec("n", 3) == cache.get("n") == 7
    assert cache.dec("m") == -1


def test_a_count_that_another_begins_meanwhile_is_not_lost(
    cache: SharedSlabCache, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SharedSlabCache(name)
    count = cache._store.incr

    def count_late(key: str, delta: Any) -> Any:
        try:
            return count(key, delta)
        except KeyError:
            assert other.inc(key) == 1
            raise

    monkeypatch.setattr(cache._store, "incr", count_late)
    assert cache.inc("n") == other.get("n") == 2


def test_counting_goes_on_from_what_was_set(cache: SharedSlabCache) -> None:
    cache.set("n", 2**63 - 1)
    assert cache.inc("n") == 2**63
    assert cache.dec("n", 2) == cache.get("n") == 2**63 - 2


def test_counting_what_is_no_number_is_a_type_error(cache: SharedSlabCache) -> None:
    cache.set("k", "text")
    with pytest.raises(TypeError):
        cache.inc("k")


def test_clear_empties_the_cache(cache: SharedSlabCache) -> None:
    cache.set_many(PAIRS)
    assert cache.clear() is True
    assert cache.get_many(*PAIRS) == [None] * len(PAIRS)


@pytest.mark.parametrize("timeout", [0, dt.timedelta()])
def test_timeout_0_is_for_ever(cache: SharedSlabCache, timeout: Any) -> None:
    cache.set("k", 1, timeout)
    assert slab_of(cache).ttl(b"k") is None


@pytest.mark.parametrize("timeout", [10, dt.timedelta(seconds=10)])
def test_a_timeout_ends_a_value(cache: SharedSlabCache, timeout: Any) -> None:
    cache.set("k", 1, timeout)
    cache.add("l", 1, timeout)
    cache.set_many({"m": 1}, timeout)
    slab_of(cache)._advance_clock(11)
    assert cache.get_many("k", "l", "m") == [None] * 3


@pytest.mark.parametrize(("default", "ttl"), [(300, 300), (dt.timedelta(minutes=1), 60), (0, None), (0.5, 0.5)])
def test_the_default_timeout_is_the_constructor_s(name: str, default: Any, ttl: float | None) -> None:
    cache = SharedSlabCache(name, config=CONFIG, default_timeout=default)
    cache.set("k", 1)
    cache.inc("n")
    for key in (b"k", b"n"):
        left = slab_of(cache).ttl(key)
        assert left == ttl or (left is not None and ttl is not None and ttl - 0.4 < left <= ttl)


def test_a_timeout_below_0_is_over_at_once(cache: SharedSlabCache) -> None:
    cache.set("k", "old")
    cache.set("k", "new", -1)
    assert cache.get("k") is None


def test_clear_with_a_prefix_leaves_the_keys_of_others(name: str) -> None:
    one, two = (SharedSlabCache(name, config=CONFIG, key_prefix=prefix) for prefix in ("one:", "two:"))
    for cache in (one, two):
        cache.set_many({"a": 1, "b": 2})
    one.clear()
    assert one.get_many("a", "b") == [None, None]
    assert two.get_many("a", "b") == [1, 2]
    assert two.delete_many("a", "b") == ["a", "b"]


def test_what_cannot_be_carried_is_an_error_and_the_old_value_is_gone(name: str) -> None:
    cache = SharedSlabCache(name, config=CONFIG)
    cache.set("k", "old")
    with pytest.raises(TypeError, match=r'cannot carry object: .*serializer="pickle"'):
        cache.set("k", object())
    assert cache.get("k") is None


class Json:
    """As cachelib's own of that kind, which older versions do not have."""

    def dumps(self, value: Any) -> bytes:
        return json.dumps(value).encode()

    def loads(self, data: bytes) -> Any:
        return json.loads(data)


def test_another_serializer_may_be_put_in_its_place(cache: SharedSlabCache) -> None:
    cache.set("k", [1])
    cache.serializer = Json()
    assert isinstance(cache.serializer, Json)
    assert cache.get("k") is None
    assert cache.add("k", {"a": [1, None]}) is True
    assert cache.get("k") == {"a": [1, None]}
    assert cache.set_many({"n": 42, "t": True}) == ["n", "t"]
    assert cache.get_many("n", "t") == [42, True]


def test_two_caches_of_one_name_are_one(name: str) -> None:
    one, two = SharedSlabCache(name, config=CONFIG), SharedSlabCache(name)
    one.set("k", 1)
    assert two.get("k") == 1


# ---- Flask-Caching ----


@pytest.fixture
def app(name: str) -> flask.Flask:
    app = flask.Flask(__name__)
    app.config.update(CACHE_TYPE=TYPE, CACHE_ARGS=[name], CACHE_OPTIONS={"config": CONFIG})
    return app


def test_it_is_a_cache_type_of_flask_caching(app: flask.Flask) -> None:
    app.config["CACHE_DEFAULT_TIMEOUT"] = 111
    cache = flask_caching.Cache(app)
    assert type(cache.cache) is SharedSlabCache
    assert cache.cache.default_timeout == 111


@pytest.mark.parametrize("named", [True, False])
def test_factory_serves_every_version_of_flask_caching(app: flask.Flask, name: str, named: bool) -> None:
    args, options = ([], {"name": name}) if named else ([name], {})
    old = factory(app, app.config, args, {**options, "config": CONFIG, "default_timeout": 7})
    new = factory(*args, **options, default_timeout=7, ignore_delete_many_errors=False)
    old.set("k", 1)
    assert new.get("k") == 1
    assert old.default_timeout == new.default_timeout == 7


@pytest.mark.skipif(
    int(importlib.metadata.version("flask-caching").split(".")[1]) < 5, reason="older ones call a class as factory()"
)
def test_the_class_is_a_cache_type_of_later_versions(app: flask.Flask) -> None:
    app.config["CACHE_TYPE"] = "llm_edge_cache.adapters.cachelib.SharedSlabCache"
    assert type(flask_caching.Cache(app).cache) is SharedSlabCache


def test_views_and_functions_are_computed_once(app: flask.Flask) -> None:
    cache = flask_caching.Cache(app)
    calls: list[str] = []

    @app.route("/page")
    @cache.cached(timeout=60)
    def page() -> str:
        calls.append("page")
        return f"answer {double(21)}"

    @cache.memoize(60)
    def double(number: int) -> int:
        calls.append("double")
        return 2 * number

    with app.test_client() as client:
        assert [client.get("/page").text for _ in range(2)] == ["answer 42"] * 2
    with app.app_context():
        assert double(21) == 42
        assert calls == ["page", "double"]
        cache.delete_memoized(double)
        assert double(21) == 42
    assert calls == ["page", "double", "double"]


def test_markup_stays_markup(app: flask.Flask) -> None:
    cache = flask_caching.Cache(app)
    template = "{% cache 60, 'side' %}<b>{{ x }}</b>{% endcache %}"
    with app.test_request_context():
        rendered = [flask.render_template_string(template, x=x) for x in ("1 & 2", "other")]
    assert rendered == ["<b>1 &amp; 2</b>"] * 2
    cache.cache.set("k", Markup("<b>"))
    assert type(cache.cache.get("k")) is Markup


# ---- other processes ----


def test_another_process_has_the_hit(cache: SharedSlabCache, name: str, run_python: Callable[..., str]) -> None:
    cache.set("k", [1, "two"])
    program = """
import sys
from llm_edge_cache.adapters.cachelib import SharedSlabCache
print(SharedSlabCache(sys.argv[1], serializer=sys.argv[2]).get("k"))
"""
    assert run_python(program, name, cache.serializer) == "[1, 'two']"


def _count(cache: SharedSlabCache) -> None:
    for _ in range(1000):
        cache.inc("n")


def test_forked_workers_count_atomically_from_nothing(cache: SharedSlabCache) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_count, args=(cache,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert cache.get("n") == 3000
