"""What the headers tell of the cache, on every kind of answer; and what of the original is never replayed."""

from __future__ import annotations

import asyncio
import re

import pytest
from gateway_servers import CHAT, MESSAGES, RESPONSES, Gateway, Reply, ask, connections_by_worker, error_of, question

from llm_edge_cache.gateway.protocols import PROTOCOLS
from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.gateway.stand_in_faults import Plan

SLOW = StandInSettings(words=10, first_delay=0.3, word_delay=0.02, jitter=0.0)
PRIVATE = {
    "set-cookie": "session=hers",
    "x-request-id": "req_hers",
    "request-id": "req_hers",
    "cf-ray": "hers",
    "x-ratelimit-remaining-tokens": "77",
    "anthropic-ratelimit-requests-remaining": "77",
    "retry-after": "77",
    "openai-organization": "hers",
    "anthropic-organization-id": "hers",
    "via": "1.1 hers",
    "date": "Thu, 01 Jan 1970 00:00:00 GMT",
    "strict-transport-security": "max-age=77",
    "x-unheard-of": "hers",
}
HOP_BY_HOP = {"keep-alive": "timeout=77", "proxy-authenticate": "Basic", "trailer": "x-late", "x-named": "hers"}

# RFC 9211, section 2: a list of caches, each a name with parameters; here of those that we use.
PARAMETER = re.compile(
    r"(?P<hit>hit)|(?P<collapsed>collapsed)|fwd=(?P<fwd>bypass|method|uri-miss|vary-miss|miss|request|stale|partial)"
    r"|ttl=(?P<ttl>-?\d+)|fwd-status=\d{3}|detail=(?P<detail>[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*)"
)


def cache_status(reply: Reply) -> dict[str, str]:
    """Our entry in Cache-Status, which is the last."""
    members = ", ".join(reply.all("cache-status")).split(", ")
    name, *parameters = members[-1].split("; ")
    assert name == "llm-edge-cache"
    found: dict[str, str] = {}
    for parameter in parameters:
        match = PARAMETER.fullmatch(parameter)
        assert match, parameter
        found.update({key: value for key, value in match.groupdict().items() if value is not None})
    assert ("hit" in found) != ("fwd" in found), "a hit, or forwarded, and never both"
    return found


def run(gateway: Gateway, path: str, body: object, **headers: str) -> Reply:
    return asyncio.run(ask(gateway.port, path, body, **headers))


STREAM = pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])


@STREAM
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_miss_and_a_hit_are_told(path: str, is_stream: bool, gateway: Gateway) -> None:
    body = question("told?", path=path, stream=is_stream)
    miss, hit = run(gateway, path, body), run(gateway, path, body)

    assert cache_status(miss)["fwd"] == "uri-miss"
    assert miss.all("x-cache") == ["MISS"]
    assert miss.get("age") is miss.get("x-cache-tier") is None

    assert cache_status(hit)["hit"]
    assert 3590 <= int(cache_status(hit)["ttl"]) <= 3600
    assert hit.all("x-cache") == ["HIT"]
    assert hit.all("x-cache-tier") == ["l1"]
    assert 0 <= int(hit.get("age") or -1) < 10

    assert re.fullmatch("[0-9a-f]{64}", miss.get("x-cache-key") or "")
    assert hit.all("x-cache-key") == miss.all("x-cache-key")
    assert hit.get("content-type") == miss.get("content-type")


@STREAM
def test_who_joins_a_call_is_told_so_in_every_worker(is_stream: bool, gateway: Gateway) -> None:
    body = question("joined?", stream=is_stream)
    gateway.upstream.provider.settings = SLOW

    async def main() -> list[Reply]:
        async with connections_by_worker(gateway, 2) as connections:
            everybody = [one for many in connections.values() for one in many]
            return await asyncio.gather(*(one.ask(CHAT, body) for one in everybody))

    replies = asyncio.run(main())
    joined = [reply for reply in replies if reply.cache == "COALESCED"]
    assert len(joined) == len(replies) - 1
    for reply in joined:
        assert cache_status(reply) == {"fwd": "uri-miss", "collapsed": "collapsed"}
        assert reply.get("age") is reply.get("x-cache-tier") is None
        assert reply.get("x-cache-key") == replies[0].get("x-cache-key")


@STREAM
def test_a_bypass_is_told_with_its_reason(is_stream: bool, gateway: Gateway) -> None:
    reply = run(gateway, RESPONSES, question("kept there", path=RESPONSES, stream=is_stream, store=True))
    assert cache_status(reply) == {"fwd": "bypass", "detail": "store"}
    assert reply.all("x-cache") == ["BYPASS"]
    assert reply.get("x-cache-key") is None


def test_what_the_request_forbids_is_told(gateway: Gateway) -> None:
    body = question("not from the cache?")
    run(gateway, CHAT, body)
    fresh = run(gateway, CHAT, body, cache_control="no-cache")
    assert (cache_status(fresh)["fwd"], fresh.cache) == ("request", "MISS")
    absent = run(gateway, CHAT, question("never asked"), cache_control="only-if-cached")
    assert (absent.status, cache_status(absent)["detail"]) == (504, "only-if-cached")
    assert error_of(CHAT, absent).message


@STREAM
def test_a_failure_of_the_upstream_is_told_as_a_miss(is_stream: bool, gateway: Gateway) -> None:
    reply = run(gateway, CHAT, question("failing?", stream=is_stream), x_stand_in_fault="drop-before")
    assert (reply.status, reply.cache, cache_status(reply)["fwd"]) == (502, "MISS", "uri-miss")


@STREAM
def test_what_was_one_client_s_own_is_not_replayed(is_stream: bool, gateway: Gateway) -> None:
    body = question("whose is it?", stream=is_stream)
    provider = gateway.upstream.provider
    sound = provider._make_up(PROTOCOLS[CHAT], body, "0" * 12)
    sent = {**PRIVATE, **HOP_BY_HOP, "connection": "keep-alive, x-named", "openai-version": "2020-10-01"}
    extra = tuple((name.encode(), value.encode()) for name, value in sent.items())
    gateway.plan(CHAT, body, Plan(200, (*sound.headers, *extra), sound.chunks, is_paced=True))
    provider.settings = SLOW

    async def main() -> tuple[list[Reply], Reply]:
        async with connections_by_worker(gateway, 2) as connections:
            everybody = [one for many in connections.values() for one in many]
            return await asyncio.gather(*(one.ask(CHAT, body) for one in everybody)), await ask(
                gateway.port, CHAT, body
            )

    replies, hit = asyncio.run(main())
    [own] = [reply for reply in replies if reply.cache == "MISS"]
    assert dict(own.headers).items() >= PRIVATE.items()
    for reply in (*replies, hit):
        assert "77" not in [value for name, value in reply.headers if name == "keep-alive"]
        assert {name for name, _ in reply.headers}.isdisjoint(HOP_BY_HOP)
        if reply is not own:
            assert {name for name, _ in reply.headers}.isdisjoint(PRIVATE)
            assert reply.get("openai-version") == "2020-10-01"
    assert hit.cache == "HIT"


def test_what_caches_before_us_told_stands_before_what_we_tell(gateway: Gateway) -> None:
    body = question("cached before?")
    sound = gateway.upstream.provider._make_up(PROTOCOLS[CHAT], body, "0" * 12)
    before = ((b"cache-status", b"cdn; hit"), (b"x-cache", b"HIT"), (b"x-cache-key", b"theirs"), (b"age", b"9"))
    gateway.plan(CHAT, body, Plan(200, (*sound.headers, *before), sound.chunks))
    miss, hit = run(gateway, CHAT, body), run(gateway, CHAT, body)
    assert miss.all("cache-status")[0] == "cdn; hit"
    assert cache_status(miss)["fwd"] == "uri-miss"
    assert miss.all("x-cache") == ["MISS"]
    assert len(miss.all("x-cache-key")) == 1
    assert len(hit.all("age")) == len(hit.all("x-cache")) == len(hit.all("cache-status")) == 1
