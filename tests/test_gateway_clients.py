"""The official clients get through the gateway exactly what they get without it, for every recorded exchange."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import anthropic
import openai
import pytest
from gateway_servers import CHAT, COMPLETIONS, EMBEDDINGS, INVENTED, MESSAGES, RECORDED, RESPONSES, Gateway, recordings
from stand_in_upstream import protocol_of, read_recordings, request_bytes

from llm_edge_cache.gateway.protocols import PROTOCOLS, FrameSplitter, Verdict, cache_key, parse_body
from llm_edge_cache.gateway.stand_in import recording_key
from llm_edge_cache.gateway.stand_in_faults import Plan

# Recordings name models that their clients call deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(600)]

SAMPLE = int(os.environ.get("LLM_EDGE_CACHE_RECORDINGS", "120"))
"""Exchanges that each face of the clients replays: the invented ones first; 0: all, of which there are hundreds."""
AT_ONCE = 16  # requests of the asynchronous clients under way


class Case(NamedTuple):
    """One question to ask."""

    name: str
    path: str
    body: dict[str, Any]
    is_kept: bool
    """Is the answer to be found in the cache afterwards?"""


class Outcome(NamedTuple):
    """What a caller gets."""

    value: Any
    """The answer, a stream's events, or the error: as the client's own objects tell it."""
    cache: str | None
    """X-Cache."""


# ---- which questions ----


def verdict_of(path: str, plan: Plan) -> Verdict:
    protocol, headers, body = PROTOCOLS[path], list(plan.headers), b"".join(plan.chunks)
    if not plan.is_paced:
        return protocol.judge(plan.status, headers, body)
    judge, splitter = protocol.stream_judge(plan.status, headers), FrameSplitter()
    for frame in splitter.feed(body):
        judge.feed(frame)
    return judge.finish(splitter.rest())


def cases() -> list[Case]:
    """Every question once: of those that the gateway takes for the same, the first."""
    plans, found = recordings(), dict[str, Case]()
    for row in [*read_recordings(INVENTED), *(read_recordings(RECORDED) if RECORDED.is_dir() else ())]:
        protocol = protocol_of(row)
        assert protocol is not None
        raw = request_bytes(row)
        parsed = parse_body(raw)
        plan = plans[recording_key(protocol.path, raw)]
        is_kept = verdict_of(protocol.path, plan).storable and protocol.bypass_reason(parsed) is None
        case = Case(row["id"], protocol.path, row["request_json"], is_kept)
        found.setdefault(cache_key(protocol.path, b"", "", [], parsed), case)
    return sampled(found.values())


def sampled(every: Iterable[Case]) -> list[Case]:
    """All invented ones, and of the recorded ones as many as wanted: always the same."""
    ordered = sorted(every, key=lambda case: (" " not in case.name, hashlib.sha256(case.name.encode()).digest()))
    return ordered if SAMPLE == 0 else ordered[:SAMPLE]


# ---- asking them ----


def method_of(client: Any, path: str) -> Any:
    """The client's method for an endpoint, in the form that shows the answer's headers as well."""
    resource = {
        CHAT: lambda: client.chat.completions,
        COMPLETIONS: lambda: client.completions,
        RESPONSES: lambda: client.responses,
        EMBEDDINGS: lambda: client.embeddings,
        MESSAGES: lambda: client.messages,
    }[path]()
    return resource.create, resource.with_raw_response.create


def arguments_of(method: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    """A recorded body as arguments: what the method has no name for goes as an extra field, as its manual says."""
    known = inspect.signature(method).parameters
    extra = {name: value for name, value in body.items() if name not in known}
    return {**{name: body[name] for name in body if name in known}, **({"extra_body": extra} if extra else {})}


def told(value: Any) -> Any:
    return value.model_dump(warnings=False) if hasattr(value, "model_dump") else repr(value)


def failure_of(error: Any) -> Outcome:
    status, body = getattr(error, "status_code", None), getattr(error, "body", None)
    response = getattr(error, "response", None)
    return Outcome((type(error).__name__, status, body), response.headers.get("x-cache") if response else None)


def ask(client: Any, case: Case) -> Outcome:
    plain, raw = method_of(client, case.path)
    events: list[Any] = []
    try:
        response = raw(**arguments_of(plain, case.body))
        value = response.parse()
        if not case.body.get("stream"):
            return Outcome(told(value), response.headers.get("x-cache"))
        events.extend(told(event) for event in value)
        return Outcome(events, response.headers.get("x-cache"))
    except Exception as error:  # of whatever kind, in mid-stream as well: what counts is that it is the same
        failure = failure_of(error)
        return failure._replace(value=(*events, failure.value))


async def ask_async(client: Any, case: Case) -> Outcome:
    plain, raw = method_of(client, case.path)
    events: list[Any] = []
    try:
        response = await raw(**arguments_of(plain, case.body))
        parsed = response.parse()
        value = await parsed if inspect.isawaitable(parsed) else parsed
        if not case.body.get("stream"):
            return Outcome(told(value), response.headers.get("x-cache"))
        async for event in value:
            events.append(told(event))  # noqa: PERF401 - what came before an error counts
        return Outcome(events, response.headers.get("x-cache"))
    except Exception as error:
        failure = failure_of(error)
        return failure._replace(value=(*events, failure.value))


def asked_one_by_one(url: str, key: str, wanted: list[Case]) -> list[Outcome]:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as one,
        anthropic.Anthropic(base_url=url, api_key=key, max_retries=0) as other,
    ):
        return [ask(other if case.path == MESSAGES else one, case) for case in wanted]


def asked_at_once(url: str, key: str, wanted: list[Case]) -> list[Outcome]:
    async def main() -> list[Outcome]:
        places = asyncio.Semaphore(AT_ONCE)
        async with (
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as one,
            anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0) as other,
        ):

            async def ask_in_turn(case: Case) -> Outcome:
                async with places:
                    return await ask_async(other if case.path == MESSAGES else one, case)

            return await asyncio.gather(*map(ask_in_turn, wanted))

    return asyncio.run(main())


FACES = pytest.mark.parametrize("asked", [asked_one_by_one, asked_at_once], ids=["sync", "async"])


# ---- what must be true ----


def expressible(gateway: Gateway, wanted: list[Case]) -> list[Case]:
    """The questions that a client can ask to the letter: some it sends with a field more, or not at all."""
    tally = gateway.upstream.provider.tally.by_question
    asked_at_once(gateway.upstream.url, "nobody's", wanted)
    return [case for case in wanted if tally[recording_key(case.path, json.dumps(case.body).encode())] > 0]


@FACES
def test_the_clients_get_through_the_gateway_what_they_get_without_it(
    asked: Callable[[str, str, list[Case]], list[Outcome]], gateway: Gateway
) -> None:
    every = cases()
    wanted = expressible(gateway, every)
    assert len(wanted) >= 0.95 * len(every)
    key = f"key of {asked.__name__}"
    direct = asked(gateway.upstream.url, key, wanted)
    before = gateway.calls()
    first = asked(gateway.url, key, wanted)
    calls_first = gateway.calls() - before
    second = asked(gateway.url, key, wanted)

    for case, plain, passed, again in zip(wanted, direct, first, second, strict=True):
        assert passed.value == plain.value, case
        assert again.value == plain.value, case
        assert passed.cache != "HIT", case
        assert (again.cache == "HIT") == case.is_kept, case
    assert calls_first == len(wanted)
    assert gateway.calls() - before == len(wanted) + sum(not case.is_kept for case in wanted)
    assert any(case.is_kept for case in wanted)
    assert not all(case.is_kept for case in wanted)
