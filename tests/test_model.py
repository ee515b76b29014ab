"""The records that users see: immutable, checked when they are made, silent about what was said."""

from __future__ import annotations

import copy
import pickle
from types import MappingProxyType
from typing import Any

import msgspec
import pytest

from llm_edge_cache import CacheableRequest, CachedResponse, TokenUsage, generate_cache_key

REQUEST = CacheableRequest("gpt-4o", "Hello", temperature=0.7, max_tokens=9, parameters={"seed": 1}, namespace="n")


# ---- requests ----


def test_a_request_keeps_what_it_was_given() -> None:
    assert REQUEST.model == "gpt-4o"
    assert REQUEST.prompt == "Hello"
    assert REQUEST.messages is None
    assert REQUEST.temperature == 0.7
    assert REQUEST.max_tokens == 9
    assert REQUEST.parameters == {"seed": 1}
    assert REQUEST.namespace == "n"


def test_all_but_the_model_may_be_left_out() -> None:
    request = CacheableRequest("m")
    left_out = (request.prompt, request.messages, request.temperature, request.max_tokens)
    assert left_out == (None, None, None, None)
    assert request.parameters == {}
    assert request.namespace == ""


def test_model_and_prompt_alone_may_be_given_by_position() -> None:
    with pytest.raises(TypeError):
        CacheableRequest("m", "p", [])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("temperature", REQUEST.with_temperature(0.2)),
        ("max_tokens", REQUEST.with_max_tokens(10)),
        ("parameters", REQUEST.with_parameter("seed", 2)),
        ("namespace", REQUEST.with_namespace("other")),
    ],
)
def test_with_methods_return_other_requests_with_other_keys(name: str, changed: CacheableRequest) -> None:
    assert getattr(changed, name) != getattr(REQUEST, name)
    assert generate_cache_key(changed) != generate_cache_key(REQUEST)
    others = {field for field in REQUEST.__struct_fields__ if getattr(changed, field) != getattr(REQUEST, field)}
    assert others == {name}


def test_with_methods_check_what_they_are_given() -> None:
    with pytest.raises(TypeError, match="temperature"):
        REQUEST.with_temperature("hot")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a parameter's name must be a str, not int"):
        REQUEST.with_parameter(1, 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"parameters\['x'\] must be a JSON value, not bytes"):
        REQUEST.with_parameter("x", b"")


def test_a_parameter_must_be_one_for_with_parameter_too() -> None:
    with pytest.raises(ValueError, match=r"parameters\['x'\] must be a finite number"):
        REQUEST.with_parameter("x", float("nan"))


def test_the_same_fields_built_up_or_given_at_once_are_one_request() -> None:
    built = CacheableRequest("gpt-4o", "Hello").with_namespace("n").with_max_tokens(9)
    assert built.with_parameter("seed", 1.0).with_temperature(0.7) == REQUEST


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        REQUEST.model = "other"  # type: ignore[misc]


def test_requests_are_equal_when_their_keys_are() -> None:
    assert CacheableRequest("m", temperature=0.701) == CacheableRequest("m", temperature=0.7)
    assert hash(CacheableRequest("m", temperature=0.701)) == hash(CacheableRequest("m", temperature=0.7))
    assert CacheableRequest("m", parameters={"x": True}) != CacheableRequest("m", parameters={"x": 1})
    assert CacheableRequest("m") != "m"


def test_a_conversation_that_goes_on_in_the_same_list_changes_no_key() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    request = CacheableRequest("m", messages=messages)
    asked = copy.deepcopy(messages)
    messages.append({"role": "assistant", "content": "Hello!"})
    assert generate_cache_key(request) == generate_cache_key(CacheableRequest("m", messages=asked))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda request: pickle.loads(pickle.dumps(request))])
def test_copies_are_equal(again: Any) -> None:
    assert again(REQUEST) == REQUEST
    assert generate_cache_key(again(REQUEST)) == generate_cache_key(REQUEST)


def test_two_requests_share_no_default() -> None:
    assert CacheableRequest("m").parameters is not CacheableRequest("m").parameters


def test_a_request_s_repr_says_nothing_of_what_was_asked() -> None:
    request = CacheableRequest("gpt-4o", messages=[{"content": "secret"}], parameters={"user": "secret"})
    assert "secret" not in repr(request)
    assert "gpt-4o" in repr(request)


@pytest.mark.parametrize(
    ("error", "match", "fields"),
    [
        (ValueError, "model must not be empty", {"model": ""}),
        (TypeError, "model must be a str, not NoneType", {"model": None}),
        (TypeError, "prompt must be a str, not list", {"prompt": ["a"]}),
        (TypeError, "prompt must be a str, not bytes", {"prompt": b"a"}),
        (ValueError, "give a prompt or messages, not both", {"prompt": "a", "messages": []}),
        (TypeError, "messages must be a list or tuple of dicts, not str", {"messages": "a"}),
        (TypeError, "messages must be a list or tuple of dicts, not dict", {"messages": {"role": "user"}}),
        (TypeError, r"messages\[1\] must be a dict, not str", {"messages": [{}, "a"]}),
        (TypeError, "temperature must be a number or None, not str", {"temperature": "0.7"}),
        (TypeError, "temperature must be a number or None, not bool", {"temperature": True}),
        (ValueError, "temperature is too large", {"temperature": 1e39}),
        (ValueError, "temperature is too large", {"temperature": 10**400}),
        (TypeError, "max_tokens must be a number or None, not str", {"max_tokens": "9"}),
        (TypeError, "max_tokens must be a number or None, not bool", {"max_tokens": True}),
        (ValueError, "max_tokens must be an integral number, not 9.5", {"max_tokens": 9.5}),
        (TypeError, "parameters must be a dict, not list", {"parameters": []}),
        (TypeError, "parameters must be a dict, not NoneType", {"parameters": None}),
        (TypeError, "parameters must be a dict, not mappingproxy", {"parameters": MappingProxyType({})}),
        (TypeError, "namespace must be a str, not NoneType", {"namespace": None}),
    ],
)
def test_what_is_no_request_is_refused(error: type[Exception], match: str, fields: dict[str, Any]) -> None:
    with pytest.raises(error, match=match):
        CacheableRequest(**{"model": "m", **fields})


# ---- responses ----


def test_a_response_keeps_what_it_was_given() -> None:
    response = CachedResponse(
        "Hi", "gpt-4o", TokenUsage(1, 2, 3), 5.0, raw=b"{}", finish_reason="stop", metadata={"a": 1}
    )
    assert msgspec.structs.astuple(response) == ("Hi", "gpt-4o", TokenUsage(1, 2, 3), 5.0, b"{}", "stop", {"a": 1})


def test_all_but_content_and_model_may_be_left_out() -> None:
    assert msgspec.structs.astuple(CachedResponse("Hi", "m")) == ("Hi", "m", None, None, None, None, {})


def test_what_is_raw_is_given_by_name() -> None:
    with pytest.raises(TypeError):
        CachedResponse("Hi", "m", None, None, b"")  # type: ignore[misc]


def test_responses_and_usage_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CachedResponse("Hi", "m").content = "Ho"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        TokenUsage(1, 2, 3).total_tokens = 4  # type: ignore[misc]


def test_responses_are_equal_when_their_fields_are() -> None:
    assert CachedResponse("Hi", "m", TokenUsage(1, 2, 3)) == CachedResponse("Hi", "m", TokenUsage(1, 2, 3))
    assert CachedResponse("Hi", "m") != CachedResponse("Ho", "m")


def test_a_response_s_repr_says_nothing_of_what_was_answered() -> None:
    response = CachedResponse("secret", "gpt-4o", raw=b"secret", metadata={"user": "secret"})
    assert "secret" not in repr(response)
    assert "gpt-4o" in repr(response)
