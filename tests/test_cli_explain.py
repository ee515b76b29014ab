"""`explain`: the key that it shows is the key that is used, and it names each field that makes two of them differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_edge_cache import CacheableRequest, generate_cache_key
from llm_edge_cache.cli.main import main
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import ExchangeReader
from llm_edge_cache.gateway.protocols import PROTOCOLS

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7, "user": "u1"}


@pytest.fixture
def explain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command on requests; returns the exit code and what it printed as JSON."""

    def run(*requests: Any, options: tuple[str, ...] = ()) -> tuple[int, Any]:
        files = [tmp_path / f"{number}.json" for number in range(len(requests))]
        for file, request in zip(files, requests, strict=True):
            file.write_bytes(request if isinstance(request, bytes) else json.dumps(request).encode())
        code = main(["explain", *map(str, files), "--json", *options])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return code, json.loads(printed.out) if printed.out else printed.err

    return run


def test_the_key_of_a_request_is_its_key(explain: Any) -> None:
    fields = {"model": "m", "prompt": "", "temperature": 0.701, "parameters": {"top_p": 1.0}, "namespace": "n"}
    code, found = explain(fields)
    assert (code, found["key"]) == (0, generate_cache_key(CacheableRequest(**fields)))
    assert found["in_key"] == {
        "namespace": "n", "model": "m", "prompt": '""', "temperature": "0.70", "parameters": '{"top_p": 1}',
    }  # fmt: skip


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_key_of_a_gateway_request_is_its_key(explain: Any, is_shared: bool) -> None:
    config = GatewayConfig(upstream="https://api.example.com", share_between_callers=is_shared)
    headers = {} if is_shared else {"Authorization": "Bearer secret", "OpenAI-Beta": "a, b", "X-Request-Id": "5"}
    scope = {
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "query_string": b"a=1",
        "path": CHAT,
    }
    used = ExchangeReader(config).read(PROTOCOLS[CHAT], scope, json.dumps(BODY).encode())
    envelope = {"endpoint": CHAT, "query": "a=1", "upstream": config.base, "body": BODY}
    code, found = explain(envelope if is_shared else {**envelope, "headers": headers})
    assert (code, found["key"].encode()) == (0, used.key)
    assert "secret" not in json.dumps(found)


def test_a_body_alone_needs_its_endpoint(explain: Any) -> None:
    code, found = explain(BODY, options=("--endpoint", CHAT))
    assert code == 0
    assert set(found["in_key"]) == {"gateway: endpoint", "messages", "model", "temperature"}
    assert found["not_in_key"] == ["user"]
    code, says = explain(BODY)
    assert code == 1
    assert "a body for the gateway needs --endpoint" in says


def test_what_the_gateway_does_not_cache_is_said(explain: Any) -> None:
    code, found = explain(
        {"model": "m", "input": "Hi", "previous_response_id": "r1"}, options=("--endpoint", "/v1/responses")
    )
    assert (code, found["bypass"]) == (0, "previous_response_id")


def test_requests_with_one_key_are_said_to_have_one(explain: Any) -> None:
    code, found = explain(
        {"model": "m", "temperature": 0.701, "parameters": {"a": 1.0, "b": [0.0]}},
        {"model": "m", "temperature": 0.7, "parameters": {"b": [-0.0], "a": 1}},
    )
    assert (code, found["same_key"], found["differences"]) == (0, True, [])


@pytest.mark.parametrize(
    ("one", "other", "differs"),
    [
        ({"temperature": 0.7}, {"temperature": 0.71}, {"field": "temperature", "first": "0.70", "second": "0.71"}),
        ({"prompt": ""}, {}, {"field": "prompt", "first": '""'}),
        ({"parameters": {"x": None}}, {}, {"field": "parameters", "first": '{"x": null}'}),
        (
            {"parameters": {"x": True}},
            {"parameters": {"x": 1}},
            {"field": "parameters['x']", "first": "true", "second": "1"},
        ),
        ({"max_tokens": 2**70}, {"max_tokens": 2**70 + 1}, None),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
            {"field": "messages[1]", "second": '{"content": "b", "role": "user"}'},
        ),
    ],
)
def test_each_field_that_differs_is_named(explain: Any, one: Any, other: Any, differs: Any) -> None:
    code, found = explain({"model": "m", **one}, {"model": "m", **other})
    assert (code, found["same_key"]) == (1, False)
    assert len(found["differences"]) == 1
    if differs is not None:
        assert found["differences"] == [differs]


def test_keys_that_differ_always_have_a_difference_to_show(explain: Any) -> None:
    headers = {"authorization": "Bearer one"}
    envelope = {"endpoint": CHAT, "body": BODY}
    variants = [
        {**envelope, "headers": headers},
        {**envelope, "headers": {"authorization": "Bearer two"}},
        {**envelope, "headers": {**headers, "openai-beta": "x"}},
        {**envelope, "query": "a=1"},
        {**envelope, "upstream": "https://b.example.com"},
        {**envelope, "namespace": "n"},
        {"endpoint": "/v1/completions", "body": BODY},
        {"endpoint": CHAT, "body": {**BODY, "endpoint": 1, "body": 2}},
        {"model": "m", "prompt": "Hi"},
    ]
    for number, one in enumerate(variants):
        for other in [envelope, *variants[:number]]:
            code, found = explain(one, other)
            assert code == 1
            assert found["differences"], (one, other)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b"", "is not JSON"),
        (b"[1]", "must hold a JSON object"),
        (b"\xff{}", "is not JSON"),
        (b"[" * 200_000, "nested too deep"),
        ({"model": ""}, "is no request: model must not be empty"),
        ({"prompt": "x"}, "is no request"),
        ({"model": "m", "prompt": "x", "messages": []}, "give a prompt or messages, not both"),
        ({"endpoint": "/v1/nothing", "body": {}}, "endpoint must be one of"),
        ({"endpoint": CHAT, "body": [1]}, "must be a JSON object, not an array"),
        ({"endpoint": CHAT, "body": {}, "more": 1}, "has 'more' beside its endpoint"),
        ({"endpoint": CHAT, "body": {}, "headers": []}, "headers must be an object"),
        ({"endpoint": [], "body": {}}, "endpoint must be one of"),
    ],
)
def test_bad_input_is_a_clear_error(explain: Any, request_: Any, says: str) -> None:
    code, printed = explain(request_)
    assert code == 1
    assert says in printed


def test_a_body_with_a_key_twice_is_refused_as_the_gateway_does(explain: Any) -> None:
    code, printed = explain(b'{"model": "m", "model": "n"}', options=("--endpoint", CHAT))
    assert code == 1
    assert "has the key 'model' twice" in printed


def test_wrong_usage_exits_with_2(explain: Any) -> None:
    code, printed = explain(BODY, options=("--endpoint", "/v1/nothing"))
    assert (code, "--endpoint must be one of" in printed) == (2, True)
    assert main(["explain", "-", "-"]) == 2


def test_for_people_it_prints_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, temperature in ((1, 0.7), (2, 0.8)):
        (tmp_path / f"{number}.json").write_text(
            json.dumps({"model": "m", "prompt": "x" * 99, "temperature": temperature})
        )
    assert main(["explain", str(tmp_path / "1.json")]) == 0
    printed = capsys.readouterr().out
    assert "  temperature  0.70\n" in printed
    assert "x... (99 characters)\n" in printed
    assert main(["explain", str(tmp_path / "1.json"), str(tmp_path / "2.json")]) == 1
    assert (
        "two keys, because of:\n  field        first  second\n  temperature  0.70   0.80\n" in capsys.readouterr().out
    )
