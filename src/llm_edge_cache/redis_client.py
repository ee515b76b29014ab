"""Redis as the cache uses it: every command bounded in time, every failure a RedisTrouble, in two faces.

Connections are kept per server and reused last in, first out; one that failed, timed out or was abandoned in the middle
is closed. A failure closes the idle ones to that server as well: where a peer is gone without a word, each would cost a
timeout of its own, long after the server is back.

Nothing is repeated, with one exception: a kept connection that turns out to be closed (the server was restarted) is
replaced by a fresh one at once, within the same time. So a command may have been carried out although its answer got
lost, and be carried out again: all commands of the cache can bear that.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final, Generic, TypeVar

from redis import exceptions

from llm_edge_cache.redis_commands import (
    Batch,
    Call,
    Command,
    LuaScript,
    Reason,
    RedisTrouble,
    Script,
    link_trouble,
)
from llm_edge_cache.redis_links import AsyncLink, Link, LinkMaker
from llm_edge_cache.redis_route import Node, Steps, Wire, route_to
from llm_edge_cache.redis_target import RedisTarget, parse_redis_url

if sys.version_info >= (3, 11):
    from asyncio import timeout_at
else:
    from async_timeout import timeout_at  # redis-py brings it where asyncio has none

__all__ = [
    "AsyncRedisClient",
    "Batch",
    "Call",
    "Command",
    "LuaScript",
    "Reason",
    "RedisClient",
    "RedisTarget",
    "RedisTrouble",
    "Script",
    "parse_redis_url",
]

_AnyLink = TypeVar("_AnyLink", Link, AsyncLink)


class _Idle(Generic[_AnyLink]):
    """The links that wait for their next exchange, by server. Every step is one atomic operation of list or dict."""

    def __init__(self) -> None:
        self._links: defaultdict[tuple[Node, bool], list[_AnyLink]] = defaultdict(list)

    def take(self, node: Node, is_blocking: bool) -> _AnyLink | None:
        links = self._links[node, is_blocking]
        try:
            return links.pop()
        except IndexError:
            return None

    def put(self, link: _AnyLink, is_blocking: bool) -> None:
        self._links[link.node, is_blocking].append(link)

    def drain(self, node: Node | None = None, *, blocking_only: bool = False) -> list[_AnyLink]:
        """Take out all, or all to one server."""
        drained: list[_AnyLink] = []
        for key in list(self._links):
            if (node is None or key[0] == node) and (key[1] or not blocking_only):
                drained += self._links.pop(key, [])
        return drained


_clients: Final[weakref.WeakSet[_ClientBase[Any]]] = weakref.WeakSet()
_inherited: Final[list[object]] = []


def _forget_inherited_links() -> None:
    for client in list(_clients):
        client._after_fork()


# The sockets are the parent's: a child that used one would read the parent's answers.
os.register_at_fork(after_in_child=_forget_inherited_links)


class _ClientBase(Generic[_AnyLink]):
    """What the two faces share: all but the waiting."""

    def __init__(
        self,
        target: RedisTarget,
        *,
        operation_timeout: float = 0.1,
        connection_timeout: float = 1.0,
        max_connections: int = 16,
    ) -> None:
        if not (operation_timeout > 0 and connection_timeout > 0 and max_connections > 0):
            raise ValueError("operation_timeout, connection_timeout and max_connections must be above 0")
        self.target: Final = target
        self._operation_timeout = operation_timeout
        self._connection_timeout = connection_timeout
        self._max_connections = max_connections
        self._maker = LinkMaker(target)
        self._route = route_to(target)
        self._is_closed = False
        self._start()
        _clients.add(self)

    def _start(self) -> None:
        """No links yet; also what a forked child begins with."""
        self._idle: _Idle[_AnyLink] = _Idle()

    def _after_fork(self) -> None:
        raise NotImplementedError

    @property
    def shards(self) -> int:
        """How many servers hold a part of the keys each, as far as is known; commands without a key reach one."""
        return self._route.shards

    def _crowded_trouble(self) -> RedisTrouble:
        return RedisTrouble("timeout", f"{self._max_connections} commands to {self.target.where} are under way already")

    def _closed_trouble(self) -> RedisTrouble:
        return RedisTrouble("connection", f"the client for {self.target.where} is closed")


def _earlier(end: float, other: float | None) -> float:
    return end if other is None or end < other else other


def _is_worth_a_fresh_link(outcome: object) -> bool:
    # Not a timeout, and not a refusal (wrong password, still loading), which redis-py makes subclasses of this.
    return type(outcome) is exceptions.ConnectionError


class RedisClient(_ClientBase[Link]):
    """For threads. Any number may share one; a forked child goes on with connections of its own.

    Args:
        target: Which Redis. Nothing is connected before the first command.
        operation_timeout: Seconds that one command may take in all, connecting included where that is needed. Only the
            resolver of host names does not know of it: give an address where the name service may hang.
        connection_timeout: Seconds that `connect` may take.
        max_connections: How many commands may be under way at once; further ones wait, within their time.

    Raises:
        RedisConfigError: A file for TLS cannot be used.
        ValueError: A number is not above 0.
    """

    def _start(self) -> None:
        super()._start()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(self._max_connections):
            self._permits.put(None)

    def _after_fork(self) -> None:
        inherited = self._idle
        self._start()
        for link in inherited.drain():
            link.disconnect()  # redis-py shuts down only what this process opened, and closes the rest

    def run(self, command: Command, *, blocking: float = 0.0, until: float | None = None) -> Any:
        """Carry out a command.

        Args:
            command: A Call, a Script or a Batch.
            blocking: Seconds for which the server was asked to wait (XREAD BLOCK). They are granted on top of the
                operation timeout, on a connection apart from the others'.
            until: Reading of `time.monotonic` at which it ends at the latest, where several share one time.

        Returns:
            The reply (bytes, int, None, or a list); for a Batch a list of them, a RedisTrouble in the place of one that
            failed alone.

        Raises:
            RedisTrouble: It was not answered, or with an error.
            TypeError: An argument is neither bytes, str nor int.
        """
        end = time.monotonic() + self._operation_timeout + blocking
        return self._drive(self._route.perform(command), _earlier(end, until), blocking > 0)

    def connect(self) -> None:
        """Find the server and have it answer a PING, within the connection timeout.

        Raises:
            RedisTrouble: It did not.
        """
        self._drive(self._route.greet(), time.monotonic() + self._connection_timeout, False)

    def close_blocking(self) -> None:
        """Close the idle connections that were used for waiting; the next wait opens another."""
        for link in self._idle.drain(blocking_only=True):
            link.disconnect()

    def close(self) -> None:
        """Close every connection, one in use as soon as its command has ended. Further commands are refused."""
        self._is_closed = True
        for link in self._idle.drain():
            link.disconnect()

    def __enter__(self) -> RedisClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _drive(self, steps: Steps, deadline: float, is_blocking: bool) -> Any:
        try:
            node, wires = next(steps)
            while True:
                try:
                    replies = self._exchange(node, wires, deadline, is_blocking)
                except RedisTrouble as trouble:  # noqa: PERF203 - the steps decide what comes next
                    node, wires = steps.throw(trouble)
                else:
                    node, wires = steps.send(replies)
        except StopIteration as done:
            return done.value

    def _exchange(self, node: Node, wires: Sequence[Wire], deadline: float, is_blocking: bool) -> list[Any]:
        packed = self._maker.pack(wires)
        if is_blocking:
            return self._converse(node, packed, len(wires), deadline, True)
        permits = self._permits
        try:
            permits.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._crowded_trouble() from None
        try:
            return self._converse(node, packed, len(wires), deadline, False)
        finally:
            permits.put(None)

    def _converse(
        self, node: Node, packed: Sequence[bytes], count: int, deadline: float, is_blocking: bool
    ) -> list[Any]:
        if self._is_closed:
            raise self._closed_trouble()
        kept = self._kept_link(node, is_blocking)
        outcome = self._try(kept, packed, count, deadline, is_blocking) if kept is not None else None
        if outcome is None or _is_worth_a_fresh_link(outcome):
            outcome = self._try(self._maker.make(node), packed, count, deadline, is_blocking)
        if isinstance(outcome, Exception):
            raise link_trouble(outcome, str(node))
        return outcome

    def _kept_link(self, node: Node, is_blocking: bool) -> Link | None:
        while (link := self._idle.take(node, is_blocking)) is not None:
            if link.is_sound():
                return link
            link.disconnect()
        return None

    def _try(
        self, link: Link, packed: Sequence[bytes], count: int, deadline: float, is_blocking: bool
    ) -> list[Any] | Exception:
        try:
            replies = link.exchange(packed, count, deadline)
        except Exception as error:
            link.disconnect()
            for other in self._idle.drain(link.node):
                other.disconnect()
            return error
        except BaseException:
            link.disconnect()
            raise
        self._idle.put(link, is_blocking)
        # 1. close() is called after this exchange began  2. it drains the idle links  3. this one is put among them.
        # Whoever puts looks again afterwards, so either sees the other.
        if self._is_closed:
            self.close()
        return replies


class AsyncRedisClient(_ClientBase[AsyncLink]):
    """For asyncio: RedisClient's names with `await`. One belongs to the event loop that first uses it.

    A command that is cancelled closes its connection.

    Args:
        target: As for RedisClient, and so the others.
        operation_timeout: Seconds.
        connection_timeout: Seconds.
        max_connections: Commands under way at once.

    Raises:
        RedisConfigError: A file for TLS cannot be used.
        ValueError: A number is not above 0.
    """

    def _start(self) -> None:
        super()._start()
        self._permits = asyncio.Semaphore(self._max_connections)
        self._loop: asyncio.AbstractEventLoop | None = None

    def _after_fork(self) -> None:
        # To close them would go through the parent's event loop, whose epoll set the child shares: the parent would
        # no longer hear of its own sockets. So they are kept, unused.
        _inherited.append(self._idle)
        self._start()

    async def run(self, command: Command, *, blocking: float = 0.0, until: float | None = None) -> Any:
        """As RedisClient.run.

        Raises:
            RedisTrouble: It was not answered, or with an error.
            RuntimeError: The client belongs to another event loop.
            TypeError: An argument is neither bytes, str nor int.
        """
        end = time.monotonic() + self._operation_timeout + blocking
        return await self._drive(self._route.perform(command), _earlier(end, until), blocking > 0)

    async def connect(self) -> None:
        """As RedisClient.connect.

        Raises:
            RedisTrouble: No server answered in time.
        """
        await self._drive(self._route.greet(), time.monotonic() + self._connection_timeout, False)

    async def close(self) -> None:
        """As RedisClient.close."""
        self._is_closed = True
        for link in self._idle.drain():
            await link.drop()
        await asyncio.sleep(0)  # the loop closes the sockets

    async def __aenter__(self) -> AsyncRedisClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _drive(self, steps: Steps, until: float, is_blocking: bool) -> Any:
        deadline = self._own_loop().time() + until - time.monotonic()  # some loops have a clock of their own
        try:
            node, wires = next(steps)
            while True:
                try:
                    replies = await self._exchange(node, wires, deadline, is_blocking)
                except RedisTrouble as trouble:  # noqa: PERF203 - the steps decide what comes next
                    node, wires = steps.throw(trouble)
                else:
                    node, wires = steps.send(replies)
        except StopIteration as done:
            return done.value

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise RuntimeError("an AsyncRedisClient belongs to the event loop that first used it: make one for each")
        return loop

    async def _exchange(self, node: Node, wires: Sequence[Wire], deadline: float, is_blocking: bool) -> list[Any]:
        packed = self._maker.pack(wires)
        try:
            async with timeout_at(deadline):
                if is_blocking:
                    return await self._converse(node, packed, len(wires), True)
                async with self._permits:
                    return await self._converse(node, packed, len(wires), False)
        except asyncio.TimeoutError:
            await self._drop_idle(node)
        raise link_trouble(TimeoutError(), str(node))

    async def _drop_idle(self, node: Node) -> None:
        for link in self._idle.drain(node):
            await link.drop()

    async def _converse(self, node: Node, packed: Sequence[bytes], count: int, is_blocking: bool) -> list[Any]:
        if self._is_closed:
            raise self._closed_trouble()
        kept = await self._kept_link(node, is_blocking)
        outcome = await self._try(kept, packed, count, is_blocking) if kept is not None else None
        if outcome is None or _is_worth_a_fresh_link(outcome):
            outcome = await self._try(self._maker.make_async(node), packed, count, is_blocking)
        if isinstance(outcome, Exception):
            raise link_trouble(outcome, str(node))
        return outcome

    async def _kept_link(self, node: Node, is_blocking: bool) -> AsyncLink | None:
        while (link := self._idle.take(node, is_blocking)) is not None:
            if await link.is_sound():
                return link
            await link.drop()
        return None

    async def _try(
        self, link: AsyncLink, packed: Sequence[bytes], count: int, is_blocking: bool
    ) -> list[Any] | Exception:
        try:
            replies = await link.exchange(packed, count)
        except Exception as error:
            await link.drop()
            await self._drop_idle(link.node)
            return error
        except BaseException:
            await link.drop()
            raise
        if self._is_closed:
            await link.drop()
        else:
            self._idle.put(link, is_blocking)
        return replies
