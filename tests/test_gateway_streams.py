"""One stream for everybody who asks for it, in whichever worker, whoever dies meanwhile.

The provider's answers all differ, each with an identity of its own in every event, so parts of two would be seen.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from gateway_servers import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    Connection,
    Gateway,
    Reply,
    ask,
    connections_by_worker,
    last_error,
    question,
    request_bytes,
)
from worker_servers import PATIENCE_SECONDS, is_running

from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.gateway.stand_in_faults import Plan

DIFFERENT = StandInSettings(answers="different", words=30, first_delay=0.2, word_delay=0.03, jitter=0.0)
# Until the test hurries.
SLOW_TO_BEGIN = StandInSettings(answers="different", words=10, first_delay=60.0, word_delay=0.01, jitter=0.0)
SLOW_TO_END = StandInSettings(answers="different", words=600, first_delay=0.0, word_delay=0.1, jitter=0.0)
IDENTITY = re.compile(rb"(?:stand[-_]in)[-_](\d+-[0-9a-f]{8})")

Run = Callable[[StandInSettings, Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture
def run(gateway: Gateway) -> Run:
    """Run a test's coroutine while the provider has these settings."""

    def run_it(settings: StandInSettings, main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        gateway.upstream.provider.settings = settings
        asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))

    return run_it


def identities(reply: Reply) -> set[bytes]:
    """The answers of which a client received any part."""
    return set(IDENTITY.findall(reply.body))


async def until(is_so: Callable[[], object]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


class Reading:
    """A client that reads a stream in the background."""

    def __init__(self, connection: Connection, path: str, body: dict[str, Any]) -> None:
        self.connection = connection
        self.reply: Reply | None = None
        self.task = asyncio.create_task(self._read(request_bytes("POST", path, body)))

    async def _read(self, data: bytes) -> Reply | None:
        await self.connection.send(data)
        try:
            self.reply = await self.connection.head()
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return await self.connection.body(self.reply)

    def has_part(self) -> bool:
        return self.reply is not None and bool(self.reply.parts)

    async def end(self) -> Reply:
        reply = await self.task
        assert reply is not None, "the connection was cut before anything was sent"
        return reply


# ---- nobody dies ----


@pytest.mark.parametrize(("path", "clients"), [(CHAT, 200), (MESSAGES, 200), (RESPONSES, 40), (COMPLETIONS, 40)])
def test_of_many_who_ask_one_missing_question_one_call_is_made(
    path: str, clients: int, gateway: Gateway, run: Run
) -> None:
    body = question(f"asked by {clients}", path=path, stream=True)

    async def main() -> None:
        replies = await asyncio.gather(*(ask(gateway.port, path, body) for _ in range(clients)))
        assert gateway.calls_of(path, body) == 1
        assert {reply.status for reply in replies} == {200}
        assert all(reply.is_whole for reply in replies)
        assert len({reply.body for reply in replies}) == 1
        assert len(identities(replies[0])) == 1
        assert last_error(path, replies[0]) is None
        assert len({reply.worker for reply in replies}) > 1
        assert [reply.cache for reply in replies].count("MISS") == 1
        again = await ask(gateway.port, path, body)
        assert (again.cache, again.body) == ("HIT", replies[0].body)

    run(DIFFERENT, main)


def test_who_comes_late_gets_what_has_come_so_far_and_then_the_rest_as_it_comes(gateway: Gateway, run: Run) -> None:
    body = question("who comes late?", stream=True)

    async def main() -> None:
        async with connections_by_worker(gateway, 2) as connections:
            (lead, near), *others = connections.values()
            leader = Reading(lead, CHAT, body)
            await until(lambda: leader.has_part() and leader.reply and len(leader.reply.parts) > 10)
            followers = [Reading(one, CHAT, body) for one in (near, *(one for one, _ in others))]
            await until(lambda: all(reading.reply and len(reading.reply.parts) > 10 for reading in followers))
            gateway.upstream.is_hurried = True
            replies = [await reading.end() for reading in (leader, *followers)]
        assert len({reply.body for reply in replies}) == 1
        last = replies[0].parts[-1][0]
        for reply in replies[1:]:
            assert reply.parts[0][0] < last
            assert len(reply.parts) > 10, "it came in one piece"
        assert [reply.cache for reply in replies] == ["MISS", *["COALESCED"] * 4]

    run(SLOW_TO_END, main)


def test_a_whole_answer_is_asked_for_once_too(gateway: Gateway, run: Run) -> None:
    body = question("in one piece?")

    async def main() -> None:
        replies = await asyncio.gather(*(ask(gateway.port, CHAT, body) for _ in range(100)))
        assert gateway.calls_of(CHAT, body) == 1
        assert {(reply.status, reply.body) for reply in replies} == {(200, replies[0].body)}

    run(DIFFERENT, main)


# ---- the leader's client dies ----


@pytest.mark.parametrize("settings", [SLOW_TO_BEGIN, SLOW_TO_END], ids=["before the first byte", "in mid-stream"])
def test_the_leader_s_client_hangs_up_and_everybody_else_gets_the_whole_answer(
    settings: StandInSettings, gateway: Gateway, run: Run
) -> None:
    body = question(f"who hangs up? {settings}", stream=True)

    async def main() -> None:
        async with connections_by_worker(gateway, 11) as connections:
            leader_connection, *others = [one for many in connections.values() for one in many]
            leader = Reading(leader_connection, CHAT, body)
            await until(lambda: gateway.calls_of(CHAT, body))
            followers = [Reading(one, CHAT, body) for one in others]
            if settings is SLOW_TO_END:
                await until(lambda: leader.has_part() and all(reading.has_part() for reading in followers))
            else:
                await asyncio.sleep(0.3)
            leader.connection.writer.transport.abort()
            gateway.upstream.is_hurried = True
            replies = [await reading.end() for reading in followers]
            await leader.task
        assert gateway.calls_of(CHAT, body) == 1
        assert all(reply.is_whole for reply in replies)
        assert len({reply.body for reply in replies}) == 1
        assert replies[0].body.endswith(b"data: [DONE]\n\n")
        again = await ask(gateway.port, CHAT, body)
        assert (again.cache, again.body) == ("HIT", replies[0].body)

    run(settings, main)


@pytest.mark.parametrize("is_stream", [True, False])
def test_what_nobody_waits_for_any_more_is_read_to_its_end_and_stored(
    is_stream: bool, gateway: Gateway, run: Run
) -> None:
    body = question("is anybody there?", stream=is_stream)

    async def main() -> None:
        before = gateway.upstream.provider.tally.completed
        connection = await Connection.open(gateway.port)
        await connection.send(request_bytes("POST", CHAT, body))
        await until(lambda: gateway.calls_of(CHAT, body))
        connection.writer.transport.abort()
        await until(lambda: gateway.upstream.provider.tally.completed > before)
        reply = await ask(gateway.port, CHAT, body)
        if reply.cache == "COALESCED":  # the last of it is just being read
            reply = await ask(gateway.port, CHAT, body)
        assert reply.cache == "HIT"
        assert gateway.calls_of(CHAT, body) == 1

    run(DIFFERENT, main)


# ---- the leader's worker dies ----


async def led_by_one_worker(
    connections: dict[int, list[Connection]], path: str, body: dict[str, Any], is_asked: Callable[[], object]
) -> tuple[int, Reading, list[Reading]]:
    """A question that one worker asks, and in which all other workers' clients have joined."""
    leading, *_ = connections
    leader = Reading(connections[leading][0], path, body)
    await until(is_asked)
    others = [one for pid, many in connections.items() if pid != leading for one in many]
    return leading, leader, [Reading(one, path, body) for one in others]


def test_a_worker_dies_before_the_first_byte_and_all_others_get_one_second_answer(gateway: Gateway, run: Run) -> None:
    body = question("who dies first?", stream=True)

    async def main() -> None:
        async with connections_by_worker(gateway, 15) as connections:
            victim, leader, followers = await led_by_one_worker(
                connections, CHAT, body, lambda: gateway.calls_of(CHAT, body)
            )
            await asyncio.sleep(0.4)  # they have joined
            os.kill(victim, signal.SIGKILL)
            gateway.upstream.is_hurried = True
            replies = [await reading.end() for reading in followers]
            assert await leader.task is None
        assert gateway.calls_of(CHAT, body) == 2
        assert {(reply.status, reply.is_whole) for reply in replies} == {(200, True)}
        assert len({reply.body for reply in replies}) == 1
        assert len(identities(replies[0])) == 1
        assert last_error(CHAT, replies[0]) is None
        again = await ask(gateway.port, CHAT, body)
        assert (again.cache, again.body) == ("HIT", replies[0].body)

    run(SLOW_TO_BEGIN, main)
    gateway.wait_ready()


def test_a_worker_dies_between_the_headers_and_the_first_event_and_all_others_get_a_second_answer(
    gateway: Gateway, run: Run
) -> None:
    body = question("who dies between?", stream=True)
    last = b'data: {"choices":[{"index":0,"delta":{"content":"late"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    head = ((b"content-type", b"text/event-stream"),)
    gateway.plan(CHAT, body, Plan(200, head, (b"", last), is_paced=True))  # the pause is before the second

    async def main() -> None:
        async with connections_by_worker(gateway, 5) as connections:
            victim, leader, followers = await led_by_one_worker(
                connections, CHAT, body, lambda: gateway.calls_of(CHAT, body)
            )
            await until(lambda: leader.reply)  # its headers
            await asyncio.sleep(0.3)
            os.kill(victim, signal.SIGKILL)
            gateway.upstream.is_hurried = True
            replies = [await reading.end() for reading in followers]
            await leader.task
        assert gateway.calls_of(CHAT, body) == 2
        assert {(reply.status, reply.is_whole, reply.body) for reply in replies} == {(200, True, last)}

    run(StandInSettings(first_delay=0.0, word_delay=60.0, jitter=0.0), main)
    gateway.wait_ready()


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_worker_dies_in_mid_stream_and_no_client_gets_parts_of_two_answers(
    path: str, gateway: Gateway, run: Run
) -> None:
    body = question("who dies in mid-stream?", path=path, stream=True)

    async def main() -> None:
        async with connections_by_worker(gateway, 10) as connections:
            victim, leader, followers = await led_by_one_worker(
                connections, path, body, lambda: gateway.calls_of(path, body)
            )
            await until(lambda: leader.has_part() and all(reading.has_part() for reading in followers))
            os.kill(victim, signal.SIGKILL)
            cut = await leader.end()
            gateway.upstream.is_hurried = True
            broken = [await reading.end() for reading in followers]
            whole = await asyncio.gather(*(ask(gateway.port, path, body) for _ in range(10)))
        assert not cut.is_whole
        for reply in broken:
            assert reply.is_whole
            assert identities(reply) == identities(cut)
            error = last_error(path, reply)
            assert error is not None, reply
            assert "gone" in error.message
        for reply in whole:
            assert last_error(path, reply) is None
            assert identities(reply).isdisjoint(identities(cut))
        assert len({reply.body for reply in whole}) == 1
        assert gateway.calls_of(path, body) == 2
        again = await ask(gateway.port, path, body)
        assert (again.cache, again.body) == ("HIT", whole[0].body)

    run(SLOW_TO_END, main)
    gateway.wait_ready()


def test_a_worker_dies_alone_and_nothing_partial_is_stored(gateway: Gateway, run: Run) -> None:
    body = question("who dies alone?", stream=True)

    async def main() -> None:
        async with connections_by_worker(gateway) as connections:
            victim, [connection] = next(iter(connections.items()))
            leader = Reading(connection, CHAT, body)
            await until(leader.has_part)
            os.kill(victim, signal.SIGKILL)
            cut = await leader.end()
            gateway.upstream.is_hurried = True
        await until(lambda: not is_running(victim))  # until then its flight may be joined
        reply = await ask(gateway.port, CHAT, body)
        assert (reply.cache, reply.is_whole, last_error(CHAT, reply)) == ("MISS", True, None)
        assert identities(reply).isdisjoint(identities(cut))

    run(SLOW_TO_END, main)
    gateway.wait_ready()


# ---- how long what nobody waits for is read ----


class UnderWay:
    """Calls that the provider is answering."""

    def __init__(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        provider = gateway.upstream.provider
        carry_out = provider._carry_out

        async def counted(*arguments: Any) -> None:
            self.count += 1
            try:
                await carry_out(*arguments)
            finally:
                self.count -= 1

        monkeypatch.setattr(provider, "_carry_out", counted)


async def ask_and_leave(gateway: Gateway, path: str, body: dict[str, Any], under_way: UnderWay, **headers: str) -> None:
    connection = await Connection.open(gateway.port)
    await connection.send(request_bytes("POST", path, body, **headers))
    await until(lambda: under_way.count)
    await asyncio.sleep(0.1)
    assert under_way.count == 1
    connection.writer.transport.abort()
    await until(lambda: under_way.count == 0)


@pytest.mark.parametrize("is_stream", [True, False])
def test_an_answer_without_readers_is_given_up_after_the_limit(
    is_stream: bool, hasty: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = question("for ever and ever?", stream=is_stream)
    hasty.upstream.provider.settings = StandInSettings(words=10_000, first_delay=0.0, word_delay=0.05, jitter=0.0)
    headers = {} if is_stream else {"x_stand_in_fault": "hang"}
    leaving = ask_and_leave(hasty, CHAT, body, UnderWay(hasty, monkeypatch), **headers)
    asyncio.run(asyncio.wait_for(leaving, PATIENCE_SECONDS))


def test_an_answer_that_a_client_of_another_worker_reads_is_not_given_up(
    hasty: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of this gateway is half a second; a mark of who reads lasts three."""
    body = question("who else waits?", stream=True)
    hasty.upstream.provider.settings = StandInSettings(words=60, first_delay=0.0, word_delay=0.1, jitter=0.0)
    under_way = UnderWay(hasty, monkeypatch)

    async def main() -> None:
        async with connections_by_worker(hasty) as connections:
            [lead], [other] = connections.values()
            leader = Reading(lead, CHAT, body)
            await until(leader.has_part)
            follower = Reading(other, CHAT, body)
            await until(follower.has_part)
            lead.writer.transport.abort()
            reply = await follower.end()
            await leader.task
        assert hasty.calls_of(CHAT, body) == 1
        assert (reply.is_whole, last_error(CHAT, reply), reply.cache) == (True, None, "COALESCED")
        assert reply.body.endswith(b"data: [DONE]\n\n")

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    assert under_way.count == 0


def test_an_answer_whose_reader_in_another_worker_left_is_given_up_too(
    hasty: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = question("does nobody else wait?", stream=True)
    hasty.upstream.provider.settings = StandInSettings(words=10_000, first_delay=0.0, word_delay=0.05, jitter=0.0)
    under_way = UnderWay(hasty, monkeypatch)

    async def main() -> None:
        async with connections_by_worker(hasty) as connections:
            readings = [Reading(connection, CHAT, body) for [connection] in connections.values()]
            await until(lambda: all(reading.has_part() for reading in readings))
            for reading in readings:
                reading.connection.writer.transport.abort()
                await reading.task
            await until(lambda: under_way.count == 0)

    asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))


@pytest.mark.parametrize("path", [RESPONSES, "/v1/passed"])
def test_what_would_not_be_stored_is_given_up_at_once(
    path: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of this gateway is ten minutes."""
    body = question("not for the cache", path=path, stream=True, store=True)
    provider = gateway.upstream.provider
    endless = Plan(200, ((b"content-type", b"text/event-stream"),), (b": wait\n\n",) * 10_000, is_paced=True)
    monkeypatch.setattr(provider, "_plan_other", lambda *_: endless)
    gateway.plan(path, body, endless)
    provider.settings = SLOW_TO_END
    under_way = UnderWay(gateway, monkeypatch)
    asyncio.run(asyncio.wait_for(ask_and_leave(gateway, path, body, under_way), PATIENCE_SECONDS))
