"""Requests are read alike the first time and every further time, and what is remembered of them tells nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_edge_cache.gateway import exchange
from llm_edge_cache.gateway.config import GatewayConfig
from llm_edge_cache.gateway.exchange import Exchange, ExchangeReader
from llm_edge_cache.gateway.protocols import PROTOCOLS, BadRequestError

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
CONFIG = GatewayConfig(upstream="http://127.0.0.1:1")
BODY = b'{"model":"m","messages":[]}'
KEY = (b"authorization", b"Bearer one")


def read(
    reader: ExchangeReader,
    raw: bytes = BODY,
    *headers: tuple[bytes, bytes],
    path: str = CHAT,
    query: bytes = b"",
) -> Exchange:
    scope: dict[str, Any] = {"path": path, "query_string": query, "headers": list(headers)}
    return reader.read(PROTOCOLS[path], scope, raw)


OTHERS: list[dict[str, Any]] = [
    {"raw": b'{"model":"m","messages":[{}]}'},
    {"raw": BODY, "path": MESSAGES},
    {"raw": BODY, "query": b"a=1"},
    {"headers": [(b"authorization", b"Bearer two")]},
    {"headers": [(b"x-api-key", b"Bearer one")]},
    {"headers": [KEY, KEY]},
    {"headers": [KEY, (b"openai-beta", b"tools")]},
    {"headers": [KEY, (b"helicone-cache-seed", b"s")]},
    {"raw": b'{"model":"m","messages":[],"cache":{"namespace":"n"}}'},
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_whatever_counts_for_the_key_is_another_request_to_the_memory_too(other: dict[str, Any]) -> None:
    reader = ExchangeReader(CONFIG)
    first = read(reader, BODY, KEY)
    other = {"raw": BODY, "headers": [KEY], **other}
    raw, headers = other.pop("raw"), other.pop("headers")
    again = read(reader, raw, *headers, **other)
    assert again.key != first.key
    assert again.key == read(ExchangeReader(CONFIG), raw, *headers, **other).key


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ((b"cache-control", b"no-cache"), "no_cache"),
        ((b"cache-control", b"no-store"), "no_store"),
        ((b"x-openrouter-cache", b"false"), "is_off"),
    ],
)
def test_a_control_in_the_headers_is_not_forgotten_over_a_request_without_it(
    header: tuple[bytes, bytes], field: str
) -> None:
    reader = ExchangeReader(CONFIG)
    plain, asking = read(reader, BODY, KEY), read(reader, BODY, KEY, header)
    assert not getattr(plain.controls, field)
    assert getattr(asking.controls, field)
    assert not getattr(read(reader, BODY, KEY).controls, field)


def test_the_second_reading_is_the_first_one() -> None:
    reader = ExchangeReader(CONFIG)
    raw = json.dumps({"model": "m", "messages": [], "stream": True, "store": True, "cache": {"ttl": 5}}).encode()
    first, again = read(reader, raw, KEY), read(reader, raw, (b"user-agent", b"another"), KEY)
    for one in (first, again):
        assert one.is_stream
        assert one.bypass == "store"
        assert one.controls.ttl == 5
        assert json.loads(one.body) == {"model": "m", "messages": [], "stream": True, "store": True}
    assert again.key == first.key


def test_what_goes_to_the_upstream_is_of_this_request_not_of_the_one_that_was_remembered() -> None:
    reader = ExchangeReader(CONFIG)
    read(reader, BODY, KEY, (b"x-request-id", b"1"))
    again = read(reader, BODY, KEY, (b"x-request-id", b"2"), (b"cache-control", b"x"), (b"connection", b"close"))
    assert again.headers == [KEY, (b"x-request-id", b"2"), (b"accept-encoding", b"identity")]
    assert again.body == BODY


def test_tags_are_no_part_of_the_key_and_stay_here() -> None:
    reader = ExchangeReader(CONFIG)
    plain, tagged = read(reader, BODY, KEY), read(reader, BODY, KEY, (b"x-cache-tags", b"a, b"))
    assert tagged.key == plain.key
    assert (plain.controls.tags, tagged.controls.tags) == ((), ("a", "b"))
    assert tagged.headers == plain.headers


def test_the_tag_of_a_namespace_goes_before_the_others() -> None:
    headers = [(b"x-cache-tags", b"a,b"), (b"x-portkey-cache-namespace", "\u00e9".encode())]
    assert read(ExchangeReader(CONFIG), BODY, *headers).controls.tags == ("namespace:\u00e9", "a", "b")


def test_an_operator_may_not_want_tags_of_callers() -> None:
    config = GatewayConfig(upstream="http://127.0.0.1:1", obey_controls=frozenset({"namespace"}))
    headers = [(b"x-cache-tags", b"a,b"), (b"x-portkey-cache-namespace", b"n")]
    assert read(ExchangeReader(config), BODY, *headers).controls.tags == ("namespace:n",)


def test_a_bad_request_stays_bad() -> None:
    reader = ExchangeReader(CONFIG)
    for _ in range(2):
        with pytest.raises(BadRequestError):
            read(reader, b"{")


def test_no_more_is_remembered_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "_MOST_KNOWN", 10)
    monkeypatch.setattr(exchange, "_MOST_NAMES", 10)
    reader = ExchangeReader(CONFIG)
    for number in range(100):
        read(reader, b'{"model":"%d"}' % number, (b"x-%d" % number, b"1"))
        assert len(reader._known) <= 10
        assert len(reader._ordinary) <= 10


def test_neither_prompts_nor_credentials_are_kept() -> None:
    reader = ExchangeReader(CONFIG)
    read(reader, b'{"model":"m","messages":[{"content":"secret prompt"}]}', (b"authorization", b"secret key"))
    assert len(reader._known) == 1
    assert "secret" not in repr((reader._known, reader._ordinary))
