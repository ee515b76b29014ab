"""No answer crosses from one caller to another, unless the operator lets callers share; an error never does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from gateway_servers import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    Gateway,
    Reply,
    ask,
    connections_by_worker,
    question,
    run_gateway,
)
from stand_in_upstream import AT_ONCE, StandInUpstream

from llm_edge_cache.gateway.protocols import PROTOCOLS
from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.gateway.stand_in_faults import Plan

DIFFERENT = StandInSettings(answers="different", words=4, first_delay=0.0, word_delay=0.0)
SLOW = StandInSettings(answers="different", words=4, first_delay=0.5, word_delay=0.0, jitter=0.0)

CALLERS: list[dict[str, str]] = [
    {},
    {"authorization": "Bearer one"},
    {"authorization": "Bearer two"},
    {"authorization": "bearer one"},
    {"authorization": "Basic one"},
    {"x_api_key": "one"},
    {"x_api_key": "two"},
    {"api_key": "one"},
    {"x_goog_api_key": "one"},
    {"authorization": "Bearer one", "x_api_key": "one"},
    {"authorization": "Bearer one", "openai_organization": "a"},
    {"authorization": "Bearer one", "openai_organization": "b"},
    {"authorization": "Bearer one", "openai_project": "a"},
    {"cookie": "session=one"},
    {"cookie": "session=two"},
    {"proxy_authorization": "Basic one"},
    {"cf_aig_authorization": "Bearer one"},
    {"helicone_auth": "Bearer one"},
    {"x_portkey_api_key": "one"},
    {"x_litellm_api_key": "one"},
    {"x_auth_token": "one"},
    {"x_access_token": "one"},
    {"ocp_apim_subscription_key": "one"},
    {"x_amz_security_token": "one"},
    {"x_goog_user_project": "one"},
    {"anthropic_workspace_id": "one"},
    {"x_tenant_id": "one"},
    {"x_tenant_id": "two"},
]
"""Pairwise different in who asks, as some provider, relay or company sees it."""


@pytest.fixture
def different(gateway: Gateway) -> Gateway:
    """The provider never gives the same answer twice: equal bodies are one answer."""
    gateway.upstream.provider.settings = DIFFERENT
    return gateway


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with (
        StandInUpstream(AT_ONCE) as upstream,
        run_gateway(
            tmp_path_factory.mktemp("sharing"), upstream, workers=2, share_between_callers=True, l1=None
        ) as running,
    ):
        upstream.provider.settings = DIFFERENT
        yield running


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
def test_no_answer_crosses_from_one_caller_to_another(path: str, is_stream: bool, different: Gateway) -> None:
    body = question("what is mine?", path=path, stream=is_stream)
    callers = list(map(str, range(len(CALLERS))))

    async def everybody() -> dict[str, Reply]:
        replies = await asyncio.gather(*(ask(different.port, path, body, **CALLERS[int(one)]) for one in callers))
        return dict(zip(callers, replies, strict=True))

    first, second = asyncio.run(everybody()), asyncio.run(everybody())
    assert {reply.status for reply in first.values()} == {200}
    for one, other in itertools.combinations(callers, 2):
        assert first[one].body != first[other].body, (CALLERS[int(one)], CALLERS[int(other)])
    assert {one: reply.body for one, reply in second.items()} == {one: reply.body for one, reply in first.items()}
    assert {reply.cache for reply in second.values()} == {"HIT"}
    assert different.calls_of(path, body) == len(CALLERS)


def test_embeddings_do_not_cross_either(different: Gateway) -> None:
    body = question("what is mine?", path=EMBEDDINGS)

    async def main() -> list[str | None]:
        return [(await ask(different.port, EMBEDDINGS, body, **caller)).cache for caller in CALLERS * 2]

    assert asyncio.run(main()) == ["MISS"] * len(CALLERS) + ["HIT"] * len(CALLERS)


def test_who_asks_while_another_caller_s_call_is_under_way_does_not_join_it(gateway: Gateway) -> None:
    body = question("what comes?", stream=True)
    gateway.upstream.provider.settings = SLOW

    async def main() -> list[Reply]:
        callers = [{"authorization": f"Bearer {number % 5}"} for number in range(50)]
        return await asyncio.gather(*(ask(gateway.port, CHAT, body, **caller) for caller in callers))

    replies = asyncio.run(main())
    assert gateway.calls_of(CHAT, body) == 5
    for number in range(5):
        assert len({reply.body for reply in replies[number::5]}) == 1
    assert len({reply.body for reply in replies}) == 5


def test_a_credential_reaches_the_provider_but_not_the_cache(gateway: Gateway) -> None:
    reply = asyncio.run(ask(gateway.port, "/v1/echo", {}, authorization="Bearer secret-to-pass"))
    assert ["authorization", "Bearer secret-to-pass"] in reply.json["headers"]
    asyncio.run(ask(gateway.port, CHAT, question("a prompt to keep to oneself"), authorization="Bearer secret-to-keep"))
    assert "secret-to" not in gateway.server.log
    assert "a prompt to keep" not in gateway.server.log


# ---- where the operator lets callers share ----


def test_callers_share_where_they_may(sharing: Gateway) -> None:
    body = question("what is ours?")

    async def main() -> list[Reply]:
        return [await ask(sharing.port, CHAT, body, **caller) for caller in CALLERS]

    replies = asyncio.run(main())
    assert len({reply.body for reply in replies}) == 1
    assert [reply.cache for reply in replies] == ["MISS", *["HIT"] * (len(CALLERS) - 1)]
    assert sharing.calls_of(CHAT, body) == 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_even_then_nobody_gets_another_caller_s_error(
    is_stream: bool, sharing: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve ask at once; the provider refuses the first, as it would one whose key was revoked."""
    body = question("whose error?", stream=is_stream)
    provider = sharing.upstream.provider
    carry_out = provider._carry_out

    async def refuse_late(plan: Plan, *arguments: Any) -> None:
        if plan.status == 401:
            await asyncio.sleep(0.5)
        await carry_out(plan, *arguments)

    monkeypatch.setattr(provider, "_carry_out", refuse_late)

    async def main() -> list[Reply]:
        async with connections_by_worker(sharing, 6) as connections:
            first, *others = [one for many in connections.values() for one in many]
            refused = asyncio.create_task(first.ask(CHAT, body, authorization="Bearer revoked", x_stand_in_fault="401"))
            while not sharing.calls_of(CHAT, body):
                await asyncio.sleep(0.01)
            good = [one.ask(CHAT, body, authorization=f"Bearer {number}") for number, one in enumerate(others)]
            return await asyncio.gather(refused, *good)

    refused, *good = asyncio.run(main())
    assert refused.status == 401
    assert {reply.status for reply in good} == {200}


def test_callers_who_share_a_call_do_not_see_its_caller_s_own_headers(sharing: Gateway) -> None:
    body = question("whose headers?")
    private = [
        (b"content-type", b"application/json"),
        (b"set-cookie", b"session=hers"),
        (b"x-request-id", b"hers"),
        (b"openai-organization", b"hers"),
        (b"anthropic-organization-id", b"hers"),
        (b"x-ratelimit-remaining-requests", b"7"),
    ]
    provider = sharing.upstream.provider
    provider.settings = AT_ONCE
    plan = provider._make_up(PROTOCOLS[CHAT], body, "0" * 12)
    sharing.plan(CHAT, body, Plan(200, tuple(private), plan.chunks))

    async def main() -> list[Reply]:
        return await asyncio.gather(*(ask(sharing.port, CHAT, body, authorization=f"{n}") for n in range(10)))

    replies = asyncio.run(main())
    provider.settings = DIFFERENT
    own = [reply for reply in replies if "hers" in str(reply.headers)]
    assert [reply.cache for reply in own] == ["MISS"]
    assert [reply for reply in replies if reply.all("x-ratelimit-remaining-requests")] == own
