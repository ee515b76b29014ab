"""Workers come and go: a killed one is replaced and missed by nobody outside it; a stop cuts no request."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from gateway_servers import CHAT, Connection, Gateway, Reply, ask, last_error, question, request_bytes, run_gateway
from stand_in_upstream import AT_ONCE, StandInUpstream
from worker_servers import PATIENCE_SECONDS, wait_until

from llm_edge_cache.gateway.stand_in import StandInSettings

PACED = StandInSettings(words=40, first_delay=0.1, word_delay=0.03, jitter=0.0)
WARM = [question(f"warm {number}", stream=bool(number % 2)) for number in range(20)]


class Client:
    """Asks on and on over one connection; opens another where it is cut."""

    def __init__(self, gateway: Gateway, number: int) -> None:
        self.gateway = gateway
        self.number = number
        self.worker = 0
        self.asked = 0
        self.replies: list[Reply] = []
        self.cuts: list[tuple[int, float]] = []
        """By which worker the connection was cut, and when it had been opened."""

    async def run(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            opened = time.monotonic()
            self.worker = 0
            async with await Connection.open(self.gateway.port) as connection:
                try:
                    while not is_over.is_set():
                        await self._ask(connection)
                except (asyncio.IncompleteReadError, ConnectionError):
                    self.cuts.append((self.worker, opened))

    async def _ask(self, connection: Connection) -> None:
        self.asked += 1
        is_new = self.asked % 5 == 0
        body = question(f"new {self.number} {self.asked}", stream=True) if is_new else WARM[self.asked % len(WARM)]
        reply = await connection.ask(CHAT, body)
        self.worker = reply.worker
        if not reply.is_whole:
            raise ConnectionError
        self.replies.append(reply)


def test_a_worker_killed_under_load_is_replaced_and_missed_by_no_client_of_the_others(gateway: Gateway) -> None:
    async def main() -> tuple[int, float, list[Client]]:
        for body in WARM:
            await ask(gateway.port, CHAT, body)
        is_over = asyncio.Event()
        clients = [Client(gateway, number) for number in range(24)]
        running = [asyncio.create_task(client.run(is_over)) for client in clients]
        while not all(client.worker for client in clients):
            await asyncio.sleep(0.01)
        victim = clients[0].worker
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        while victim in gateway.worker_pids() or len(gateway.worker_pids()) < gateway.workers:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        is_over.set()
        await asyncio.gather(*running)
        return victim, killed, clients

    calls = [gateway.calls_of(CHAT, body) for body in WARM]
    victim, killed, clients = asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
    cuts = [cut for client in clients for cut in client.cuts]
    assert cuts
    # 0: it was accepted by the victim, and had not been answered yet.
    assert {worker for worker, _ in cuts} <= {victim, 0}
    assert all(opened < killed for _, opened in cuts)
    for client in clients:
        assert {reply.status for reply in client.replies} == {200}
        assert all(last_error(CHAT, reply) is None for reply in client.replies)
    # What the dead one had stored is there for all: no warm question is asked again.
    assert all(gateway.calls_of(CHAT, body) <= max(1, before) for body, before in zip(WARM, calls, strict=True))
    gateway.wait_ready()


def test_a_stop_cuts_no_request_and_waits_for_no_idle_connection(tmp_path: Path) -> None:
    with StandInUpstream(AT_ONCE) as upstream, run_gateway(tmp_path, upstream, workers=2) as gateway:
        upstream.provider.settings = PACED

        async def main() -> list[Reply]:
            tasks, connections = [], [await Connection.open(gateway.port) for _ in range(32)]
            leaving, idle = connections.pop(), connections.pop()
            for number, connection in enumerate(connections):
                body = question(f"until the end {number % 10}", stream=bool(number % 3))
                tasks.append(asyncio.create_task(connection.ask(CHAT, body)))
            await leaving.send(request_bytes("POST", CHAT, question("read to its end", stream=True)))
            while upstream.provider.tally.calls < 1 + 21:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            leaving.writer.transport.abort()
            gateway.server.send(signal.SIGTERM)
            replies = await asyncio.gather(*tasks)
            assert await idle.reader.read() == b""
            await asyncio.gather(*(connection.close() for connection in (leaving, idle, *connections)))
            return replies

        replies = asyncio.run(asyncio.wait_for(main(), PATIENCE_SECONDS))
        assert [reply for reply in replies if reply.status != 200 or not reply.is_whole] == []
        assert [reply for reply in replies if last_error(CHAT, reply)] == []
        assert gateway.server.wait() == 0
        # The one whose client had left was read to its end, too.
        assert upstream.provider.tally.completed == upstream.provider.tally.calls
        wait_until(lambda: gateway.worker_pids() == [], "the end of the workers")
