"""Waiting for a client's next message: at once where it is there, in vain for a while, never for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from llm_edge_cache.gateway.patience import receive_within

MESSAGE = {"type": "http.request", "body": b"x"}


class Client:
    """Its message comes when it is sent."""

    def __init__(self) -> None:
        self.sent = asyncio.Event()
        self.is_waited_for = False

    async def receive(self) -> dict[str, Any]:
        self.is_waited_for = True
        try:
            await self.sent.wait()
            await asyncio.sleep(0)  # a server may wait more than once
        finally:
            self.is_waited_for = False
        return MESSAGE


def test_a_message_that_is_there_needs_no_event_loop() -> None:
    async def receive() -> dict[str, Any]:
        return MESSAGE

    waiting = receive_within(receive, 0.0)
    with pytest.raises(StopIteration) as end:
        waiting.send(None)
    assert end.value.value is MESSAGE


def test_a_message_that_comes_later_is_waited_for() -> None:
    async def run() -> None:
        client = Client()
        waiting = asyncio.ensure_future(receive_within(client.receive, 60.0))
        await asyncio.sleep(0)
        assert client.is_waited_for
        client.sent.set()
        assert await waiting is MESSAGE
        assert not client.is_waited_for

    asyncio.run(run())


def test_patience_ends() -> None:
    async def run() -> None:
        client = Client()
        with pytest.raises(asyncio.TimeoutError):
            await receive_within(client.receive, 0.01)
        assert not client.is_waited_for, "the server's coroutine was left waiting"

    asyncio.run(run())


def test_whoever_is_cancelled_over_it_leaves_nothing_waiting() -> None:
    async def run() -> None:
        client = Client()
        waiting = asyncio.ensure_future(receive_within(client.receive, 60.0))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not client.is_waited_for

    asyncio.run(run())


def test_what_the_server_raises_comes_through() -> None:
    async def at_once() -> dict[str, Any]:
        raise ConnectionResetError

    async def later() -> dict[str, Any]:
        await asyncio.sleep(0)
        raise ConnectionResetError

    async def run() -> None:
        for receive in (at_once, later):
            with pytest.raises(ConnectionResetError):
                await receive_within(receive, 60.0)

    asyncio.run(run())
