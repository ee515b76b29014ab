"""The decorator: what comes out, for which calls, computed how often, on both faces."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

import llm_edge_cache
from llm_edge_cache import (
    CachedResponse,
    CacheManager,
    L1Config,
    L2Config,
    SharedSlab,
    SyncCacheManager,
    cached,
)
from llm_edge_cache import decorator as module

MiB = 1 << 20
FACES = ("threads", "asyncio")


@pytest.fixture
def manager(name: str) -> Iterator[SyncCacheManager]:
    with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
        yield manager


class Point(msgspec.Struct):
    x: int
    at: datetime.datetime | None = None


@dataclasses.dataclass
class Pair:
    one: tuple[int, str]
    other: set[str]


class Colour(enum.Enum):
    RED = "red"


class Counted:
    """A function of either face that counts its calls."""

    def __init__(self, face: str, manager: Any, result: Callable[..., Any] = lambda *_: "r", **options: Any) -> None:
        self.calls = 0
        self.lock = threading.Lock()

        def work(*args: Any) -> Any:
            with self.lock:
                self.calls += 1
            return result(*args)

        def of_threads(a: Any, b: Any = 2) -> Any:
            return work(a, b)

        async def of_loops(a: Any, b: Any = 2) -> Any:
            await asyncio.sleep(0)
            return work(a, b)

        self.face = face
        self.cached: Any = cached(manager=manager, **options)(of_threads if face == "threads" else of_loops)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.cached(*args, **kwargs))

    def run(self, outcome: Any) -> Any:
        return asyncio.run(_awaited(outcome)) if self.face == "asyncio" else outcome


async def _awaited(outcome: Any) -> Any:
    return await outcome


@pytest.fixture(params=FACES)
def counted(request: pytest.FixtureRequest, manager: SyncCacheManager) -> Counted:
    return Counted(request.param, manager)


# ---- which calls are one ----


def test_a_second_call_computes_nothing(counted: Counted) -> None:
    assert [counted(1), counted(1), counted.calls] == ["r", "r", 1]


def test_a_call_is_one_however_it_is_written(counted: Counted) -> None:
    for _ in counted(1), counted(1, 2), counted(1, b=2), counted(a=1), counted(b=2, a=1):
        pass
    assert counted.calls == 1


ARGUMENTS = [
    *(1, 1.0, True, "1", b"1", None, 2**60, "", b"", [], [1], [[1]], [1, 1], {}, {"a": 1}, {1: "a"}, {"1": "a"}),
    *({1}, {"a"}, [["a", 1]], [["dict", []]], ["set", []], Point(1), Pair((1, "a"), {"b"}), Colour.RED, "red"),
    *(uuid.UUID(int=1), str(uuid.UUID(int=1)), decimal.Decimal("1"), datetime.date(2024, 1, 1), "2024-01-01"),
    *(datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 1, fold=0, tzinfo=datetime.timezone.utc)),
    *({"x": 1, "at": None}, {"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}),
]


def test_no_two_arguments_that_differ_are_one_call(counted: Counted) -> None:
    keys = [_key_of(counted, one) for one in ARGUMENTS]
    assert len(set(keys)) == len(keys)
    assert keys == [_key_of(counted, one) for one in ARGUMENTS]


def _key_of(counted: Counted, *args: Any) -> bytes:
    results = counted.cached.cache_info.__self__
    return results.key(args, {})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1, "b": [2]}, {"b": [2], "a": 1}), ({3, 1, 2}, {2, 3, 1}), ((1, [2]), [1, (2,)]), ({1, "a"}, {"a", 1})],
)
def test_what_is_equal_is_one_call(counted: Counted, one: Any, other: Any) -> None:
    assert _key_of(counted, one) == _key_of(counted, other)


def test_functions_do_not_meet(manager: SyncCacheManager) -> None:
    @cached(manager=manager)
    def one(a: int) -> str:
        return "one"

    @cached(manager=manager)
    def other(a: int) -> str:
        return "other"

    @cached(manager=manager, prefix=one.cache_info.__self__.name)  # type: ignore[attr-defined]
    def as_one(a: int) -> str:
        return "as one"

    assert (one(1), other(1), as_one(1)) == ("one", "other", "one")


def test_a_key_of_one_s_own(manager: SyncCacheManager) -> None:
    class Service:
        calls = 0

        @cached(manager=manager, key=lambda _, question: question.strip())
        def ask(self, question: str) -> str:
            self.calls += 1
            return question

    first, second = Service(), Service()
    assert [first.ask("why"), second.ask(" why "), second.ask("how")] == ["why", "why", "how"]
    assert (first.calls, second.calls) == (1, 1)


@pytest.mark.parametrize("argument", [object(), [object()], {"a": {object(): 1}}, lambda: 1])
def test_an_argument_that_cannot_be_part_of_a_key_is_named(counted: Counted, argument: Any) -> None:
    with pytest.raises(TypeError, match=r"of_(threads|loops): an argument of type (object|function) .* use key="):
        counted(argument)


def test_an_integer_beyond_64_bits_is_told(counted: Counted) -> None:
    with pytest.raises(ValueError, match="use key="):
        counted(2**70)


def test_a_call_that_does_not_fit_is_a_type_error(counted: Counted) -> None:
    with pytest.raises(TypeError, match="too many positional arguments"):
        counted(1, 2, 3)


def test_star_arguments_count(manager: SyncCacheManager) -> None:
    @cached(manager=manager)
    def count(*args: int, **kwargs: int) -> list[Any]:
        return [args, kwargs]

    assert count(1, 2, a=3) == [[1, 2], {"a": 3}]
    assert count(1, a=2, b=3) == count(1, b=3, a=2) == [[1], {"a": 2, "b": 3}]
    assert count() == [[], {}]


# ---- what comes out ----


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        (Point, Point(1, datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc))),
        (Pair, Pair((1, "a"), {"b"})),
        (tuple[int, ...], (1, 2)),
        (set[int], {1, 2}),
        (dict[str, decimal.Decimal], {"a": decimal.Decimal("1.50")}),
        (Colour, Colour.RED),
        (int | str | None, None),
        (bytes, b"\x00"),
        (uuid.UUID, uuid.UUID(int=7)),
        (CachedResponse, CachedResponse("text", "m", finish_reason="stop")),
        (list[Any], [1, "a", {"b": None}]),
        (None, None),
    ],
)
@pytest.mark.parametrize("tags", [(), ("t",)])  # which are looked up in another way
def test_what_comes_out_is_of_the_annotated_type(
    manager: SyncCacheManager, kind: Any, result: Any, tags: tuple[str, ...]
) -> None:
    def function() -> Any:
        return result

    function.__annotations__["return"] = kind
    decorated = cached(manager=manager, tags=tags)(function)
    for _ in range(3):
        assert decorated() == result
        assert type(decorated()) is type(result)
    assert decorated.cache_info()[:2] == (5, 1)


def test_every_caller_gets_a_result_of_its_own(counted: Counted, manager: SyncCacheManager) -> None:
    lists = Counted(counted.face, manager, lambda *_: [1])
    for _ in range(3):
        made = lists(1)
        assert made == [1]
        made.append(2)


@pytest.mark.parametrize("face", FACES)
def test_a_result_of_another_type_than_annotated_is_refused(manager: SyncCacheManager, face: str) -> None:
    def wrong() -> int:
        return "text"  # type: ignore[return-value]

    async def wrong_async() -> int:
        return "text"  # type: ignore[return-value]

    decorated: Any = cached(manager=manager)(wrong if face == "threads" else wrong_async)
    with pytest.raises(TypeError, match=r"wrong.* returned a str, .* Expected `int`"):
        asyncio.run(_awaited(decorated())) if face == "asyncio" else decorated()
    assert manager.l1_entry_count() <= 1  # what tells others of the failure


def test_a_result_that_cannot_be_carried_is_named_and_the_old_one_is_gone(manager: SyncCacheManager) -> None:
    for face in FACES:
        results: list[Any] = ["old", object()]
        counted = Counted(face, manager, lambda *_, results=results: results.pop(0))
        assert counted(1) == "old"
        with pytest.raises(TypeError, match="returned a object"):
            counted.run(counted.cached.refresh(1))
        results.append("new")
        assert counted(1) == "new"


def test_a_type_that_has_changed_is_computed_anew(manager: SyncCacheManager) -> None:
    for face in FACES:
        old = Counted(face, manager, lambda *_: "text", prefix=face)
        old(1)

        def function(a: int, b: int = 2) -> list[int]:
            return [1]

        async def function_async(a: int, b: int = 2) -> list[int]:
            return [1]

        new: Any = cached(manager=manager, prefix=face)(function if face == "threads" else function_async)
        for _ in range(2):
            assert (asyncio.run(_awaited(new(1))) if face == "asyncio" else new(1)) == [1]
        assert new.cache_info().hits == 1


@pytest.mark.parametrize("kind", ["Unknown", dict[list[int], int] | set[str] | frozenset[str]])
def test_an_annotation_that_cannot_be_used_is_refused(kind: Any) -> None:
    def function() -> Any: ...

    function.__annotations__["return"] = kind
    with pytest.raises(TypeError, match="is annotated to return"):
        cached(function)


# ---- how often ----


def test_threads_compute_once(manager: SyncCacheManager) -> None:
    counted = Counted("threads", manager, lambda *_: time.sleep(0.2) or "r")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(counted, [1] * 8)) == {"r"}
    assert counted.calls == 1


def test_tasks_compute_once(manager: SyncCacheManager) -> None:
    counted = Counted("asyncio", manager)

    async def ask() -> set[Any]:
        return set(await asyncio.gather(*(counted.cached(1) for _ in range(8))))

    assert asyncio.run(ask()) == {"r"}
    assert counted.calls == 1


PROGRAM = """
import sys, time, os
from llm_edge_cache import cached
@cached(name=sys.argv[1])
def slow(question: str) -> str:
    time.sleep(1.5)
    print("computed", flush=True)
    return question.upper()
if sys.argv[2] == "async":
    import asyncio
    @cached(name=sys.argv[1])
    async def slow(question: str) -> str:
        await asyncio.sleep(1.5)
        print("computed", flush=True)
        return question.upper()
    print(asyncio.run(slow("why")))
else:
    print(slow("why"))
"""


@pytest.mark.parametrize("face", ["sync", "async"])
def test_processes_compute_once(name: str, face: str) -> None:
    SharedSlab(name).close()
    command = [sys.executable, "-c", PROGRAM, name, face]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate(timeout=60)[0] for process in running)
    assert sorted(said.split()) == ["WHY", "WHY", "WHY", "computed"]


def test_an_exception_is_the_caller_s_and_not_stored(counted: Counted, manager: SyncCacheManager) -> None:
    outcomes: list[Any] = [ZeroDivisionError("no"), "r"]

    def next_outcome(*_: Any) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    failing = Counted(counted.face, manager, next_outcome)
    with pytest.raises(ZeroDivisionError, match="no"):
        failing(1)
    assert [failing(1), failing(1), failing.calls] == ["r", "r", 2]


def test_a_value_error_of_the_function_is_no_fault_of_the_cache(counted: Counted, manager: SyncCacheManager) -> None:
    def refuse(*_: Any) -> Any:
        raise ValueError("mine")

    refusing = Counted(counted.face, manager, refuse)
    with pytest.raises(ValueError, match="mine"):
        refusing(1)
    assert refusing.calls == 1


# ---- its life ----


def test_a_ttl_ends(manager: SyncCacheManager) -> None:
    for face in FACES:
        counted = Counted(face, manager, ttl=0.2)
        counted(1)
        time.sleep(0.3)
        counted(1)
        assert counted.calls == 2


def test_invalidate(counted: Counted) -> None:
    counted(1)
    counted(3)
    counted.run(counted.cached.invalidate(1, b=2))
    counted(3)
    assert counted.calls == 2
    counted(1)
    assert counted.calls == 3


def test_refresh_computes_anew_and_stores(counted: Counted, manager: SyncCacheManager) -> None:
    counts = iter(range(10))
    numbers = Counted(counted.face, manager, lambda *_: next(counts))
    assert numbers(1) == 0
    assert numbers.run(numbers.cached.refresh(1)) == 1
    assert numbers(1) == 1


def test_what_was_invalidated_during_a_refresh_is_not_stored(manager: SyncCacheManager) -> None:
    counts = iter(range(10))

    def invalidate(*_: Any) -> int:
        counted.cached.invalidate(1)
        return next(counts)

    counted = Counted("threads", manager, invalidate)
    assert [counted.cached.refresh(1), counted(1)] == [0, 1]


def test_tags(manager: SyncCacheManager) -> None:
    for face in FACES:
        fixed = Counted(face, manager, tags=("all",))
        made = Counted(face, manager, tags=lambda a, b=2: [f"n{a}"], prefix=f"made {face}")
        for number in (1, 3):
            fixed(number)
            made(number)
        manager.invalidate_tag("n1")
        for number in (1, 3):
            made(number)
        assert made.calls == 3
        manager.invalidate_tag("all")
        fixed(1)
        assert fixed.calls == 3


def test_cache_info(counted: Counted) -> None:
    counted(1)
    counted(1)
    counted(3)
    assert counted.cached.cache_info() == (1, 2, 1000, 2)


# ---- which cache ----


def test_a_manager_may_come_later_and_is_asked_once(name: str) -> None:
    made: list[SyncCacheManager] = []

    def get_manager() -> SyncCacheManager:
        made.append(SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB)))
        return made[-1]

    @cached(manager=get_manager)
    def answer(question: str) -> str:
        return question

    assert made == []
    assert [answer("a"), answer("b"), answer("a")] == ["a", "b", "a"]
    assert len(made) == 1
    made[0].close()


def test_an_asynchronous_manager_will_do(name: str) -> None:
    async def use() -> list[str]:
        async with CacheManager(L1Config(name=name, memory_bytes=4 * MiB)) as manager:
            threads, loops = Counted("threads", manager), Counted("asyncio", manager, lambda *_: "loop")
            return [threads.cached(1), await loops.cached(1), threads.cached(1)]

    assert asyncio.run(use()) == ["r", "loop", "r"]


def test_the_environment_says_which_slab(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE_NAME", name)
    monkeypatch.setenv("LLM_EDGE_CACHE_L1_MEMORY", "4MiB")

    @cached
    def answer(question: str) -> str:
        return question

    assert answer("a") == answer("a") == "a"
    assert len(SharedSlab.attach(name)) == 1
    module._named.pop(None).close()


def test_redis_has_it_for_other_hosts(redis_server: Any, name: str) -> None:
    l2 = L2Config(redis_url=redis_server.unix_url, key_prefix=f"{name}:", operation_timeout_ms=5000)
    results = []
    for _ in range(2):
        with SyncCacheManager(L1Config(name=name, memory_bytes=4 * MiB), l2) as manager:
            counted = Counted("threads", manager, lambda *_: {"a": [1]})
            manager.slab.clear()
            results.append((counted(1), counted(1), counted.calls))
    assert results == [({"a": [1]}, {"a": [1]}, 1), ({"a": [1]}, {"a": [1]}, 0)]


# ---- misuse ----


def test_a_lambda_needs_a_name() -> None:
    with pytest.raises(ValueError, match="prefix="):
        cached(lambda: 1)


@pytest.mark.parametrize("wrong", [{"name": "n", "manager": 1}, {"ttl": "1"}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        cached(**wrong)(_awaited)


@pytest.mark.parametrize("ttl", [0, -1.0, float("nan")])
def test_a_ttl_that_is_none_is_refused(ttl: float) -> None:
    with pytest.raises(ValueError, match="ttl"):
        cached(ttl=ttl)(_awaited)


def test_generators_are_refused() -> None:
    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="not <function"):
        cached(generator)
    with pytest.raises(TypeError):
        cached(7)  # type: ignore[call-overload]


def test_it_is_exported_at_the_root() -> None:
    assert llm_edge_cache.cached is cached


def test_programs_of_one_function_name_do_not_meet(name: str, tmp_path: Any) -> None:
    said = []
    for answer in ("one", "other"):
        program = tmp_path / f"{answer}.py"
        program.write_text(
            "import sys\nfrom llm_edge_cache import cached\n"
            f"@cached(name=sys.argv[1])\ndef ask(question: str) -> str:\n    return {answer!r}\nprint(ask('why'))\n"
        )
        SharedSlab(name).close()
        said.append(subprocess.check_output([sys.executable, str(program), name], text=True))
    assert said == ["one\n", "other\n"]
