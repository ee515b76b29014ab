"""Gateways on two hosts, which share a Redis: answers, calls, and what happens when Redis or the other host is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gateway_servers import CHAT, Connection, Gateway, Reply, ask, last_error, question, request_bytes, run_hosts
from redis_servers import RedisServer
from worker_servers import PATIENCE_SECONDS, wait_until

from llm_edge_cache import SharedSlab
from llm_edge_cache.gateway.stand_in import StandInSettings
from llm_edge_cache.redis_tier import LEASE_MS
from llm_edge_cache.regions import Counter

DIFFERENT = StandInSettings(answers="different", words=10, first_delay=0.0, word_delay=0.0)
SLOW_TO_END = StandInSettings(answers="different", words=10, first_delay=0.3, word_delay=0.05, jitter=0.0)
TIMEOUT_MS = 500
"""An operation's, in the tests in which Redis does not answer."""

streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[list[Gateway]]:
    """Two hosts in health."""
    directory = tmp_path_factory.mktemp("pair")
    with run_hosts(directory, DIFFERENT, hosts=2, redis_url=redis_server.url, workers=2) as gateways:
        yield gateways
        gateways[0].upstream.provider.settings = DIFFERENT


def one(gateway: Gateway, text: str, *, stream: bool = False) -> Reply:
    """Ask once; the answer must be a whole one."""
    reply = asyncio.run(ask(gateway.port, CHAT, question(text, stream=stream)))
    assert is_answer(reply), reply
    return reply


def is_answer(reply: Reply) -> bool:
    return reply.status == 200 and reply.is_whole and last_error(CHAT, reply) is None


def count(gateway: Gateway, counter: Counter) -> int:
    with SharedSlab.attach(gateway.name) as slab:
        return slab._counter_sums()[counter]


def store(gateway: Gateway, text: str, *, stream: bool = False) -> Reply:
    """Ask once for what is new, and wait until the answer is in Redis."""
    before = count(gateway, Counter.L2_WRITES)
    reply = one(gateway, text, stream=stream)
    wait_until(lambda: count(gateway, Counter.L2_WRITES) > before, "the answer in Redis")
    return reply


@streams
def test_what_one_host_fetched_the_other_has_from_redis(stream: bool, pair: list[Gateway]) -> None:
    here, there = pair
    text = f"fetched here {stream}"
    first = store(here, text, stream=stream)
    found, again = (one(there, text, stream=stream) for _ in range(2))
    assert [(reply.cache, reply.get("x-cache-tier")) for reply in (found, again)] == [("HIT", "l2"), ("HIT", "l1")]
    assert found.body == again.body == first.body
    assert here.calls_of(CHAT, question(text, stream=stream)) == 1


@streams
def test_clients_of_both_hosts_cost_one_call(stream: bool, pair: list[Gateway]) -> None:
    pair[0].upstream.provider.settings = SLOW_TO_END
    body = question(f"from both hosts {stream}", stream=stream)

    async def main() -> list[Reply]:
        return await asyncio.gather(*(ask(gateway.port, CHAT, body) for gateway in pair for _ in range(40)))

    replies = asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    assert all(map(is_answer, replies))
    assert len({reply.body for reply in replies}) == 1
    assert pair[0].calls_of(CHAT, body) == 1


def test_a_host_that_dies_with_its_call_is_replaced_by_the_other(tmp_path: Path, redis_server: RedisServer) -> None:
    never = StandInSettings(answers="different", words=5, first_delay=600.0, word_delay=0.0)
    with run_hosts(tmp_path, DIFFERENT, hosts=2, redis_url=redis_server.url) as (here, there):
        body = question("whose host dies?")
        here.upstream.provider.settings = never

        async def main() -> tuple[Reply, float]:
            async with await Connection.open(here.port) as leader:
                await leader.send(request_bytes("POST", CHAT, body))
                while here.calls_of(CHAT, body) == 0:
                    await asyncio.sleep(0.01)
                here.upstream.provider.settings = DIFFERENT
                asked = asyncio.create_task(ask(there.port, CHAT, body))
                await asyncio.sleep(0.2)  # it waits for the lease
                assert not asked.done()
                killed = time.monotonic()
                for pid in here.worker_pids():
                    os.kill(pid, signal.SIGKILL)
                return await asked, time.monotonic() - killed

        reply, seconds = asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
        assert is_answer(reply)
        assert reply.cache == "MISS"
        assert there.calls_of(CHAT, body) == 2
        assert seconds < 10 * LEASE_MS / 1000


STRIKES: dict[str, tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]]] = {
    "killed": (RedisServer.kill, RedisServer.start),
    "stopped": (RedisServer.pause, RedisServer.resume),
}


@pytest.mark.parametrize("strike", STRIKES)
def test_redis_struck_under_load_is_missed_by_no_client(strike: str, tmp_path: Path) -> None:
    begin, end = STRIKES[strike]
    options = {"l2": {"operation_timeout_ms": TIMEOUT_MS}, "workers": 2}
    with (
        RedisServer(appendonly=True) as redis,
        run_hosts(tmp_path, DIFFERENT, hosts=2, redis_url=redis.url, **options) as pair,
    ):
        here, there = pair
        kept = store(here, "kept in redis")
        seen: list[Reply] = []
        is_over = asyncio.Event()

        async def client(number: int) -> None:
            gateway = pair[number % 2]
            async with await Connection.open(gateway.port) as connection:
                asked = 0
                while not is_over.is_set():
                    asked += 1
                    text = f"new {number} {asked}" if asked % 3 == 0 else f"common {asked % 7}"
                    seen.append(await connection.ask(CHAT, question(text, stream=bool(asked % 2))))
                    await asyncio.sleep(0.01)

        async def main() -> None:
            clients = [asyncio.create_task(client(number)) for number in range(12)]
            await asyncio.sleep(0.5)
            await asyncio.to_thread(begin, redis)
            struck = len(seen)
            while len(seen) < struck + 300:
                await asyncio.sleep(0.01)
            # Nobody's call is in Redis now: one for each host.
            body = question("asked while it is away", stream=True)
            both = await asyncio.gather(*(ask(gateway.port, CHAT, body) for gateway in pair for _ in range(10)))
            assert all(map(is_answer, both))
            assert here.calls_of(CHAT, body) <= 2
            await asyncio.to_thread(end, redis)
            healed = len(seen)
            while len(seen) < healed + 300:
                await asyncio.sleep(0.01)
            is_over.set()
            await asyncio.gather(*clients)

        asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
        assert [reply for reply in seen if not is_answer(reply)] == []
        wait_until(lambda: _reaches_redis(here), "this host asks Redis again")
        wait_until(lambda: _reaches_redis(there), "the other host asks Redis again")
        found = one(there, "kept in redis")
        assert (found.body, found.cache, found.get("x-cache-tier")) == (kept.body, "HIT", "l2")


def _reaches_redis(gateway: Gateway) -> bool:
    before = count(gateway, Counter.L2_WRITES)
    one(gateway, f"is it back? {time.monotonic_ns()}")
    time.sleep(0.1)
    return count(gateway, Counter.L2_WRITES) > before
