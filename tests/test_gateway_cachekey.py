"""The key depends on everything that an answer may depend on, and on nothing else."""

from __future__ import annotations

import pytest

from llm_edge_cache import CacheableRequest, generate_cache_key
from llm_edge_cache.gateway.protocols import SHARED_SCOPE, Headers, cache_key, caller_scope, parse_body
from llm_edge_cache.gateway.protocols.cachekey import is_caller_header

BODY = parse_body(b'{"model":"m","messages":[]}')


def key(
    *,
    endpoint: str = "/v1/messages",
    query: bytes = b"",
    upstream: str = "https://one",
    headers: Headers = (),
    body: bytes = BODY.raw,
    scope: str = SHARED_SCOPE,
) -> str:
    return cache_key(endpoint, query, upstream, headers, parse_body(body), scope=scope)


def test_a_key_is_64_lower_case_hexadecimal_digits_and_stays_what_it_is() -> None:
    # Written down: a change here makes every stored answer unreachable, and needs another KEY_VERSION.
    assert key() == "b514585024ffca8a05812608c2ae5ee2eb21ed76acf74a644e8a2adf84933295"


@pytest.mark.parametrize(
    "changed",
    [
        {"endpoint": "/v1/completions"},
        {"query": b"beta=true"},
        {"upstream": "https://two"},
        {"headers": [(b"anthropic-version", b"2023-06-01")]},
        {"headers": [(b"anthropic-beta", b"tools")]},
        {"headers": [(b"openai-beta", b"tools")]},
        {"body": b'{"model":"m"}'},
        {"scope": caller_scope([])},
    ],
    ids=str,
)
def test_every_part_counts(changed: dict[str, object]) -> None:
    assert key(**changed) != key()  # type: ignore[arg-type]


def test_no_part_runs_into_the_next() -> None:
    assert key(upstream="ab", scope="c") != key(upstream="a", scope="bc")
    assert key(endpoint="/v1/messages?", query=b"a") != key(endpoint="/v1/messages", query=b"?a")
    assert key(headers=[(b"anthropic-version", b"1")]) != key(headers=[(b"anthropic-beta", b"1")])


def test_the_query_counts_exactly_as_it_was_sent() -> None:
    assert len({key(query=query) for query in (b"a=1&b=2", b"b=2&a=1", b"a=1&b=%32", b"\xff")}) == 4


def test_other_headers_do_not_count() -> None:
    assert key(headers=[(b"user-agent", b"x"), (b"authorization", b"x"), (b"x-stainless-lang", b"python")]) == key()


def test_beta_headers_are_sets_over_all_their_lines() -> None:
    spellings = [
        [(b"anthropic-beta", b"one,two")],
        [(b"anthropic-beta", b" two , one ")],
        [(b"anthropic-beta", b"two"), (b"accept", b"*/*"), (b"anthropic-beta", b"one")],
        [(b"anthropic-beta", b"one,one,two")],
    ]
    assert len({key(headers=headers) for headers in spellings}) == 1
    assert key(headers=[(b"anthropic-beta", b"one")]) != key(headers=spellings[0])


def test_a_version_header_is_no_list() -> None:
    assert key(headers=[(b"anthropic-version", b"a,b")]) != key(headers=[(b"anthropic-version", b"b,a")])


def test_a_stream_and_a_plain_answer_are_two_entries() -> None:
    assert key(body=b'{"model":"m","stream":true}') != key(body=b'{"model":"m","stream":false}')


def test_a_gateway_s_key_is_no_library_s_key() -> None:
    assert key() != generate_cache_key(CacheableRequest("m", messages=[]))


# ---- scopes ----


@pytest.mark.parametrize(
    "name", [b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"openai-organization", b"openai-project"]
)
def test_whoever_asks_has_a_scope_of_their_own(name: bytes) -> None:
    scopes = {caller_scope([(name, value), (b"accept", b"*/*")]) for value in (b"one", b"two", b"")}
    assert len(scopes | {caller_scope([]), SHARED_SCOPE}) == 5


def test_what_a_relay_calls_its_credential_counts_and_what_every_client_sends_does_not() -> None:
    assert is_caller_header(b"cf-aig-authorization")
    assert is_caller_header(b"ocp-apim-subscription-key")
    assert is_caller_header(b"cookie")
    for name in (b"user-agent", b"accept", b"host", b"x-stainless-retry-count", b"anthropic-version", b"traceparent"):
        assert not is_caller_header(name)


def test_a_scope_depends_on_which_header_holds_the_credential_and_on_no_other_header() -> None:
    assert caller_scope([(b"x-api-key", b"one")]) != caller_scope([(b"api-key", b"one")])
    assert caller_scope([(b"x-api-key", b"1"), (b"date", b"x")]) == caller_scope(
        [(b"date", b"y"), (b"x-api-key", b"1")]
    )


def test_a_scope_shows_nothing_of_the_credential() -> None:
    scope = caller_scope([(b"authorization", b"Bearer secret")])
    assert len(scope) == 64
    assert "secret" not in scope


def test_two_credentials_at_once_are_a_third_caller() -> None:
    one, two = (b"authorization", b"a"), (b"x-api-key", b"b")
    assert len({caller_scope([one]), caller_scope([two]), caller_scope([one, two])}) == 3
    assert caller_scope([one, two]) == caller_scope([two, one])
