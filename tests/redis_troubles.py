"""Faults of Redis under control: what strikes, what heals, and which errors may be counted meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import redis
from fault_proxy import FaultProxy
from redis_servers import RedisServer, ReservedPort

from llm_edge_cache.regions import Counter


class Trouble(NamedTuple):
    """A fault of one Redis, under control.

    Timeouts are to be short where one is among `reasons`, and nowhere else: there a slow machine might add it to them.
    """

    url: str
    strike: Callable[[], object]
    heal: Callable[[], object]
    reasons: set[Counter]
    """The errors that may be counted."""
    proxy: FaultProxy | None = None


@contextlib.contextmanager
def killed() -> Iterator[Trouble]:
    with RedisServer(appendonly=True) as server:
        yield Trouble(server.url, server.kill, server.start, {Counter.L2_ERROR_CONNECTION})


@contextlib.contextmanager
def stopped() -> Iterator[Trouble]:
    with RedisServer() as server:
        yield Trouble(server.url, server.pause, server.resume, {Counter.L2_ERROR_TIMEOUT})


@contextlib.contextmanager
def on_the_wire(behave: Callable[[FaultProxy], object], *reasons: Counter) -> Iterator[Trouble]:
    with RedisServer() as server, FaultProxy(server.address) as proxy:
        yield Trouble(proxy.url, lambda: behave(proxy), proxy.pass_on, set(reasons), proxy)


@contextlib.contextmanager
def locked_out() -> Iterator[Trouble]:
    with RedisServer() as server:

        def change_password() -> None:
            server.ask("CONFIG", "SET", "requirepass", "changed")
            server.password = "changed"
            server.ask("CLIENT", "KILL", "TYPE", "normal")

        def change_back() -> None:
            server.ask("CONFIG", "SET", "requirepass", "")
            server.password = None

        yield Trouble(
            server.url,
            change_password,
            change_back,
            {Counter.L2_ERROR_AUTH, Counter.L2_ERROR_CONNECTION},  # of who was connected, and thrown out
        )


@contextlib.contextmanager
def busy() -> Iterator[Trouble]:
    with RedisServer(options={"lua-time-limit": 10}) as server:

        def run_for_ever() -> None:
            with contextlib.suppress(redis.RedisError):
                server.ask("EVAL", "while true do end", 0)

        running = threading.Thread(target=run_for_ever, daemon=True)
        yield Trouble(
            server.url,
            running.start,
            lambda: server.ask("SCRIPT", "KILL"),
            {Counter.L2_ERROR_LOADING, Counter.L2_ERROR_TIMEOUT},
        )
        running.join(60)


OUTAGES: dict[str, Callable[[], contextlib.AbstractContextManager[Trouble]]] = {
    "killed": killed,
    "stopped": stopped,
    "slow": lambda: on_the_wire(lambda proxy: proxy.delay(10.0), Counter.L2_ERROR_TIMEOUT),
    "half-open": lambda: on_the_wire(lambda proxy: proxy.half_open(), Counter.L2_ERROR_TIMEOUT),
    "refusing": lambda: on_the_wire(lambda proxy: proxy.refuse(), Counter.L2_ERROR_CONNECTION),
    "reset in mid-reply": lambda: on_the_wire(lambda proxy: proxy.reset_mid_reply(3), Counter.L2_ERROR_CONNECTION),
    "no Redis": lambda: on_the_wire(lambda proxy: proxy.garbage(b"HTTP/1.1 400\r\n\r\n"), Counter.L2_ERROR_CONNECTION),
    "locked out": locked_out,
    "busy": busy,
}
"""Redis cannot serve."""


@contextlib.contextmanager
def full() -> Iterator[Trouble]:
    with RedisServer() as server:
        yield Trouble(
            server.url,
            lambda: server.ask("CONFIG", "SET", "maxmemory", 1),
            lambda: server.ask("CONFIG", "SET", "maxmemory", 0),
            {Counter.L2_ERROR_OOM},
        )


@contextlib.contextmanager
def read_only() -> Iterator[Trouble]:
    with RedisServer() as server, ReservedPort() as nowhere:
        yield Trouble(
            server.url,
            lambda: server.ask("REPLICAOF", "127.0.0.1", nowhere),
            lambda: server.ask("REPLICAOF", "NO", "ONE"),
            {Counter.L2_ERROR_READONLY},
        )


REFUSALS: dict[str, Callable[[], contextlib.AbstractContextManager[Trouble]]] = {
    "full": full,
    "read-only replica": read_only,
}
"""Redis answers, but takes nothing."""
