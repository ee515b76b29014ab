"""Waiting for a client's next message: at once where it is there, in vain for a while, never for ever."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from llm_edge_cache.gateway.patience import Patience

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


def test_a_message_that_is_there_is_returned_at_once() -> None:
    async def run() -> None:
        async def receive() -> dict[str, Any]:
            return MESSAGE

        patience = Patience(0.01)
        assert await patience.receive(receive) is MESSAGE
        await asyncio.sleep(0.05)  # nobody is cancelled who waits no more

    asyncio.run(run())


def test_a_message_that_comes_later_is_waited_for() -> None:
    async def run() -> None:
        client = Client()
        waiting = asyncio.ensure_future(Patience(60.0).receive(client.receive))
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
            await Patience(0.01).receive(client.receive)
        assert not client.is_waited_for, "the server's coroutine was left waiting"

    asyncio.run(run())


def test_each_is_waited_for_as_long_as_any_other() -> None:
    async def run() -> None:
        patience, loop = Patience(0.3), asyncio.get_running_loop()

        async def wait(delay: float) -> float:
            await asyncio.sleep(delay)
            begun = loop.time()
            with pytest.raises(asyncio.TimeoutError):
                await patience.receive(Client().receive)
            return loop.time() - begun

        answered = Client()
        waiting = asyncio.ensure_future(patience.receive(answered.receive))
        answered.sent.set()
        assert await waiting is MESSAGE
        waits = await asyncio.gather(*(wait(delay) for delay in (0.0, 0.1, 0.2, 0.7)))
        assert all(seconds >= 0.29 for seconds in waits)

    asyncio.run(run())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no telling")
def test_whoever_is_cancelled_when_patience_ends_is_cancelled() -> None:
    async def run() -> None:
        waiting = asyncio.ensure_future(Patience(0.01).receive(Client().receive))
        await asyncio.sleep(0)
        while not waiting.cancelling():
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(run())


def test_whoever_is_cancelled_over_it_leaves_nothing_waiting() -> None:
    async def run() -> None:
        client = Client()
        waiting = asyncio.ensure_future(Patience(60.0).receive(client.receive))
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
                await Patience(60.0).receive(receive)

    asyncio.run(run())
