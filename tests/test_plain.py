"""The native walk over JSON values says what a plain one in Python says."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_edge_cache.native import native


def reference(items: Iterable[Any], depth: int) -> bool:
    return all(is_plain(item, depth) for item in items)


def is_plain(item: Any, depth: int) -> bool:
    kind = type(item)
    if kind is float:
        return math.isfinite(item) and item != math.floor(item)
    if kind in (dict, list, tuple):
        return depth > 0 and reference(item.values() if kind is dict else item, depth - 1)
    return item is None or kind in (str, int, bool)


class Text(str):
    __slots__ = ()


class Mapping(dict[str, Any]):
    pass


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.floats(), st.sampled_from([0.5, -1.5, 1e300, 2.0])
)
strange = st.sampled_from([b"", Text("a"), Mapping(), {1}, 1j, object()])
values = st.recursive(
    st.one_of(leaves, leaves, leaves, strange),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=4),
    ),
    max_leaves=20,
)


@given(st.lists(values, max_size=4), st.integers(0, 5))
def test_it_says_what_the_reference_says(items: list[Any], depth: int) -> None:
    expected = reference(items, depth)
    assert native.are_plain(items, depth) is expected
    assert native.are_plain(tuple(items), depth) is expected
    assert native.are_plain(dict(enumerate(items)), depth) is expected


@pytest.mark.parametrize(
    ("sequence", "expected"),
    [
        ([], True),
        ([{}], True),
        (({"a": 1.5}, {"b": "c"}), True),
        ([{"a": 1.0}], False),
        ([Mapping()], False),
        ([{}, "a"], False),
        ("a", False),
        ({"a": {}}, False),
        (None, False),
    ],
)
def test_messages_are_a_list_or_tuple_of_nothing_but_dicts(sequence: Any, expected: bool) -> None:
    assert native.are_plain_dicts(sequence, 100) is expected


def test_containers_count_from_the_outermost() -> None:
    assert native.are_plain([[[1]]], 2)
    assert not native.are_plain([[[1]]], 1)


def test_nothing_else_is_a_container() -> None:
    assert not native.are_plain("text", 1)
    assert not native.are_plain(None, 1)


def test_no_reference_is_kept() -> None:
    item = [object.__new__(object)]
    before = sys.getrefcount(item)
    for _ in range(100):
        native.are_plain([item, {"a": item}, (item,)], 9)
    assert sys.getrefcount(item) == before


@pytest.mark.parametrize("depth", [-1, 1000, 2**70])
def test_the_depth_is_bounded(depth: int) -> None:
    with pytest.raises(IndexError):
        native.are_plain([], depth)


def test_there_are_two_arguments() -> None:
    with pytest.raises(TypeError, match="are_plain"):
        native.are_plain([])  # type: ignore[call-arg]
